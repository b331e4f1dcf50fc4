"""A log filled by hand: rows put straight into its tables, in transactions that a test holds open."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from uuid6 import uuid7

WEATHER = {
    "name": "weather",
    "description": "The weather of a place.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
START = datetime(2026, 1, 30, 12, 0, tzinfo=UTC)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content, "tool_calls": [], "tool_name": ""}


def assistant(content: str = "", *calls: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    made = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return {"role": "assistant", "content": content, "tool_calls": made, "tool_name": ""}


def request(*messages: dict[str, Any], tools: tuple[dict[str, Any], ...] = (WEATHER,)) -> dict[str, Any]:
    return {
        "messages": list(messages),
        "tools": list(tools),
        "tool_choice": "auto",
        "sampling": {
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": 1,
            "max_tokens": 64,
            "seed": 1,
            "stop": [],
        },
        "response_schema": None,
    }


def infer(connection: psycopg.Connection[Any], **other: Any) -> UUID:
    """Store one ended inference in the connection's transaction; `other` replaces columns."""
    inference_id = other.pop("id", None) or uuid7()
    row = {
        "id": inference_id,
        "server_id": "test",
        "caller": "travel",
        "key_id": "k" * 12,
        "alias": "default",
        "model_version": "gemma-3-270m:base",
        "target_role": "stable",
        "session_id": "s1",
        "request": request(user("What is the weather in Oslo?")),
        "answer": assistant("It rains."),
        "status": "ok",
        "finish_reason": "stop",
        "error": "",
        "input_tokens": 40,
        "output_tokens": 5,
        "queue_ms": 0.5,
        "ttft_ms": 30.0,
        "total_ms": 120.0,
        "started_at": START,
        "ended_at": START + timedelta(seconds=1),
    } | other
    _insert(connection, "inference", row)
    return inference_id


def give_feedback(connection: psycopg.Connection[Any], inference_id: UUID, **value: Any) -> UUID:
    """Store one feedback on an inference in the connection's transaction."""
    feedback_id = uuid7()
    row = {
        "id": feedback_id,
        "inference_id": inference_id,
        "caller": "travel",
        "key_id": "k" * 12,
        "created_at": START,
    } | value
    _insert(connection, "feedback", row)
    return feedback_id


def _insert(connection: psycopg.Connection[Any], table: str, row: dict[str, Any]) -> None:
    names = ", ".join(row)
    places = ", ".join(f"%({name})s" for name in row)
    values = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in row.items()}
    connection.execute(f"INSERT INTO {table} ({names}) VALUES ({places})", values)


def verdict(cycle: Path) -> None:
    """A gate's verdict, which is all that moves the watermark."""
    (cycle / "gate.json").write_text('{"verdict": "inconclusive"}', encoding="utf-8")
