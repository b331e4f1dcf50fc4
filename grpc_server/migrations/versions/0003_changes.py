"""Routes and tokens that change are told at once: 0003_changes.sql."""

from grpc_server.migrations.plain_sql import run_sql_of

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Run this version's SQL file."""
    run_sql_of(__file__)
