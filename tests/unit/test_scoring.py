"""An answer matches a demonstration when it says the same, and not when it only looks alike."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpc_server.domain.types import Message, Role, ToolCall
from training.scoring import matches


def call(name: str = "book", **arguments: Any) -> Message:
    return Message(Role.ASSISTANT, tool_calls=(ToolCall(name, arguments),))


def text(content: str) -> Message:
    return Message(Role.ASSISTANT, content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=3), json_values, max_size=3))
def test_the_same_call_matches_itself(arguments: dict[str, Any]) -> None:
    shown = Message(Role.ASSISTANT, tool_calls=(ToolCall("book", arguments),))
    assert matches(shown, shown)


@pytest.mark.parametrize(
    ("given_", "shown"),
    [
        (call(city="new york"), call(city="New York")),
        (call(day="2026/01/02"), call(day="2026-01-02")),
        (call(n=3), call(n=3.0)),
        (call(who=["Ann", {"age": 3}]), call(who=("ann", {"age": 3.0}))),
        (call(), call()),
        (text("Good  morning"), text("good morning\n")),
    ],
)
def test_what_means_the_same_matches(given_: Message, shown: Message) -> None:
    assert matches(given_, shown)


@pytest.mark.parametrize(
    ("given_", "shown"),
    [
        (call("Book"), call("book")),
        (call(city="York"), call(city="New York")),
        (call(city="Oslo", extra=1), call(city="Oslo")),
        (call(), call(city="Oslo")),
        (call(n=3), call(n="3")),
        (call(n=1), call(n=True)),
        (call(n=0), call(n=None)),
        (call(n=[1, 2]), call(n=[2, 1])),
        (call(n=[1]), call(n=[1, 1])),
        (call(n={"a": 1}), call(n={"b": 1})),
        (call(n={"a": 1}), call(n=[1])),
        (text("yes"), text("no")),
        (text(""), text("")),
        (text('{"name": "book"}'), call()),
        (call(), text("book")),
    ],
)
def test_what_means_something_else_does_not(given_: Message, shown: Message) -> None:
    assert not matches(given_, shown)
