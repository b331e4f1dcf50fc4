"""Which versions failed before the one that answered: 0004_attempts.sql."""

from grpc_server.migrations.plain_sql import run_sql_of

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Run this version's SQL file."""
    run_sql_of(__file__)
