"""Log, feedback, tokens, routes and events: 0001_log.sql."""

from grpc_server.migrations.plain_sql import run_sql_of

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Run this version's SQL file."""
    run_sql_of(__file__)
