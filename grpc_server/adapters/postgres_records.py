"""Records of the log as rows: by table, in the order in which a batch of them is stored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from grpc_server.adapters.postgres_text import to_json, to_text
from grpc_server.adapters.record_json import attempts_to_plain
from grpc_server.domain.plain import message_to_plain
from grpc_server.domain.types import Feedback, InferenceEnded, InferenceStarted, LogRecord, ServerStarted


def sorted_rows(records: Sequence[LogRecord]) -> list[Rows]:
    """By table, and by the starts of servers in between. Raises ValueError for what JSON cannot hold."""
    rows = [Rows()]
    for record in records:
        if isinstance(record, ServerStarted):
            rows.append(Rows(server_started=record))
        else:
            rows[-1].add(record)
    return rows


class Rows:
    """Records between two starts of a server, by table. Their order within a table is kept."""

    def __init__(self, server_started: ServerStarted | None = None) -> None:
        self.server_started = server_started
        self.starts: list[dict[str, Any]] = []
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
                await cursor.execute(_INSERT_STARTS, (json.dumps(self.starts),))
            if self.ends:
                await cursor.executemany(_UPDATE_END, self.ends)
                await _need_starts(connection, [row[-1] for row in self.ends])
            if self.feedback:
                await cursor.executemany(_INSERT_FEEDBACK, self.feedback)


# All of a batch at once: row by row Postgres took 40 µs a row, so it takes 15 (batches of 500).
_INSERT_STARTS = (
    "INSERT INTO inference (id, server_id, caller, key_id, alias, model_version, target_role, session_id, "
    "request, started_at, learning, request_redacted, trace_id) "
    "SELECT id, server_id, caller, key_id, alias, model_version, target_role, session_id, "
    "request::json, started_at, learning, request_redacted::json, trace_id "
    "FROM json_to_recordset(%s::json) AS start (id uuid, server_id text, caller text, key_id text, "
    "alias text, model_version text, target_role text, session_id text, request text, "
    "started_at timestamptz, learning boolean, request_redacted text, trace_id text) "
    "ON CONFLICT (id) DO NOTHING"
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


def _start_row(record: InferenceStarted) -> dict[str, Any]:
    return {
        "id": str(record.id),
        "server_id": to_text(record.server_id),
        "caller": to_text(record.caller),
        "key_id": to_text(record.key_id),
        "alias": to_text(record.alias),
        "model_version": to_text(record.model_version),
        "target_role": record.target_role.value,
        "session_id": to_text(record.session_id),
        "request": to_json(record.request),
        "started_at": record.started_at.isoformat(),
        "learning": record.learning,
        "request_redacted": _found(record.redacted),
        "trace_id": _trace_id(record.traceparent),
    }


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
