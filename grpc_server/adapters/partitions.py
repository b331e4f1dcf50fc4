"""The months of the table `inference`: a partition each, made ahead of its rows.

A month is a range of ids: the first 48 bits of a UUIDv7 are Unix milliseconds (RFC 9562, 5.7). Rows of a
month that has no partition (a clock that was wrong, or partitions that could not be made) land in
`inference_default`, from where they move when their month's partition is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from uuid import UUID

import psycopg
from psycopg import sql
from psycopg.rows import TupleRow

MONTHS_AHEAD = 3
LOCK = 0x6167656E746C6F6F
"""The advisory lock of whoever changes the tables: "agentloo" in ASCII."""

Connection = psycopg.Connection[TupleRow]


@contextmanager
def connected(dsn: str, wait_seconds: float) -> Iterator[Connection]:
    """A connection, in autocommit, that waits so long for a lock and no longer. Raises psycopg.Error."""
    options = f"-c lock_timeout={int(wait_seconds * 1000)} -c timezone=UTC"
    with psycopg.connect(
        dsn, connect_timeout=10, application_name="agentloop upkeep", options=options, autocommit=True
    ) as connection:
        yield connection


def ensure_partitions(
    dsn: str, *, now: datetime | None = None, months: int = MONTHS_AHEAD, wait_seconds: float = 60
) -> list[str]:
    """Make the partitions of this month and the coming ones that are missing; returns their names.

    Servers that do this at once take turns. Where none is missing nothing is locked. Rows of such a month
    move out of the default partition in the transaction that makes it: at no moment would a reader miss them.
    They keep their `changed_xid`: moved, not changed.

    Raises:
        psycopg.Error: if the database refuses, or a lock was not to be had in `wait_seconds`.
    """
    made = []
    now = datetime.now(UTC) if now is None else now
    with connected(dsn, wait_seconds) as connection:
        for ahead in range(months + 1):
            first = month(now, ahead)
            if _exists(connection, first):
                continue
            with connection.transaction():
                connection.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK,))
                if not _exists(connection, first):  # another server may have made it meanwhile
                    _make(connection, first, month(now, ahead + 1))
                    made.append(name_of(first))
    return made


def months_ahead(dsn: str, *, now: datetime | None = None, most: int = MONTHS_AHEAD) -> int:
    """How many months after this one have their partitions, without a gap; -1 where even this one has none.

    Raises:
        psycopg.Error: if the database does not answer.
    """
    now = datetime.now(UTC) if now is None else now
    with connected(dsn, 5) as connection:
        for ahead in range(most + 1):
            if not _exists(connection, month(now, ahead)):
                return ahead - 1
    return most


def rows_without_month(dsn: str, *, most: int = 10_000) -> int:
    """Rows in the default partition, counted up to `most`. Raises psycopg.Error."""
    with connected(dsn, 5) as connection:
        found = connection.execute(
            "SELECT count(*) FROM (SELECT FROM inference_default LIMIT %s) AS few", (most,)
        ).fetchone()
    return 0 if found is None else int(found[0])


def name_of(first: datetime) -> str:
    """The partition's name, by its month's first moment."""
    return f"inference_{first:%Y_%m}"


def is_attached(connection: Connection, name: str) -> bool:
    """Whether there is a partition of this name; a table that was detached is none."""
    found = connection.execute(
        "SELECT FROM pg_inherits WHERE inhparent = 'inference'::regclass AND inhrelid = to_regclass(%s)",
        (name,),
    ).fetchone()
    return found is not None


def month(now: datetime, ahead: int) -> datetime:
    """The first moment of the month so many months after that of `now`; before it, where negative."""
    number = now.year * 12 + now.month - 1 + ahead
    return datetime(number // 12, number % 12 + 1, 1, tzinfo=UTC)


def first_id(moment: datetime) -> UUID:
    """The least UUIDv7 of a moment."""
    return UUID(int=max(0, int(moment.timestamp() * 1000)) << 80)


def _exists(connection: Connection, first: datetime) -> bool:
    """Whether the month has a partition."""
    return is_attached(connection, name_of(first))


def _make(connection: Connection, first: datetime, after: datetime) -> None:
    table = sql.Identifier(name_of(first))
    low, high = sql.Literal(first_id(first)), sql.Literal(first_id(after))
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
