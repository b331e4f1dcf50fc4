"""The tables of the service, brought up to date from inside the process: no file to find, no path to set.

Alembic keeps the order; each version is the plain SQL file of its name. Two servers that start at once are
safe: the whole upgrade is one transaction behind an advisory lock.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import psycopg
from alembic import command
from alembic.config import Config
from psycopg import sql
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from grpc_server.domain.errors import StoreUnavailable

HERE = Path(__file__).parent
MONTHS_AHEAD = 3
LOCK = 0x6167656E746C6F6F
"""The advisory lock that everything here takes: "agentloo" in ASCII."""


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


def ensure_partitions(
    dsn: str, *, now: datetime | None = None, months: int = MONTHS_AHEAD, wait_seconds: int = 60
) -> list[str]:
    """Make the monthly partitions of `inference` from this month on; returns the names of the new ones.

    Rows of such a month that are in the default partition (the server ran for months without a restart)
    move into it.
    """
    made = []
    now = datetime.now(UTC) if now is None else now
    with psycopg.connect(dsn, connect_timeout=10, options=f"-c lock_timeout={wait_seconds}s") as connection:
        for ahead in range(months + 1):
            with connection.transaction():
                connection.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK,))
                first = _month(now, ahead)
                name = f"inference_{first:%Y_%m}"
                found = connection.execute("SELECT to_regclass(%s)", (name,)).fetchone()
                if found is None or found[0] is None:
                    _make_partition(connection, name, first, _month(now, ahead + 1))
                    made.append(name)
    return made


def _make_partition(
    connection: psycopg.Connection[tuple[object, ...]], name: str, first: datetime, after: datetime
) -> None:
    table, low, high = sql.Identifier(name), _first_id(first), _first_id(after)
    connection.execute(sql.SQL("LOCK TABLE inference IN SHARE ROW EXCLUSIVE MODE"))
    connection.execute(sql.SQL("CREATE TABLE {} (LIKE inference INCLUDING ALL)").format(table))
    connection.execute(
        sql.SQL(
            "WITH moved AS (DELETE FROM inference_default WHERE id >= {} AND id < {} RETURNING *) "
            "INSERT INTO {} SELECT * FROM moved"
        ).format(low, high, table)
    )
    connection.execute(
        sql.SQL("ALTER TABLE inference ATTACH PARTITION {} FOR VALUES FROM ({}) TO ({})").format(
            table, low, high
        )
    )


def _month(now: datetime, ahead: int) -> datetime:
    month = now.year * 12 + now.month - 1 + ahead
    return datetime(month // 12, month % 12 + 1, 1, tzinfo=UTC)


def _first_id(moment: datetime) -> sql.Literal:
    """The least UUIDv7 of a moment: its first 48 bits are Unix milliseconds (RFC 9562, 5.7)."""
    digits = f"{int(moment.timestamp() * 1000):012x}"
    return sql.Literal(f"{digits[:8]}-{digits[8:]}-0000-0000-000000000000")
