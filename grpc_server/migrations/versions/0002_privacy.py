"""Callers who are not learned from, and what was redacted: 0002_privacy.sql."""

from grpc_server.migrations.plain_sql import run_sql_of

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Run this version's SQL file."""
    run_sql_of(__file__)
