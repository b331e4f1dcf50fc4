"""Requests and messages as plain JSON: nothing is lost on the way there and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpc_server.domain.plain import (
    message_from_plain,
    message_to_plain,
    request_from_plain,
    request_to_plain,
)
from grpc_server.domain.types import ChatRequest, Message, Role, Sampling, Tool, ToolCall, ToolChoice

TEXT = st.text(max_size=20)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(TEXT, JSON, max_size=3)
MESSAGES = st.builds(
    Message,
    st.sampled_from(Role),
    TEXT,
    st.lists(st.builds(ToolCall, TEXT, OBJECTS), max_size=2).map(tuple),
    TEXT,
)
REQUESTS = st.builds(
    ChatRequest,
    st.lists(MESSAGES, min_size=1, max_size=4).map(tuple),
    tools=st.lists(st.builds(Tool, TEXT, TEXT, OBJECTS), max_size=2).map(tuple),
    tool_choice=st.sampled_from(ToolChoice),
    sampling=st.builds(
        Sampling,
        temperature=st.floats(0, 2),
        top_p=st.floats(0.01, 1),
        top_k=st.integers(1, 1000),
        max_tokens=st.integers(1, 8192),
        seed=st.none() | st.integers(0, 2**32 - 1),
        stop=st.lists(TEXT, max_size=2).map(tuple),
    ),
    response_schema=st.none() | OBJECTS,
)


@given(MESSAGES)
def test_a_message_comes_back_through_json(message: Message) -> None:
    assert message_from_plain(json.loads(json.dumps(message_to_plain(message)))) == message


@given(REQUESTS)
def test_a_request_comes_back_through_json(request_: ChatRequest) -> None:
    plain = json.loads(json.dumps(request_to_plain(request_)))
    assert request_from_plain(plain) == request_


def test_what_columns_of_the_log_hold_is_given_by_keyword() -> None:
    request = ChatRequest((Message(Role.USER, "Hi"),), alias="agent", model_version="m:c", session_id="s")
    plain = request_to_plain(request)
    assert set(plain) == {"messages", "tools", "tool_choice", "sampling", "response_schema"}
    assert request_from_plain(plain, alias="agent", model_version="m:c", session_id="s") == request


def test_what_may_be_left_out_takes_its_default() -> None:
    assert request_from_plain({"messages": [{"role": "user", "content": "Hi"}]}) == ChatRequest(
        (Message(Role.USER, "Hi"),)
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"messages": None}, "messages is NoneType; it must be a list"),
        ({"messages": "Hi"}, "messages is str; it must be a list"),
        ({"messages": ["Hi"]}, "messages holds str; it must hold objects"),
        ({"messages": [{}]}, "role is missing"),
        ({"messages": [{"role": "king"}]}, "role is 'king'; it must be one of system, user, assistant, tool"),
        ({"messages": [{"role": "user", "content": 1}]}, "content is int; it must be text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]}, "arguments is missing"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": []}]}]},
            "arguments is list; it must be an object",
        ),
        ({"tools": [{"name": "f"}]}, "parameters is missing"),
        ({"tool_choice": "maybe"}, "tool_choice is 'maybe'"),
        ({"sampling": []}, "sampling is list; it must be an object"),
        ({"sampling": {"top_k": True}}, "top_k is bool; it must be a number"),
        ({"sampling": {"seed": "1"}}, "seed is str; it must be a number"),
        ({"sampling": {"stop": "x"}}, "stop must be a list of texts"),
        ({"sampling": {"stop": [1]}}, "stop must be a list of texts"),
        ({"response_schema": []}, "response_schema is list; it must be an object or null"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], text: str) -> None:
    plain = {"messages": [{"role": "user", "content": "Hi"}], **change}
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        request_from_plain(plain)
