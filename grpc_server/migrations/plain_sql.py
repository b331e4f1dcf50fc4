"""How a version of the schema is reached: by the plain SQL file that lies beside it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import psycopg
from alembic import op


def run_sql_of(version: str) -> None:
    """Run the SQL file of the version whose `__file__` this is.

    By the driver itself: it holds `%` and several statements.
    """
    driver = cast("psycopg.Connection", op.get_bind().connection.dbapi_connection)
    driver.execute(Path(version).with_suffix(".sql").read_bytes())
