"""Indexes by which callers audit their rows: 0009_audit.sql."""

from pathlib import Path
from typing import cast

import psycopg
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Run the SQL file of this version, by the driver itself: it holds `%` and several statements."""
    driver = cast("psycopg.Connection", op.get_bind().connection.dbapi_connection)
    driver.execute(Path(__file__).with_suffix(".sql").read_bytes())
