"""Log records for tests: plain ones to build on, and strategies that find the odd ones."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

from hypothesis import strategies as st
from uuid6 import uuid7

from grpc_server.domain.types import (
    Attempt,
    Feedback,
    FinishReason,
    InferenceEnded,
    InferenceStarted,
    Message,
    Role,
    ServerStarted,
    Status,
    TargetRole,
    Timings,
    ToolCall,
    Usage,
)

NOON = datetime(2026, 1, 2, 12, 0, 0, 123456, tzinfo=UTC)


def new_id() -> UUID:
    return UUID(str(uuid7()))


def started(**changes: Any) -> InferenceStarted:
    record = InferenceStarted(
        id=new_id(),
        server_id="server-1",
        caller="billing",
        key_id="abcdef123456",
        alias="default",
        model_version="gemma-3-270m:base",
        target_role=TargetRole.STABLE,
        session_id="session-1",
        request={"messages": [{"role": "user", "content": "hi"}], "tools": [], "tool_choice": "auto"},
        started_at=NOON,
    )
    return replace(record, **changes)


def ended(identity: UUID, **changes: Any) -> InferenceEnded:
    record = InferenceEnded(
        id=identity,
        status=Status.OK,
        finish_reason=FinishReason.STOP,
        answer={"role": "assistant", "content": "hello", "tool_calls": [], "tool_name": ""},
        usage=Usage(3, 2),
        timings=Timings(0.5, 12.25, 40.0),
        error="",
        ended_at=NOON + timedelta(seconds=1),
    )
    return replace(record, **changes)


def feedback(inference_id: UUID, **changes: Any) -> Feedback:
    record = Feedback(
        id=new_id(), inference_id=inference_id, caller="billing", key_id="abcdef123456", created_at=NOON
    )
    return replace(record, **(changes or {"boolean": True}))


text = st.text(st.characters(exclude_categories=()), max_size=20)
"""Any text: NUL, lone surrogates, line ends, backslashes and all."""
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
json_objects = st.dictionaries(text, json_values, max_size=4)
moments = st.datetimes(
    min_value=datetime(1990, 1, 1),
    max_value=datetime(2090, 1, 1),
    timezones=st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30)), timezone(-timedelta(hours=8))]),
)
milliseconds = st.floats(min_value=0, max_value=1e9)
counts = st.integers(min_value=0, max_value=2**31 - 1)
starts = st.builds(
    InferenceStarted,
    id=st.uuids(),
    server_id=text,
    caller=text,
    key_id=text,
    alias=text,
    model_version=text,
    target_role=st.sampled_from(TargetRole),
    session_id=text,
    request=json_objects,
    started_at=moments,
    traceparent=text,
)
attempts = st.builds(
    Attempt,
    model_version=text.filter(bool),
    target_role=st.sampled_from(TargetRole),
    error_type=text,
    error=text,
)
ends = st.builds(
    InferenceEnded,
    id=st.uuids(),
    status=st.sampled_from([status for status in Status if status is not Status.STARTED]),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    answer=json_objects,
    usage=st.builds(Usage, counts, counts),
    timings=st.builds(Timings, milliseconds, st.none() | milliseconds, milliseconds),
    error=text,
    ended_at=moments,
    attempts=st.lists(attempts, max_size=3).map(tuple),
)
messages = st.builds(
    Message,
    role=st.sampled_from(Role),
    content=text,
    tool_calls=st.lists(st.builds(ToolCall, text, json_objects), max_size=2).map(tuple),
    tool_name=text,
)
feedbacks = st.builds(
    lambda value, **fields: Feedback(**fields, **value),
    value=st.one_of(
        st.fixed_dictionaries({"boolean": st.booleans()}),
        st.fixed_dictionaries({"score": st.floats(allow_nan=False)}),
        st.fixed_dictionaries({"comment": text}),
        st.fixed_dictionaries({"demonstration": messages}),
    ),
    id=st.uuids(),
    inference_id=st.uuids(),
    caller=text,
    key_id=text,
    created_at=moments,
)
server_starts = st.builds(ServerStarted, server_id=text, started_at=moments)
records = starts | ends | feedbacks | server_starts
