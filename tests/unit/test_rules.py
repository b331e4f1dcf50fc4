"""What the API takes and refuses, which version answers, and that no error quotes a prompt."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpc_server.domain import rules
from grpc_server.domain.errors import InvalidArgument, PermissionDenied
from grpc_server.domain.types import (
    Caller,
    ChatRequest,
    Feedback,
    Message,
    Role,
    Route,
    Sampling,
    Scope,
    Target,
    TargetRole,
    Tool,
    ToolCall,
    ToolChoice,
)

USER = Message(Role.USER, "Hi")
ASSISTANT = Message(Role.ASSISTANT, "Hello")
SYSTEM = Message(Role.SYSTEM, "Be brief")
CALLS = Message(Role.ASSISTANT, tool_calls=(ToolCall("f", {"a": 1}),))
RESULT = Message(Role.TOOL, "42", tool_name="f")
TOOL = Tool("f", "A function", {"type": "object"})


def deep(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def error_of(**fields: Any) -> InvalidArgument:
    """What is wrong with a request that is sound but for `fields`."""
    with pytest.raises(InvalidArgument) as caught:
        rules.check_chat(replace(ChatRequest((USER,)), **fields))
    return caught.value


@pytest.mark.parametrize(
    "messages",
    [
        (USER,),
        (SYSTEM, USER),
        (USER, ASSISTANT, USER),
        (SYSTEM, USER, CALLS, RESULT),
        (USER, CALLS, RESULT, ASSISTANT, USER),
        (USER, CALLS, RESULT, CALLS, RESULT),
        (USER, CALLS, USER),
        (USER, CALLS, replace(RESULT, content="")),
    ],
)
def test_roles_that_alternate_are_taken(messages: tuple[Message, ...]) -> None:
    rules.check_chat(ChatRequest(messages))


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ((), "messages"),
        ((USER,) * 257, "messages"),
        ((SYSTEM,), "messages[0].role"),
        ((USER, ASSISTANT), "messages[1].role"),
        ((ASSISTANT, USER), "messages[0].role"),
        ((USER, USER), "messages[1].role"),
        ((USER, ASSISTANT, ASSISTANT, USER), "messages[2].role"),
        ((USER, SYSTEM, USER), "messages[1].role"),
        ((SYSTEM, SYSTEM, USER), "messages[1].role"),
        ((SYSTEM, ASSISTANT, USER), "messages[1].role"),
        ((RESULT,), "messages[0].role"),
        ((USER, RESULT), "messages[1].role"),
        ((USER, ASSISTANT, RESULT), "messages[2].role"),
        ((USER, CALLS, RESULT, USER), "messages[3].role"),
        ((USER, CALLS, RESULT, RESULT), "messages[3].role"),
        ((USER, CALLS, replace(RESULT, tool_name="g")), "messages[2].tool_name"),
        ((USER, CALLS, replace(RESULT, tool_name="")), "messages[2].tool_name"),
        ((replace(USER, content=""),), "messages[0].content"),
        ((replace(USER, content="a\ud800"),), "messages[0].content"),
        ((replace(USER, tool_name="f"),), "messages[0].tool_name"),
        ((replace(USER, tool_calls=CALLS.tool_calls),), "messages[0].tool_calls"),
        ((USER, Message(Role.ASSISTANT), USER), "messages[1]"),
        ((USER, replace(CALLS, content="and text"), RESULT), "messages[1]"),
        ((USER, replace(CALLS, tool_calls=CALLS.tool_calls * 2), RESULT), "messages[1].tool_calls"),
        (
            (USER, Message(Role.ASSISTANT, tool_calls=(ToolCall("no name", {}),)), RESULT),
            "messages[1].tool_calls[0].name",
        ),
        (
            (USER, Message(Role.ASSISTANT, tool_calls=(ToolCall("f", {"a": "\udfff"}),)), RESULT),
            "messages[1].tool_calls[0].arguments_json",
        ),
    ],
)
def test_messages_that_are_wrong_are_refused_with_the_field(
    messages: tuple[Message, ...], field: str
) -> None:
    error = error_of(messages=messages)
    assert error.field == field
    assert field in str(error)


def test_an_error_says_what_was_wrong_which_value_and_what_it_must_be() -> None:
    assert str(error_of(sampling=Sampling(max_tokens=0))) == "max_tokens is 0; it must be from 1 to 8192"


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        (Sampling(temperature=-0.1), "temperature"),
        (Sampling(temperature=2.1), "temperature"),
        (Sampling(temperature=math.nan), "temperature"),
        (Sampling(temperature=math.inf), "temperature"),
        (Sampling(top_p=0), "top_p"),
        (Sampling(top_p=1.01), "top_p"),
        (Sampling(top_p=math.nan), "top_p"),
        (Sampling(top_k=0), "top_k"),
        (Sampling(top_k=1001), "top_k"),
        (Sampling(max_tokens=8193), "max_tokens"),
        (Sampling(seed=2**32), "seed"),
        (Sampling(seed=-1), "seed"),
        (Sampling(stop=("a",) * 9), "stop"),
        (Sampling(stop=("",)), "stop[0]"),
        (Sampling(stop=("a", "b" * 65)), "stop[1]"),
        (Sampling(stop=("\ud800",)), "stop[0]"),
    ],
)
def test_sampling_out_of_range_is_refused(sampling: Sampling, field: str) -> None:
    error = error_of(sampling=sampling)
    assert error.field == f"sampling.{field}"
    assert field in str(error)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0, top_p=1, top_k=1, max_tokens=1, seed=0),
        Sampling(temperature=2, top_p=0.001, top_k=1000, max_tokens=8192, seed=2**32 - 1),
        Sampling(stop=("x" * 64,) * 8),
    ],
)
def test_the_ends_of_every_range_are_taken(sampling: Sampling) -> None:
    rules.check_chat(ChatRequest((USER,), sampling=sampling))


@pytest.mark.parametrize(
    ("tools", "field"),
    [
        ((TOOL,) * 2, "tools[1].name"),
        (tuple(replace(TOOL, name=f"f{i}") for i in range(65)), "tools"),
        ((replace(TOOL, name=""),), "tools[0].name"),
        ((replace(TOOL, name="a b"),), "tools[0].name"),
        ((replace(TOOL, name="a\0"),), "tools[0].name"),
        ((replace(TOOL, name="a" * 129),), "tools[0].name"),
        ((replace(TOOL, description="\ud800"),), "tools[0].description"),
        ((replace(TOOL, parameters={}),), "tools[0].parameters_json_schema"),
        ((replace(TOOL, parameters={"type": "string"}),), "tools[0].parameters_json_schema"),
        (
            (replace(TOOL, parameters={"type": "object", "x": deep(40)}),),
            "tools[0].parameters_json_schema",
        ),
        (
            (replace(TOOL, parameters={"type": "object", "\ud800": 1}),),
            "tools[0].parameters_json_schema",
        ),
    ],
)
def test_tools_that_are_wrong_are_refused_with_the_field(tools: tuple[Tool, ...], field: str) -> None:
    assert error_of(tools=tools).field == field


def test_a_required_tool_call_needs_a_tool() -> None:
    assert error_of(tool_choice=ToolChoice.REQUIRED).field == "tool_choice"
    rules.check_chat(ChatRequest((USER,), tools=(TOOL,), tool_choice=ToolChoice.REQUIRED))


def test_a_response_format_excludes_tools() -> None:
    assert error_of(response_schema={}, tools=(TOOL,)).field == "response_format"
    assert error_of(response_schema=deep(33)).field == "response_format.json_schema"
    rules.check_chat(ChatRequest((USER,), response_schema={"type": "object"}))


@pytest.mark.parametrize("alias", ["", "A", "-a", "a b", "a" * 65, "a\0", "ä", "a/b"])
def test_an_alias_that_is_no_name_is_refused(alias: str) -> None:
    assert error_of(alias=alias).field == "alias"


@pytest.mark.parametrize(
    "name", ["m", "m:", ":c", "m:c:d", "../m:c", "m:c/d", "m c:d", "m:c\n", "m" * 128 + ":c", ".:."]
)
def test_a_name_that_is_no_model_version_is_refused(name: str) -> None:
    assert error_of(model_version=name).field == "model_version"


@pytest.mark.parametrize("name", ["gemma-3-270m:base", "m:20260102T030405Z", "a.b_c-d:e.f_g-h"])
def test_model_versions_are_taken(name: str) -> None:
    rules.check_model_version(name)


@pytest.mark.parametrize("value", ["", "a" * 63, "A" * 64, "g" * 64])
def test_what_is_no_sha256_is_refused(value: str) -> None:
    with pytest.raises(InvalidArgument):
        rules.check_sha256(value)


@pytest.mark.parametrize("session", ["x" * 129, "a\0b", "a\nb", "\ud800"])
def test_a_session_id_that_is_no_identifier_is_refused(session: str) -> None:
    assert error_of(session_id=session).field == "session_id"


def test_one_mebibyte_of_text_is_taken_and_one_byte_more_is_not() -> None:
    rules.check_chat(ChatRequest((Message(Role.USER, "é" * (512 * 1024)),)))
    error = error_of(messages=(Message(Role.USER, "é" * (512 * 1024) + "a"),))
    assert "1048577 bytes" in str(error)


def test_text_is_counted_wherever_it_stands() -> None:
    half = "x" * (600 * 1024)
    call = Message(Role.ASSISTANT, tool_calls=(ToolCall("f", {"a": [half]}),))
    assert error_of(messages=(Message(Role.USER, half), call, RESULT)).field == "messages"
    tool = replace(TOOL, description=half, parameters={"type": "object", "description": half})
    assert error_of(tools=(tool,)).field == "messages"


def test_nul_in_a_text_is_taken() -> None:
    rules.check_chat(ChatRequest((Message(Role.USER, "a\0b"),)))


def test_no_error_quotes_a_prompt() -> None:
    secret = "the launch code is 0000"
    wrong: list[dict[str, Any]] = [
        {"messages": (Message(Role.USER, secret), Message(Role.USER, secret))},
        {"messages": (Message(Role.USER, secret), replace(CALLS, content=secret), RESULT)},
        {"messages": (Message(Role.USER, secret + "\ud800"),)},
        {"sampling": Sampling(stop=(secret * 9,))},
    ]
    assert all(secret not in str(error_of(**fields)) for fields in wrong)


def test_scopes_are_needed_to_ask() -> None:
    nobody = Caller("k", "n", frozenset())
    user = Caller("k", "n", frozenset({Scope.INFER}))
    admin = Caller("k", "n", frozenset({Scope.ADMIN}))
    plain, pinned = ChatRequest((USER,)), ChatRequest((USER,), model_version="m:c")
    rules.authorise(user, plain)
    rules.authorise(admin, pinned)
    for caller, request in ((nobody, plain), (user, pinned)):
        with pytest.raises(PermissionDenied):
            rules.authorise(caller, request)


# Feedback

FEEDBACK = Feedback(
    UUID(int=1), UUID(int=2), caller="c", key_id="k", created_at=datetime(2026, 1, 1, tzinfo=UTC)
)


@pytest.mark.parametrize(
    "values",
    [
        {"boolean": False},
        {"score": 0.0},
        {"score": 1.0},
        {"comment": "fine"},
        {"comment": "x" * 65536},
        {"demonstration": ASSISTANT},
        {"demonstration": CALLS},
    ],
)
def test_feedback_with_one_sound_value_is_taken(values: dict[str, Any]) -> None:
    rules.check_feedback(replace(FEEDBACK, **values))


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({}, "value"),
        ({"boolean": True, "score": 1.0}, "value"),
        ({"score": math.nan}, "score"),
        ({"score": math.inf}, "score"),
        ({"score": -math.inf}, "score"),
        ({"score": -0.1}, "score"),
        ({"score": 1.1}, "score"),
        ({"comment": ""}, "comment"),
        ({"comment": "x" * 65537}, "comment"),
        ({"comment": "\ud800"}, "comment"),
        ({"demonstration": USER}, "demonstration.role"),
        ({"demonstration": Message(Role.ASSISTANT)}, "demonstration"),
        ({"demonstration": replace(CALLS, content="too")}, "demonstration"),
        ({"demonstration": replace(ASSISTANT, tool_name="f")}, "demonstration.tool_name"),
        ({"demonstration": Message(Role.ASSISTANT, "x" * (1024 * 1024 + 1))}, "demonstration"),
        (
            {"demonstration": Message(Role.ASSISTANT, tool_calls=(ToolCall("f", deep(40)),))},
            "demonstration.tool_calls[0].arguments_json",
        ),
    ],
)
def test_feedback_that_is_wrong_is_refused_with_the_field(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        rules.check_feedback(replace(FEEDBACK, **values))
    assert caught.value.field == field


# Routes


def target(name: str, role: TargetRole, weight: int) -> Target:
    return Target(name, role, weight)


STABLE = target("m:a", TargetRole.STABLE, 90)
CANARY = target("m:b", TargetRole.CANARY, 10)
SHADOW = target("m:c", TargetRole.SHADOW, 30)


@pytest.mark.parametrize(
    "targets",
    [
        (replace(STABLE, weight=100),),
        (STABLE, CANARY),
        (STABLE, CANARY, SHADOW),
        (replace(STABLE, weight=0), replace(CANARY, weight=100)),
        (replace(STABLE, weight=100), replace(CANARY, weight=0)),
    ],
)
def test_sound_routes_are_taken(targets: tuple[Target, ...]) -> None:
    rules.check_route(Route("default", 1, targets))


@pytest.mark.parametrize(
    "targets",
    [
        (),
        (replace(STABLE, weight=99),),
        (STABLE, replace(CANARY, weight=20)),
        (replace(CANARY, weight=100),),
        (replace(STABLE, weight=50), replace(STABLE, model_version="m:z", weight=50)),
        (
            replace(STABLE, weight=80),
            CANARY,
            replace(CANARY, model_version="m:z"),
        ),
        (STABLE, replace(CANARY, model_version="m:a")),
        (replace(STABLE, weight=101),),
        (STABLE, CANARY, replace(SHADOW, weight=-1)),
        (replace(STABLE, model_version="nonsense", weight=100),),
        tuple(replace(SHADOW, model_version=f"m:{i}") for i in range(9)),
    ],
)
def test_routes_that_are_wrong_are_refused(targets: tuple[Target, ...]) -> None:
    with pytest.raises(InvalidArgument):
        rules.check_route(Route("default", 1, targets))


def test_a_route_needs_a_sound_alias() -> None:
    with pytest.raises(InvalidArgument):
        rules.check_route(Route("No", 1, (replace(STABLE, weight=100),)))


@given(draw=st.floats(0, 1, exclude_max=True), weight=st.integers(0, 100), session=st.text(max_size=8))
def test_a_choice_is_the_same_each_time_and_keeps_to_the_weights(
    draw: float, weight: int, session: str
) -> None:
    route = Route("default", 1, (replace(STABLE, weight=100 - weight), replace(CANARY, weight=weight)))
    chosen = rules.choose_target(route, session, draw)
    assert chosen == rules.choose_target(route, session, draw)
    if session:
        assert chosen == rules.choose_target(route, session, 1 - draw if draw else 0.5)
    if weight in (0, 100):
        assert chosen.role is (TargetRole.CANARY if weight else TargetRole.STABLE)


@given(session=st.text(min_size=1, max_size=8), low=st.integers(0, 100), more=st.integers(0, 100))
def test_raising_the_canarys_weight_takes_no_session_away_from_it(session: str, low: int, more: int) -> None:
    high = min(100, low + more)
    before, after = (
        rules.choose_target(
            Route("default", 1, (replace(STABLE, weight=100 - w), replace(CANARY, weight=w))), session, 0.5
        ).role
        for w in (low, high)
    )
    assert not (before is TargetRole.CANARY and after is TargetRole.STABLE)


def test_sessions_spread_by_weight() -> None:
    route = Route("default", 1, (replace(STABLE, weight=80), replace(CANARY, weight=20)))
    roles = Counter(rules.choose_target(route, f"session {i}", 0.5).role for i in range(5000))
    assert 0.17 < roles[TargetRole.CANARY] / 5000 < 0.23  # 20 %, and five standard deviations


def test_aliases_split_sessions_independently() -> None:
    routes = [
        Route(alias, 1, (replace(STABLE, weight=50), replace(CANARY, weight=50)))
        for alias in ("default", "agent")
    ]
    same = sum(
        rules.choose_target(routes[0], f"s{i}", 0).role is rules.choose_target(routes[1], f"s{i}", 0).role
        for i in range(2000)
    )
    assert 800 < same < 1200


def test_a_single_stable_target_takes_everything_and_shadows_are_never_chosen() -> None:
    route = Route("default", 1, (SHADOW, replace(STABLE, weight=100)))
    assert rules.choose_target(route, "", 0.999).role is TargetRole.STABLE
    assert rules.choose_shadows(route, 0.29) == [SHADOW]
    assert rules.choose_shadows(route, 0.31) == []
