"""One inference may be erased alone: 0012_erased_inference.sql."""

from grpc_server.migrations.plain_sql import run_sql_of

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    """Run this version's SQL file."""
    run_sql_of(__file__)
