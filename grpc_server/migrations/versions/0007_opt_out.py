"""Callers who are not learned from, or not logged with text: 0007_opt_out.sql."""

from grpc_server.migrations.plain_sql import run_sql_of

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Run this version's SQL file."""
    run_sql_of(__file__)
