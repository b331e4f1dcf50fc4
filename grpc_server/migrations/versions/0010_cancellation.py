"""Cancelling what another server runs: 0010_cancellation.sql."""

from grpc_server.migrations.plain_sql import run_sql_of

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Run this version's SQL file."""
    run_sql_of(__file__)
