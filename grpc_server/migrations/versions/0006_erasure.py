"""What was erased, so that nothing of it comes back: 0006_erasure.sql."""

from grpc_server.migrations.plain_sql import run_sql_of

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Run this version's SQL file."""
    run_sql_of(__file__)
