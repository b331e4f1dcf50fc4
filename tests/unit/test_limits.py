"""Limits as plain JSON: what is read is what was written, and a wrong word is never "no limit"."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpc_server.domain.errors import PermissionDenied
from grpc_server.domain.limits import MAX_AMOUNT, limits_from_plain, limits_to_plain
from grpc_server.domain.rules import authorise, estimated_tokens
from grpc_server.domain.types import Caller, ChatRequest, Limits, Message, Role, Scope

amounts = st.none() | st.integers(1, MAX_AMOUNT)
aliases = st.none() | st.frozensets(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True), min_size=1)
limits = st.builds(Limits, amounts, amounts, amounts, aliases)


@given(limits=limits)
def test_limits_survive_plain_json(limits: Limits) -> None:
    assert limits_from_plain(limits_to_plain(limits)) == limits


@given(limits=limits)
def test_what_is_not_named_stays_and_null_lifts(limits: Limits) -> None:
    assert limits_from_plain({}, limits) == limits
    lifted = limits_from_plain(dict.fromkeys(limits_to_plain(limits)), limits)
    assert lifted == Limits()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "limits must be an object"),
        ("unlimited", "limits must be an object"),
        ({"request_per_minute": 5}, "'request_per_minute' is no limit; there are: requests_per_minute"),
        ({"requests_per_minute": 0}, "requests_per_minute must be a whole number from 1"),
        ({"requests_per_minute": -1}, "requests_per_minute must be"),
        ({"requests_per_minute": True}, "requests_per_minute must be"),
        ({"requests_per_minute": "5"}, "requests_per_minute must be"),
        ({"tokens_per_minute": 1.5}, "tokens_per_minute must be"),
        ({"concurrent_streams": MAX_AMOUNT + 1}, "concurrent_streams must be"),
        ({"aliases": []}, "aliases must be a list of 1 to 64"),
        ({"aliases": "default"}, "aliases must be a list"),
        ({"aliases": ["a"] * 65}, "aliases must be a list of 1 to 64"),
        ({"aliases": [7]}, "aliases must be a list of texts"),
        ({"aliases": ["Default"]}, "it must be 1 to 64 of a-z"),
    ],
)
def test_what_is_no_limit_is_named(value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=r"limit|must be") as refused:
        limits_from_plain(value)
    assert says in str(refused.value)


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest((Message(Role.USER, fields.pop("content", "Hi")),), **fields)


def test_a_caller_may_name_its_aliases_and_nothing_else() -> None:
    caller = Caller("k", "n", frozenset({Scope.ADMIN}), limits=Limits(aliases=frozenset({"agent", "small"})))
    authorise(caller, chat(alias="agent"))
    with pytest.raises(PermissionDenied, match="may not ask the alias 'default', only: agent, small"):
        authorise(caller, chat())
    with pytest.raises(PermissionDenied, match="may not ask a model_version"):
        authorise(caller, chat(alias="agent", model_version="m:base"))
    authorise(Caller("k", "n", frozenset({Scope.INFER})), chat())


@pytest.mark.parametrize(
    ("content", "tokens"), [("a", 1), ("abcde", 2), ("é" * 400, 200), ("x" * 4000, 1000)]
)
def test_a_prompts_tokens_are_estimated_from_its_bytes(content: str, tokens: int) -> None:
    assert estimated_tokens(chat(content=content)) == tokens
