"""The log in Postgres, read back page by page.

A page costs the same however many rows there are: it walks an index downwards from where the last one ended
(no OFFSET, no count), within conditions on `id` that leave out whole partitions, and looks at no more than
SCANNED rows. It has connections of its own, so that readers never keep the log from being written.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, Final, Self
from uuid import UUID

from psycopg import sql
from psycopg.rows import TupleRow

from grpc_server.adapters.postgres import PostgresStore
from grpc_server.adapters.postgres_text import from_text, to_text
from grpc_server.domain.log_query import LogFilter, LoggedInference, LogPage, id_range
from grpc_server.domain.plain import message_from_plain
from grpc_server.domain.types import Feedback, FinishReason, Status, TargetRole, Timings, Usage

SCANNED = 10_000
"""Rows that one page looks at: filters without an index of their own (status, version) may skip most."""
CONNECTIONS = 2
COUNTED = 1000
"""Feedbacks that are counted of one inference."""
SHOWN_FEEDBACK = 20
SHOWN_FEEDBACK_BYTES = 1024 * 1024

_COLUMNS: Final = (  # constants all
    "i.id, i.caller, i.key_id, i.alias, i.model_version, i.target_role, i.session_id, i.status, "  # noqa: S608
    "i.finish_reason, i.error, i.input_tokens, i.output_tokens, i.queue_ms, i.ttft_ms, i.total_ms, "
    "i.started_at, i.ended_at, "
    f"(SELECT count(*) FROM (SELECT FROM feedback f WHERE f.inference_id = i.id LIMIT {COUNTED}) AS counted)"
)
_ONE: Final = f"SELECT {_COLUMNS}, i.request::text, i.answer::text FROM inference i WHERE i.id = %s"  # noqa: S608
_ROWS: Final = (
    f"SELECT {_COLUMNS} FROM inference i "  # noqa: S608 - constants
    "WHERE i.id = ANY(%(ids)s) AND i.id BETWEEN %(last)s AND %(first)s ORDER BY i.id DESC"
)
_FEEDBACK: Final = (
    'SELECT id, caller, key_id, created_at, "boolean", score, comment, demonstration::text FROM feedback '
    "WHERE inference_id = %s ORDER BY created_at DESC, id DESC LIMIT %s"
)
# Which ids fit, and how far it was looked: to the end of what there is, or to the last of SCANNED rows.
_LOOK: Final = """
WITH looked AS MATERIALIZED (
    SELECT id, {fits} AS fits FROM inference WHERE {where} ORDER BY {order} LIMIT {scanned}
)
SELECT ARRAY(SELECT id FROM looked WHERE fits ORDER BY id DESC LIMIT {size}),
       (SELECT count(*) FROM looked),
       (SELECT id FROM looked ORDER BY id LIMIT 1)
"""


class PostgresReader:
    """A LogReader of the database `dsn`."""

    def __init__(self, dsn: str) -> None:
        self._store = PostgresStore(dsn, connections=CONNECTIONS)

    async def __aenter__(self) -> Self:
        await self._store.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._store.close()

    async def get(self, inference_id: UUID, caller: str) -> LoggedInference | None:
        """See `LogReader.get`."""
        async with self._store.reading() as connection:
            row = await (await connection.execute(_ONE, (inference_id,))).fetchone()
            if row is None or (caller and from_text(row[1]) != caller):
                return None
            said = await (await connection.execute(_FEEDBACK, (inference_id, SHOWN_FEEDBACK))).fetchall()
        return await asyncio.to_thread(_whole, row, said)

    async def page(self, wanted: LogFilter, below: UUID | None, size: int) -> LogPage:
        """See `LogReader.page`."""
        query, values = _look(wanted, below, size)
        async with self._store.reading() as connection:
            found = await (await connection.execute(query, values)).fetchone()
            assert found is not None  # noqa: S101 - it has no FROM: there is one row
            ids, looked, lowest = found
            more, ids = len(ids) > size, ids[:size]
            rows: list[TupleRow] = []
            if ids:
                ends = {"ids": ids, "first": ids[0], "last": ids[-1]}
                rows = await (await connection.execute(_ROWS, ends)).fetchall()
        if more:
            return LogPage([_logged(row) for row in rows], ids[-1])
        return LogPage([_logged(row) for row in rows], lowest if looked == _scanned(wanted, size) else None)


def _look(wanted: LogFilter, below: UUID | None, size: int) -> tuple[sql.Composed, dict[str, Any]]:
    first, last = id_range(wanted)
    if below is not None and below <= last:
        last = UUID(int=max(below.int - 1, 0))
    walked = _walked(wanted)
    where = ["id BETWEEN %(first)s AND %(last)s"]  # what partitions are left out by
    order = "id DESC"
    if walked:
        # Written as one range of an index, and sorted as it is: of an equality Postgres might find that the
        # primary key has the order too, and read a month of others' rows for the last ones of this caller.
        where.append(f"({walked}, id) BETWEEN ROW(%({walked})s, %(first)s) AND ROW(%({walked})s, %(last)s)")
        order = f"{walked} DESC, id DESC"
    if walked == "session_id":
        where.append("session_id <> ''")  # as the index has it
    query = sql.SQL(_LOOK).format(
        fits=sql.SQL(" AND ".join([f"{name} = %({name})s" for name in _sifted(wanted)] or ["true"])),
        where=sql.SQL(" AND ".join(where)),
        order=sql.SQL(order),
        scanned=sql.Literal(_scanned(wanted, size)),
        size=sql.Literal(size + 1),
    )
    texts = {name: to_text(getattr(wanted, name)) for name in ("caller", "session_id", "model_version")}
    return query, {**texts, "first": first, "last": last, "status": wanted.status}


def _walked(wanted: LogFilter) -> str:
    """The column whose index is walked; none: the primary key."""
    return next((name for name in ("session_id", "caller") if getattr(wanted, name)), "")


def _sifted(wanted: LogFilter) -> list[str]:
    """The columns that are looked at in each row."""
    columns = ("caller", "model_version", "status")
    return [name for name in columns if getattr(wanted, name) and name != _walked(wanted)]


def _scanned(wanted: LogFilter, size: int) -> int:
    """Rows to look at: where each fits, no more than the page needs."""
    return SCANNED if _sifted(wanted) else size + 1


def _logged(row: TupleRow, **more: Any) -> LoggedInference:
    (identity, caller, key_id, alias, version, role, session, status, reason, error, read, written) = row[:12]
    queue_ms, ttft_ms, total_ms, started_at, ended_at, count = row[12:18]
    return LoggedInference(
        id=identity,
        caller=from_text(caller),
        key_id=from_text(key_id),
        alias=from_text(alias),
        model_version=from_text(version),
        target_role=TargetRole(role),
        session_id=from_text(session),
        status=Status(status),
        finish_reason=None if reason is None else FinishReason(reason),
        error=from_text(error),
        usage=Usage(read, written),
        timings=Timings(queue_ms, ttft_ms, total_ms),
        started_at=started_at,
        ended_at=ended_at,
        feedback_count=count,
        **more,
    )


def _whole(row: TupleRow, said: list[TupleRow]) -> LoggedInference:
    request, answer = (None if text is None else json.loads(text) for text in row[18:20])
    feedback, size = [], 0
    for each in said:
        size += len(each[6] or "") + len(each[7] or "")
        if size > SHOWN_FEEDBACK_BYTES:
            break
        feedback.append(_feedback(row[0], each))
    return _logged(row, request=request, answer=answer, feedback=tuple(feedback))


def _feedback(inference_id: UUID, row: TupleRow) -> Feedback:
    identity, caller, key_id, created_at, boolean, score, comment, demonstration = row
    return Feedback(
        id=identity,
        inference_id=inference_id,
        caller=from_text(caller),
        key_id=from_text(key_id),
        created_at=created_at,
        boolean=boolean,
        score=score,
        comment=None if comment is None else from_text(comment),
        demonstration=None if demonstration is None else message_from_plain(json.loads(demonstration)),
    )
