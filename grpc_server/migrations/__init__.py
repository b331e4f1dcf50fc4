"""The tables of the service, brought up to date from inside the process: no file to find, no path to set.

Alembic keeps the order; each version is the plain SQL file of its name. Two servers that start at once are
safe: the whole upgrade is one transaction behind an advisory lock.
"""

from __future__ import annotations

from pathlib import Path

import psycopg
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from grpc_server.adapters.partitions import LOCK, ensure_partitions
from grpc_server.domain.errors import StoreUnavailable

HERE = Path(__file__).parent


def migrate(dsn: str, *, revision: str = "head", wait_seconds: int = 60) -> None:
    """Bring the database up to `revision`, and make the partitions of this and the coming months.

    Raises:
        StoreUnavailable: if the database cannot be reached or refuses; nothing has changed then.
    """
    try:
        _upgrade(dsn, revision, wait_seconds)
        ensure_partitions(dsn, wait_seconds=wait_seconds)
    except (psycopg.Error, DBAPIError) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        raise StoreUnavailable(f"the database could not be brought up to date: {cause}") from error


def _upgrade(dsn: str, revision: str, wait_seconds: int) -> None:
    def connect() -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(dsn, connect_timeout=10, options=f"-c lock_timeout={wait_seconds}s")

    engine = create_engine("postgresql+psycopg://", creator=connect, poolclass=NullPool)
    config = Config()
    config.set_main_option("script_location", str(HERE).replace("%", "%%"))
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
