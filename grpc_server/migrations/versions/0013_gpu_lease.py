"""Who was lent a server's GPU: 0013_gpu_lease.sql."""

from grpc_server.migrations.plain_sql import run_sql_of

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    """Run this version's SQL file."""
    run_sql_of(__file__)
