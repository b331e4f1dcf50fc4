"""Log records as JSON text and back, without loss: what the spool writes and dead letters hold.

The text is one line of ASCII (NUL, line ends and lone surrogates are escaped), so that a spool can be read
with `less`, cut by lines, and written in any locale. `type` names the record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from grpc_server.domain.plain import message_from_plain, message_to_plain, plain
from grpc_server.domain.types import (
    Attempt,
    Feedback,
    FinishReason,
    InferenceEnded,
    InferenceStarted,
    LogRecord,
    ServerStarted,
    Status,
    TargetRole,
    Timings,
    Usage,
)


def record_to_json(record: LogRecord) -> str:
    """One line of ASCII.

    Raises:
        ValueError: if the record holds what JSON cannot (another type, or a nesting without end).
    """
    try:
        return json.dumps(_to_plain(record), ensure_ascii=True, separators=(",", ":"))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"a {type(record).__name__} that JSON cannot hold: {error}") from error


def record_from_json(text: str | bytes) -> LogRecord:
    """The record that `record_to_json` gave.

    Raises:
        ValueError: if it is not one.
    """
    try:
        value = json.loads(text)
        return _READERS[value["type"]](value)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a log record: {type(error).__name__} {error}") from error


def _to_plain(record: LogRecord) -> dict[str, Any]:
    match record:
        case InferenceStarted():
            return {
                "type": "inference_started",
                "id": str(record.id),
                "server_id": record.server_id,
                "caller": record.caller,
                "key_id": record.key_id,
                "alias": record.alias,
                "model_version": record.model_version,
                "target_role": record.target_role.value,
                "session_id": record.session_id,
                "request": plain(record.request),
                "started_at": _moment(record.started_at),
                "learning": record.learning,
                "text": record.text,
                "redacted": plain(record.redacted),
                "traceparent": record.traceparent,
            }
        case InferenceEnded():
            return {
                "type": "inference_ended",
                "id": str(record.id),
                "status": record.status.value,
                "finish_reason": None if record.finish_reason is None else record.finish_reason.value,
                "answer": plain(record.answer),
                "input_tokens": record.usage.input_tokens,
                "output_tokens": record.usage.output_tokens,
                "queue_ms": record.timings.queue_ms,
                "ttft_ms": record.timings.ttft_ms,
                "total_ms": record.timings.total_ms,
                "error": record.error,
                "ended_at": _moment(record.ended_at),
                "redacted": plain(record.redacted),
                "attempts": attempts_to_plain(record.attempts),
            }
        case ServerStarted():
            return {
                "type": "server_started",
                "server_id": record.server_id,
                "started_at": _moment(record.started_at),
            }
        case Feedback():
            return {
                "type": "feedback",
                "id": str(record.id),
                "inference_id": str(record.inference_id),
                "caller": record.caller,
                "key_id": record.key_id,
                "created_at": _moment(record.created_at),
                "boolean": record.boolean,
                "score": record.score,
                "comment": record.comment,
                "demonstration": (
                    None if record.demonstration is None else message_to_plain(record.demonstration)
                ),
                "learning": record.learning,
                "text": record.text,
                "redacted": plain(record.redacted),
            }


def attempts_to_plain(attempts: Sequence[Attempt]) -> list[dict[str, str]]:
    """A list of `{"model_version", "target_role", "error_type", "error"}`, all keys always there."""
    return [
        {
            "model_version": attempt.model_version,
            "target_role": attempt.target_role.value,
            "error_type": attempt.error_type,
            "error": attempt.error,
        }
        for attempt in attempts
    ]


def _moment(value: datetime) -> str:
    if value.utcoffset() is None:
        raise ValueError(f"{value.isoformat()} has no time zone")
    return value.isoformat()


def _inference_started(value: Mapping[str, Any]) -> LogRecord:
    return InferenceStarted(
        id=UUID(value["id"]),
        server_id=value["server_id"],
        caller=value["caller"],
        key_id=value["key_id"],
        alias=value["alias"],
        model_version=value["model_version"],
        target_role=TargetRole(value["target_role"]),
        session_id=value["session_id"],
        request=value["request"],
        started_at=datetime.fromisoformat(value["started_at"]),
        learning=value["learning"],
        text=value["text"],
        redacted=value["redacted"],
        traceparent=value["traceparent"],
    )


def _inference_ended(value: Mapping[str, Any]) -> LogRecord:
    reason = value["finish_reason"]
    return InferenceEnded(
        id=UUID(value["id"]),
        status=Status(value["status"]),
        finish_reason=None if reason is None else FinishReason(reason),
        answer=value["answer"],
        usage=Usage(value["input_tokens"], value["output_tokens"]),
        timings=Timings(value["queue_ms"], value["ttft_ms"], value["total_ms"]),
        error=value["error"],
        ended_at=datetime.fromisoformat(value["ended_at"]),
        redacted=value["redacted"],
        attempts=tuple(_attempt(attempt) for attempt in value["attempts"]),
    )


def _attempt(value: Mapping[str, Any]) -> Attempt:
    return Attempt(
        value["model_version"], TargetRole(value["target_role"]), value["error_type"], value["error"]
    )


def _server_started(value: Mapping[str, Any]) -> LogRecord:
    return ServerStarted(value["server_id"], datetime.fromisoformat(value["started_at"]))


def _feedback(value: Mapping[str, Any]) -> LogRecord:
    demonstration = value["demonstration"]
    return Feedback(
        id=UUID(value["id"]),
        inference_id=UUID(value["inference_id"]),
        caller=value["caller"],
        key_id=value["key_id"],
        created_at=datetime.fromisoformat(value["created_at"]),
        boolean=value["boolean"],
        score=value["score"],
        comment=value["comment"],
        demonstration=None if demonstration is None else message_from_plain(demonstration),
        learning=value["learning"],
        text=value["text"],
        redacted=value["redacted"],
    )


_READERS = {
    "inference_started": _inference_started,
    "inference_ended": _inference_ended,
    "server_started": _server_started,
    "feedback": _feedback,
}
