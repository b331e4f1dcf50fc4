"""Freezing reads what is new, not the whole log: 0011_fresh.sql."""

from grpc_server.migrations.plain_sql import run_sql_of

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """Run this version's SQL file."""
    run_sql_of(__file__)
