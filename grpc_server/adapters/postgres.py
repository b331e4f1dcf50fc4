"""The log, the tokens and the routes in Postgres.

Every wait is bounded: to connect, for a pooled connection, for a statement and for a lock; and where the
server itself hangs, its socket is shut from our side, which psycopg then reports as a lost connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import select
import socket
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from grpc_server.adapters.erased import unerased
from grpc_server.adapters.postgres_events import note, read_events
from grpc_server.adapters.postgres_records import sorted_rows
from grpc_server.adapters.postgres_routes import change_route, read_routes
from grpc_server.adapters.postgres_text import to_text
from grpc_server.adapters.postgres_tokens import add_token, limit_token, read_tokens, revoke_token
from grpc_server.adapters.record_json import record_to_json
from grpc_server.adapters.spool_frame import Corrupt
from grpc_server.domain.errors import StoreUnavailable
from grpc_server.domain.ports import TokenRecord
from grpc_server.domain.types import Event, Limits, LogRecord, Route

CONNECT_SECONDS = 5
STATEMENT_SECONDS = 20
HANGING_SECONDS = 25.0
"""After this the connection is cut: the server did not even keep its own statement timeout."""
READ_SECONDS = 3.0
"""The same for tokens and routes, which are read every few seconds, and must act within five."""

# A WAL file's name begins with its timeline, in hexadecimal.
_HISTORY = (
    "SELECT concat_ws('/', (SELECT system_identifier FROM pg_control_system()), "
    "(SELECT oid FROM pg_database WHERE datname = current_database()), "
    "left(pg_walfile_name(pg_current_wal_lsn()), 8))"
)

# psycopg's errors, ours; the first class that fits counts. ValueError: the record is bad, and will be
# tomorrow. StoreUnavailable: the database is down, busy, full, not migrated or not ours; it may recover.
ERRORS: Final[Mapping[type[Exception], type[Exception]]] = {
    psycopg.DataError: ValueError,
    psycopg.IntegrityError: ValueError,
    psycopg.errors.ProgramLimitExceeded: ValueError,
    psycopg.errors.StatementTooComplex: ValueError,
    psycopg.OperationalError: StoreUnavailable,
    psycopg.ProgrammingError: StoreUnavailable,
    psycopg.NotSupportedError: StoreUnavailable,
    psycopg.InternalError: StoreUnavailable,
    psycopg.InterfaceError: StoreUnavailable,
    psycopg.Error: StoreUnavailable,
    PoolTimeout: StoreUnavailable,
    OSError: StoreUnavailable,
}


def translate(error: Exception) -> Exception:
    """Our error for one of psycopg's. Its text never quotes a row: Postgres puts those into DETAIL."""
    for theirs, ours in ERRORS.items():
        if isinstance(error, theirs):
            return ours(_reason(error))
    return error


def _reason(error: Exception) -> str:
    if isinstance(error, psycopg.errors.UndefinedTable | psycopg.errors.UndefinedColumn):
        return "the database is not up to date: run `python -m grpc_server migrate`"
    if isinstance(error, psycopg.Error) and error.diag.message_primary:
        return f"the database says {error.sqlstate}: {error.diag.message_primary}"
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"the database does not answer: {first}"


class PostgresStore:
    """LogStore, TokenStore and RouteStore on one database.

    Args:
        dsn: of a migrated database.
        connections: most connections that are held at once.
    """

    def __init__(self, dsn: str, *, connections: int = 4) -> None:
        self.dsn = dsn
        self._pool: AsyncConnectionPool[AsyncConnection[TupleRow]] = AsyncConnectionPool(
            dsn,
            min_size=1,
            max_size=connections,
            open=False,
            timeout=CONNECT_SECONDS,
            reconnect_timeout=2.0,  # then the next caller tries: an outage must not lengthen itself
            check=_check_alive,
            kwargs={
                "connect_timeout": CONNECT_SECONDS,
                "application_name": "agentloop",
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "options": (
                    f"-c statement_timeout={STATEMENT_SECONDS}s -c lock_timeout={STATEMENT_SECONDS // 2}s "
                    "-c idle_in_transaction_session_timeout=60s -c timezone=UTC"
                ),
            },
        )

    async def open(self) -> None:
        """Start connecting; returns at once, whether the database is up or not."""
        await self._pool.open(wait=False)

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.close(timeout=5.0)

    async def check(self) -> None:
        """Return if the database answers and is migrated; raises StoreUnavailable otherwise."""
        async with self._connection(READ_SECONDS) as connection:
            await connection.execute("SELECT FROM inference LIMIT 0")

    # LogStore

    async def store(self, records: Sequence[LogRecord]) -> None:
        """Store a batch in one transaction; what is stored already changes nothing.

        The first end of an inference counts. One that was marked as aborted, because a server of the same
        name started, takes its end still.

        Raises:
            StoreUnavailable: nothing was stored, or the answer was lost; do it again.
            ValueError: a record that the database will never take; nothing was stored.
        """
        async with self._connection() as connection:
            for one in sorted_rows(await unerased(connection, records)):
                await one.store(connection)

    async def history(self) -> str:
        """Cluster, database and timeline: a restore, and a standby that takes over, begin a new timeline.

        Raises StoreUnavailable, also of a database that is still being restored.
        """
        async with self._connection() as connection:
            row = await (await connection.execute(_HISTORY)).fetchone()
        return str(row[0]) if row else ""

    async def add_dead_letter(self, what: LogRecord | Corrupt, reason: str) -> None:
        """Keep a record that could not be stored, as text. Twice is once."""
        if isinstance(what, Corrupt):
            kind, text = "corrupt", what.raw.decode("latin-1")
        else:
            kind, text = type(what).__name__, record_to_json(what)
        identity = UUID(bytes=hashlib.sha256(text.encode()).digest()[:16])
        async with self._connection() as connection:
            await connection.execute(
                "INSERT INTO dead_letter (id, kind, reason, record) VALUES (%s, %s, %s, %s) "
                "ON CONFLICT DO NOTHING",
                (identity, kind, to_text(reason), to_text(text)),
            )

    # TokenStore

    async def all_tokens(self) -> list[TokenRecord]:
        """Every token, the revoked ones too, by age. Raises StoreUnavailable."""
        async with self._connection(READ_SECONDS) as connection:
            return await read_tokens(connection)

    async def create(self, token: TokenRecord, by: str = "") -> None:
        """Store a new token. Raises StoreUnavailable, AlreadyExists."""
        async with self._connection() as connection:
            await add_token(connection, token, by)

    async def revoke(self, key_id: str, at: datetime, by: str = "") -> bool:
        """Revoke a token; False if there is none, or it is revoked already. Raises StoreUnavailable."""
        async with self._connection() as connection:
            return await revoke_token(connection, key_id, at, by)

    async def limit(self, key_id: str, limits: Limits, by: str = "") -> bool:
        """Replace a token's limits; False if there is none, or it is revoked. Raises StoreUnavailable."""
        async with self._connection() as connection:
            return await limit_token(connection, key_id, limits, by)

    # EventStore

    async def note(self, kind: str, actor: str, subject: str, detail: Mapping[str, Any]) -> None:
        """Keep an event. Raises StoreUnavailable."""
        async with self._connection() as connection:
            await note(connection, kind, actor, subject, detail)

    async def events(self, kind: str = "", since: datetime | None = None, limit: int = 100) -> list[Event]:
        """The latest events, the last one last; those of one kind, since then. Raises StoreUnavailable."""
        async with self._connection() as connection:
            return await read_events(connection, kind, since, limit)

    # RouteStore

    async def all_routes(self) -> list[Route]:
        """Every route, by alias. Raises StoreUnavailable."""
        async with self._connection(READ_SECONDS) as connection:
            return await read_routes(connection)

    async def set_route(self, route: Route, changed_by: str) -> Route:
        """Compare-and-set by `route.revision`, 0 for a new alias; returns it with its new revision.

        Raises:
            Conflict: if the stored revision is another one.
            StoreUnavailable: if the database does not answer; the route may have been set.
        """
        async with self._connection() as connection:
            return await change_route(connection, route, changed_by)

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection[TupleRow]]:
        """A connection for a short read. Raises StoreUnavailable; cut after READ_SECONDS."""
        async with self._connection(READ_SECONDS) as connection:
            yield connection

    @contextlib.asynccontextmanager
    async def _connection(self, seconds: float = HANGING_SECONDS) -> AsyncIterator[AsyncConnection[TupleRow]]:
        """A connection with a transaction: committed at the end, rolled back on an error, cut if it hangs."""
        try:
            async with self._pool.connection(timeout=min(seconds, CONNECT_SECONDS)) as connection:
                with _cut_after(connection, seconds):
                    try:
                        yield connection
                        await connection.commit()
                    except BaseException:
                        with contextlib.suppress(psycopg.Error):
                            await connection.rollback()
                        raise
        except (psycopg.Error, OSError) as error:
            raise translate(error) from error
        except (OverflowError, RecursionError) as error:
            raise ValueError(f"a value that the database cannot hold: {error}") from error


async def _check_alive(connection: AsyncConnection[TupleRow]) -> None:
    """Refuse a pooled connection whose server has gone; asks the kernel only, not the server."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    if poll.poll(0):  # idle, and yet there is something to read: the server's goodbye
        connection.pgconn.consume_input()
        if poll.poll(0):
            raise psycopg.OperationalError("the server has closed this connection")


@contextlib.contextmanager
def _cut_after(connection: AsyncConnection[TupleRow], seconds: float) -> Iterator[None]:
    """Shut the connection's socket after so long. A cancellation would wait for the hanging server."""

    def cut() -> None:
        with (
            contextlib.suppress(OSError, psycopg.Error),
            socket.socket(fileno=os.dup(connection.fileno())) as duplicate,
        ):
            duplicate.shutdown(socket.SHUT_RDWR)

    timer = asyncio.get_running_loop().call_later(seconds, cut)
    try:
        yield
    finally:
        timer.cancel()
