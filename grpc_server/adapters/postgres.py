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
from grpc_server.adapters.postgres_text import from_text, to_json, to_text
from grpc_server.adapters.postgres_tokens import add_token, limit_token, read_tokens, revoke_token
from grpc_server.adapters.record_json import attempts_to_plain, record_to_json
from grpc_server.adapters.spool_frame import Corrupt
from grpc_server.domain.errors import Conflict, StoreUnavailable
from grpc_server.domain.plain import message_to_plain
from grpc_server.domain.ports import TokenRecord
from grpc_server.domain.types import (
    Event,
    Feedback,
    InferenceEnded,
    InferenceStarted,
    Limits,
    LogRecord,
    Route,
    ServerStarted,
    Target,
    TargetRole,
)

CONNECT_SECONDS = 5
STATEMENT_SECONDS = 20
HANGING_SECONDS = 25.0
"""After this the connection is cut: the server did not even keep its own statement timeout."""
READ_SECONDS = 3.0
"""The same for tokens and routes, which are read every few seconds, and must act within five."""

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
            for one in _sorted(await unerased(connection, records)):
                await one.store(connection)

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
            cursor = await connection.execute(
                "SELECT r.alias, r.revision, t.model_version, t.role, t.weight "
                "FROM route r LEFT JOIN route_target t USING (alias) ORDER BY r.alias, t.position"
            )
            rows = await cursor.fetchall()
        routes: dict[str, Route] = {}
        for alias, revision, model_version, role, weight in rows:
            before = routes.get(alias, Route(from_text(alias), revision, ()))
            found: tuple[Target, ...] = ()
            if model_version is not None:
                found = (Target(from_text(model_version), TargetRole(role), weight),)
            routes[alias] = Route(before.alias, revision, (*before.targets, *found))
        return list(routes.values())

    async def set_route(self, route: Route, changed_by: str) -> Route:
        """Compare-and-set by `route.revision`, 0 for a new alias; returns it with its new revision.

        Raises:
            Conflict: if the stored revision is another one.
            StoreUnavailable: if the database does not answer; the route may have been set.
        """
        alias = to_text(route.alias)
        async with self._connection() as connection:
            if route.revision == 0:
                cursor = await connection.execute(
                    "INSERT INTO route (alias, revision, changed_by) VALUES (%s, 1, %s) "
                    "ON CONFLICT DO NOTHING",
                    (alias, to_text(changed_by)),
                )
            else:
                cursor = await connection.execute(
                    "UPDATE route SET revision = revision + 1, changed_at = now(), changed_by = %s "
                    "WHERE alias = %s AND revision = %s",
                    (to_text(changed_by), alias, route.revision),
                )
            if cursor.rowcount == 0:
                raise Conflict(await _conflict_text(connection, alias, route.revision))
            await connection.execute("DELETE FROM route_target WHERE alias = %s", (alias,))
            targets = [
                (alias, position, to_text(target.model_version), target.role.value, target.weight)
                for position, target in enumerate(route.targets)
            ]
            async with connection.cursor() as many:
                await many.executemany("INSERT INTO route_target VALUES (%s, %s, %s, %s, %s)", targets)
            changed = Route(route.alias, route.revision + 1, route.targets)
            await note(
                connection,
                "route_set",
                changed_by,
                route.alias,
                {"revision": changed.revision, "targets": [list(target[2:]) for target in targets]},
            )
        return changed

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


def _sorted(records: Sequence[LogRecord]) -> list[_Rows]:
    """By table, and by the starts of servers in between. Raises ValueError for what JSON cannot hold."""
    rows = [_Rows()]
    for record in records:
        if isinstance(record, ServerStarted):
            rows.append(_Rows(server_started=record))
        else:
            rows[-1].add(record)
    return rows


class _Rows:
    """Records between two starts of a server, by table. Their order within a table is kept."""

    def __init__(self, server_started: ServerStarted | None = None) -> None:
        self.server_started = server_started
        self.starts: list[tuple[Any, ...]] = []
        self.ends: list[tuple[Any, ...]] = []
        self.feedback: list[tuple[Any, ...]] = []

    def add(self, record: InferenceStarted | InferenceEnded | Feedback) -> None:
        """Sort one in. Raises ValueError for what JSON cannot hold."""
        match record:
            case InferenceStarted():
                self.starts.append(_start_row(record))
            case InferenceEnded():
                self.ends.append(_end_row(record))
            case Feedback():
                self.feedback.append(_feedback_row(record))

    async def store(self, connection: AsyncConnection[TupleRow]) -> None:
        """Starts before ends: an end needs its inference."""
        if self.server_started is not None:
            await _abort_what_ran(connection, self.server_started)
        async with connection.cursor() as cursor:
            if self.starts:
                await cursor.executemany(_INSERT_START, self.starts)
            if self.ends:
                await cursor.executemany(_UPDATE_END, self.ends)
                await _need_starts(connection, [row[-1] for row in self.ends])
            if self.feedback:
                await cursor.executemany(_INSERT_FEEDBACK, self.feedback)


_INSERT_START = (
    "INSERT INTO inference (id, server_id, caller, key_id, alias, model_version, target_role, session_id, "
    "request, started_at, learning, request_redacted, trace_id) "
    "VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT (id) DO NOTHING"
)

# An answer that is null is one that was aborted by the start of a server: the end itself knows better.
_UPDATE_END = (
    "UPDATE inference SET status = %s, finish_reason = %s, answer = %s, error = %s, input_tokens = %s, "
    "output_tokens = %s, queue_ms = %s, ttft_ms = %s, total_ms = %s, ended_at = %s, answer_redacted = %s, "
    "attempts = %s, model_version = COALESCE(%s, model_version), target_role = COALESCE(%s, target_role), "
    "changed_xid = pg_current_xact_id() WHERE id = %s AND answer IS NULL"
)

_INSERT_FEEDBACK = (
    'INSERT INTO feedback (id, inference_id, caller, key_id, created_at, "boolean", score, comment, '
    "demonstration, learning, redacted) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) "
    "ON CONFLICT (id) DO NOTHING"
)


def _start_row(record: InferenceStarted) -> tuple[Any, ...]:
    return (
        record.id,
        to_text(record.server_id),
        to_text(record.caller),
        to_text(record.key_id),
        to_text(record.alias),
        to_text(record.model_version),
        record.target_role.value,
        to_text(record.session_id),
        to_json(record.request),
        record.started_at,
        record.learning,
        _found(record.redacted),
        _trace_id(record.traceparent),
    )


def _trace_id(traceparent: str) -> str:
    """`version-trace_id-span_id-flags`; empty if there is none."""
    return to_text(traceparent.split("-")[1]) if traceparent.count("-") == 3 else ""


def _end_row(record: InferenceEnded) -> tuple[Any, ...]:
    last = record.attempts[-1] if record.attempts else None
    return (
        record.status.value,
        None if record.finish_reason is None else record.finish_reason.value,
        to_json(record.answer),
        to_text(record.error),
        record.usage.input_tokens,
        record.usage.output_tokens,
        record.timings.queue_ms,
        record.timings.ttft_ms,
        record.timings.total_ms,
        record.ended_at,
        _found(record.redacted),
        to_json(attempts_to_plain(record.attempts)),
        None if last is None else to_text(last.model_version),
        None if last is None else last.target_role.value,
        record.id,
    )


def _feedback_row(record: Feedback) -> tuple[Any, ...]:
    return (
        record.id,
        record.inference_id,
        to_text(record.caller),
        to_text(record.key_id),
        record.created_at,
        record.boolean,
        record.score,
        None if record.comment is None else to_text(record.comment),
        None if record.demonstration is None else to_json(message_to_plain(record.demonstration)),
        record.learning,
        _found(record.redacted),
    )


def _found(redacted: Mapping[str, int]) -> str | None:
    return to_json(redacted) if redacted else None


async def _abort_what_ran(connection: AsyncConnection[TupleRow], started: ServerStarted) -> None:
    """What a server had begun and not ended when it started anew, it will never end.

    Only once: a record that comes again must not abort what began after it.
    """
    cursor = await connection.execute(
        "INSERT INTO event (at, kind, actor, subject) VALUES (%s, 'server_started', %s, '') "
        "ON CONFLICT DO NOTHING",
        (started.started_at, to_text(started.server_id)),
    )
    if cursor.rowcount:
        await connection.execute(
            "UPDATE inference SET status = 'aborted', error = 'the server stopped before it ended', "
            "ended_at = GREATEST(%s, started_at), changed_xid = pg_current_xact_id() "
            "WHERE server_id = %s AND status = 'started'",
            (started.started_at, to_text(started.server_id)),
        )


async def _need_starts(connection: AsyncConnection[TupleRow], ids: list[UUID]) -> None:
    cursor = await connection.execute(
        "SELECT x.id FROM unnest(%s::uuid[]) AS x (id) "
        "WHERE NOT EXISTS (SELECT FROM inference i WHERE i.id = x.id) LIMIT 1",
        (ids,),
    )
    missing = await cursor.fetchone()
    if missing is not None:
        raise ValueError(f"the end of inference {missing[0]}, whose start is not stored")


async def _conflict_text(connection: AsyncConnection[TupleRow], alias: str, revision: int) -> str:
    cursor = await connection.execute("SELECT revision FROM route WHERE alias = %s", (alias,))
    row = await cursor.fetchone()
    now = "there is no such route" if row is None else f"it is at revision {row[0]}"
    return f"route {alias}: {now}, not at {revision}; read it again, then decide"


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
