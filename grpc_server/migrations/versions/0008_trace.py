"""The trace that an inference was asked in: 0008_trace.sql."""

from grpc_server.migrations.plain_sql import run_sql_of

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Run this version's SQL file."""
    run_sql_of(__file__)
