"""What counts as wrong in a row of a snapshot."""

from __future__ import annotations

import json
import socket
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from uuid6 import uuid7

from grpc_server.domain.plain import message_from_plain
from tests.integration.log_by_hand import WEATHER, assistant, request, user
from validation.features import FEATURES, READ, counted
from validation.freeze import _counts
from validation.snapshot import COUNT_COLUMNS
from validation.snapshot import SCHEMA as SNAPSHOT
from validation.turns import turns_out_of_order

START = datetime(2026, 1, 30, tzinfo=UTC)
CALL = ("weather", {"city": "Oslo"})


def row(**other: Any) -> dict[str, Any]:
    """A good row of a snapshot, but for `other`; request, answer and feedback are given as plain JSON."""
    plain = {
        "request": other.pop("request", request(user("What is the weather in Oslo?"))),
        "answer": other.pop("answer", assistant("It rains.")),
        "feedback": other.pop("feedback", []),
    }
    return (
        {
            "inference_id": str(uuid7()),
            "status": "ok",
            "finish_reason": "stop",
            "input_tokens": 40,
            "output_tokens": 5,
            "queue_ms": 0.5,
            "ttft_ms": 30.0,
            "total_ms": 120.0,
            "started_at": START,
            "ended_at": START + timedelta(seconds=1),
        }
        | {f"{name}_json": None if value is None else json.dumps(value) for name, value in plain.items()}
        | other
    )


def features(made: dict[str, Any]) -> dict[str, int]:
    """What is counted in one row."""
    columns = pa.schema([SNAPSHOT.field(name) for name in READ])
    (found,) = counted(pa.RecordBatch.from_pylist([made], schema=columns)).to_pylist()
    return {name: found[name] for name in FEATURES}


def wrong(**other: Any) -> dict[str, int]:
    """The features of `row(**other)` that are not 0."""
    return {name: count for name, count in features(row(**other)).items() if count}


def feedback(**value: Any) -> dict[str, Any]:
    return dict.fromkeys(("boolean", "score", "comment", "demonstration")) | {"id": str(uuid7())} | value


def shown(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [feedback(demonstration=message)]


GOOD: list[dict[str, Any]] = [
    {},
    {"answer": assistant("", CALL), "finish_reason": "tool_calls"},
    {"answer": assistant(""), "output_tokens": 0, "feedback": shown(assistant("", CALL))},
    {"answer": assistant("", ("weather", {})), "feedback": shown(assistant("", CALL))},
    {"answer": assistant("\x00"), "feedback": shown(assistant("It rains."))},
    {"answer": None, "status": "cancelled", "finish_reason": None, "ttft_ms": None, "output_tokens": 0},
    {"request": request(user("tabs\tand\r\nlines, 👩‍👩‍👧 and العربية"))},
    {"feedback": [feedback(boolean=False), feedback(score=0.0), feedback(comment="")]},
]


@pytest.mark.parametrize("other", GOOD)
def test_nothing_is_wrong_with_a_good_row(other: dict[str, Any]) -> None:
    assert wrong(**other) == {}


BAD: list[tuple[str, dict[str, Any]]] = [
    ("malformed_id", {"inference_id": "inference 1"}),
    ("malformed_id", {"inference_id": None}),
    ("unreadable_json", {"request_json": "{"}),
    ("unreadable_json", {"request_json": "[" * 100_000}),
    ("unreadable_json", {"request": {"messages": "hello"}}),
    ("unreadable_json", {"answer": ["It rains."]}),
    ("unreadable_json", {"feedback": [{"boolean": True}]}),
    ("unknown_status", {"status": "started"}),
    ("unknown_status", {"status": None}),
    ("unknown_finish_reason", {"finish_reason": None}),
    ("unknown_finish_reason", {"finish_reason": "bored"}),
    ("disordered_times", {"ended_at": START - timedelta(milliseconds=1)}),
    ("disordered_times", {"started_at": None}),
    ("impossible_timings", {"ttft_ms": 200.0}),
    ("impossible_timings", {"queue_ms": float("nan")}),
    ("impossible_timings", {"total_ms": -1.0, "queue_ms": 0.0, "ttft_ms": None}),
    ("inconsistent_tokens", {"input_tokens": 0}),
    ("inconsistent_tokens", {"input_tokens": None}),
    ("inconsistent_tokens", {"output_tokens": -1}),
    ("inconsistent_tokens", {"output_tokens": 0}),
    ("inconsistent_tokens", {"output_tokens": 66}),
    ("missing_prompt", {"request": request(user(" \n"))}),
    ("missing_answer", {"answer": assistant(" ")}),
    ("unprintable_characters", {"request": request(user("a\x00b"))}),
    ("unprintable_characters", {"answer": assistant("", ("weather", {"city": "O\x1bslo"}))}),
    ("unprintable_characters", {"feedback": shown(assistant("\udfff"))}),
    ("invalid_tools", {"request": request(user("Hi"), tools=(WEATHER, WEATHER))}),
    ("invalid_tools", {"request": request(user("Hi"), tools=(WEATHER | {"name": ""},))}),
    ("invalid_tools", {"request": request(user("Hi"), tools=(WEATHER | {"parameters": {"type": "dict"}},))}),
    ("invalid_tool_calls", {"answer": assistant("", ("teapot", {}))}),
    ("invalid_tool_calls", {"answer": assistant("", ("weather", {"days": 3}))}),
    ("invalid_demonstrations", {"feedback": shown(assistant("", ("weather", {"city": 3})))}),
    ("invalid_demonstrations", {"feedback": shown(assistant("", ("teapot", {})))}),
    ("invalid_demonstrations", {"feedback": shown(user("It rains."))}),
    ("invalid_feedback", {"feedback": [feedback()]}),
    ("invalid_feedback", {"feedback": [feedback(boolean=True, comment="yes")]}),
    ("failed", {"status": "error", "finish_reason": None}),
    ("failed", {"status": "aborted", "finish_reason": None}),
]


@pytest.mark.parametrize(("feature", "other"), BAD)
def test_one_thing_wrong_is_one_feature(feature: str, other: dict[str, Any]) -> None:
    assert set(wrong(**other)) == {feature}


def test_a_demonstration_that_says_nothing_is_invalid_and_an_answer_missing() -> None:
    assert wrong(feedback=shown(assistant(""))) == {"invalid_demonstrations": 1, "missing_answer": 1}


def test_a_schema_that_points_elsewhere_is_never_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **named: asked.append(given))
    away = WEATHER | {"parameters": {"type": "object", "$ref": "http://schemas.invalid/weather.json"}}
    found = wrong(request=request(user("Hi"), tools=(away,)), answer=assistant("", CALL))
    assert found == {"invalid_tool_calls": 1}
    assert asked == []


@pytest.mark.timeout(60)
def test_a_pattern_that_takes_years_does_not_stop_the_night() -> None:
    slow = WEATHER | {"parameters": {"properties": {"city": {"type": "string", "pattern": "^(a+)+b$"}}}}
    call = ("weather", {"city": "a" * 60})
    found = wrong(request=request(user("Hi"), tools=(slow,)), answer=assistant("", call))
    assert found == {"invalid_tool_calls": 1}
    call = ("weather", {"city": "aab"})
    assert wrong(request=request(user("Hi"), tools=(slow,)), answer=assistant("", call)) == {}


@pytest.mark.timeout(60)
def test_a_schema_that_takes_minutes_to_read_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("validation.tool_schemas._SCHEMA_SECONDS", 0.3)
    slow = WEATHER | {"parameters": {"type": "object", "pattern": "(?i:[ -\U0010ffff])" * 2500}}
    assert wrong(request=request(user("Hi"), tools=(slow,))) == {"invalid_tools": 1}


def test_a_schema_that_points_at_itself_ends() -> None:
    endless = WEATHER | {"parameters": {"$ref": "#"}}
    assert wrong(request=request(user("Hi"), tools=(endless,)), answer=assistant("", CALL)) == {
        "invalid_tool_calls": 1
    }


SYSTEM = {"role": "system", "content": "Be brief.", "tool_calls": [], "tool_name": ""}
TOOL = {"role": "tool", "content": "rain", "tool_calls": [], "tool_name": "weather"}
CALLS = assistant("", CALL)


@pytest.mark.parametrize(
    ("said", "out_of_order"),
    [
        ([user("a")], 0),
        ([SYSTEM, user("a"), assistant("b"), user("c")], 0),
        ([user("a"), CALLS, TOOL, TOOL, assistant("b"), user("c")], 0),
        ([user("a"), CALLS, TOOL], 0),
        ([], 1),
        ([SYSTEM], 1),
        ([user("a"), user("b")], 1),
        ([assistant("a"), user("b")], 1),
        ([user("a"), assistant("b")], 1),
        ([user("a"), TOOL], 1),
        ([user("a"), assistant("b"), TOOL], 1),
        ([user("a"), SYSTEM, user("b")], 2),
    ],
)
def test_turns_alternate_and_the_last_to_speak_awaits_an_answer(
    said: list[dict[str, Any]], out_of_order: int
) -> None:
    assert turns_out_of_order([message_from_plain(each) for each in said]) == out_of_order


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


@given(json_values, json_values, json_values)
def test_whatever_json_a_row_holds_it_is_judged(request: Any, answer: Any, feedback: Any) -> None:
    found = features(row(request=request, answer=answer, feedback=feedback))
    assert set(found) == set(FEATURES)
    assert all(isinstance(count, int) and count >= 0 for count in found.values())


@given(st.text(), json_values)
def test_whatever_schema_a_tool_has_its_calls_are_judged(city: str, schema: Any) -> None:
    tool = WEATHER | {"parameters": schema if isinstance(schema, dict) else {"enum": [schema]}}
    found = features(
        row(request=request(user("Hi"), tools=(tool,)), answer=assistant("", ("weather", {"city": city})))
    )
    assert found["unreadable_json"] == 0


def test_a_raw_prompt_needs_no_turns_and_no_user() -> None:
    raw = request() | {"prompt": "Once upon a time\x07", "messages": []}
    assert wrong(request=raw) == {}
    assert wrong(request=raw | {"prompt": ""}) == {"missing_prompt": 1}
    assert wrong(request=raw, feedback=shown(assistant("", CALL))) == {}
    assert wrong(request=raw, answer=assistant("")) == {"missing_answer": 1}
    assert wrong(request=raw | {"prompt": 7}) == wrong(request=request())


def test_a_raw_prompts_characters_are_counted() -> None:
    made = row(request=request() | {"prompt": "Once", "messages": []})
    assert _counts(made) | {"answer_chars": 0} == dict.fromkeys(COUNT_COLUMNS, 0) | {
        "prompt_chars": 4,
        "tools": 1,
    }
