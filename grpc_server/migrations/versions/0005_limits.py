"""What a token's caller may use: 0005_limits.sql."""

from grpc_server.migrations.plain_sql import run_sql_of

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Run this version's SQL file."""
    run_sql_of(__file__)
