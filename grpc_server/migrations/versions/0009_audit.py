"""Indexes by which callers audit their rows: 0009_audit.sql."""

from grpc_server.migrations.plain_sql import run_sql_of

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Run this version's SQL file."""
    run_sql_of(__file__)
