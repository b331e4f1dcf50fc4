"""Which versions failed before the one that answered: 0004_attempts.sql."""

from pathlib import Path
from typing import cast

import psycopg
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Run the SQL file of this version, by the driver itself: it holds several statements."""
    driver = cast("psycopg.Connection", op.get_bind().connection.dbapi_connection)
    driver.execute(Path(__file__).with_suffix(".sql").read_bytes())
