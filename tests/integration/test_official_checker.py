"""Our scorer and the leaderboard's own AST checker: they agree on right answers, and on all ways to be wrong.

Items of `simple_python` 300-399 are sealed: nothing here reads them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import pytest

from grpc_server.domain.types import ToolCall
from training import bfcl, bfcl_calls, official_checker

CATEGORIES = ("simple_python", "multiple", "live_simple", "live_multiple")
PARALLEL = ("parallel", "parallel_multiple", "live_parallel", "live_parallel_multiple")
AGREEMENT = 0.995
Call = dict[str, Any]

# What a value may turn into: of another type, of another value, of the same in other words.
VALUES: Sequence[Callable[[Any], Any]] = (
    str,
    lambda value: [value],
    lambda value: {"value": value},
    lambda value: None,
    lambda value: True,
    lambda value: value + 1 if isinstance(value, int | float) else f"{value} or so",
    lambda value: float(value) if isinstance(value, int) else value,
    lambda value: f" {value.upper()}, " if isinstance(value, str) else value,
    lambda value: value[:-1] if isinstance(value, list) else value,
    lambda value: list(reversed(value)) if isinstance(value, list) else value,
    lambda value: {**value, "extra": 1} if isinstance(value, dict) else value,
    lambda value: dict(list(value.items())[1:]) if isinstance(value, dict) else value,
)


def variants(call: ToolCall, item: bfcl.Item, draw: random.Random) -> Iterator[Call]:
    """The accepted call, and calls that differ from it in name, in arguments, or in one value."""
    arguments = dict(json.loads(json.dumps(call.arguments)))
    yield {call.name: arguments}
    yield {f"{call.name}x": arguments}
    yield {draw.choice(item.tools).name: arguments}
    yield {call.name: arguments | {"unheard_of": 1}}
    yield {call.name: {}}
    for name in arguments:
        yield {call.name: {key: value for key, value in arguments.items() if key != name}}
    for name, accepted in item.answers.items():
        other = draw.choice(accepted or [""])
        yield {call.name: arguments | {name: deepcopy(other)}}
    for change in VALUES:
        if arguments:
            name = draw.choice(sorted(arguments))
            yield {call.name: arguments | {name: change(arguments[name])}}


def published(category: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Question lines and accepted calls as they are published, without the sealed."""
    numbers = range(300) if category == "simple_python" else None
    rows = {row["id"]: row for row in map(json.loads, bfcl.read_lines(category, numbers))}
    return rows, bfcl.read_answers(category, numbers)


def items(category: str) -> list[bfcl.Item]:
    evaluated = bfcl.evaluation_items() if category == "simple_python" else []
    return bfcl.items(category) + evaluated


# Some of them always, all of them in `make soak`.
SOME_OR_ALL = pytest.mark.parametrize("at_most", [30, pytest.param(5000, marks=pytest.mark.soak)])


@SOME_OR_ALL
@pytest.mark.parametrize("category", CATEGORIES)
def test_a_call_is_right_for_us_when_it_is_for_the_official_checker(category: str, at_most: int) -> None:
    draw = random.Random(7)
    rows, accepted = published(category)
    cases, ours = [], []
    found = items(category)
    for item in draw.sample(found, min(at_most, len(found))):
        for calls in variants(item.demonstration, item, draw):
            ((name, arguments),) = calls.items()
            cases.append((rows[item.id]["function"], [calls], list(accepted[item.id]), category))
            ours.append((item.id, bfcl.score(ToolCall(name, arguments), item)))
    theirs = official_checker.check(cases)
    assert len(theirs) == len(ours) > 15 * min(at_most, len(found))
    by_item: dict[str, bool] = {}
    for (item_id, right), official in zip(ours, theirs, strict=True):
        by_item[item_id] = by_item.get(item_id, True) and right is (official is True)
    differ = [item_id for item_id, agree in by_item.items() if not agree]
    assert len(differ) <= (1 - AGREEMENT) * len(by_item), differ
    share_right = sum(right for _, right in ours) / len(ours)
    assert 0.05 < share_right < 0.6, "right and wrong answers are both asked"


@SOME_OR_ALL
@pytest.mark.parametrize("category", PARALLEL)
def test_several_calls_are_right_for_us_when_they_are_for_the_official_checker(
    category: str, at_most: int
) -> None:
    draw = random.Random(7)
    rows, accepted = published(category)
    cases, ours = [], []
    found = bfcl_calls.items(category)
    for asked in draw.sample(found, min(at_most, len(found))):
        right = [each.demonstration for each in asked.accepted]
        answers = [right, right[::-1], right[:-1], [*right, right[0]], [right[0]] * len(right), []]
        for calls in [
            *([{call.name: dict(call.arguments)} for call in each] for each in answers),
            *(
                [changed, *({call.name: dict(call.arguments)} for call in right[1:])]
                for changed in variants(right[0], asked.accepted[0], draw)
            ),
        ]:
            cases.append((rows[asked.id]["function"], calls, list(accepted[asked.id]), category))
            given = [ToolCall(name, arguments) for call in calls for name, arguments in call.items()]
            ours.append((asked.id, bfcl_calls.score(given, asked)))
    theirs = official_checker.check(cases)
    agree = sum(right is (official is True) for (_, right), official in zip(ours, theirs, strict=True)) / len(
        ours
    )
    assert agree >= AGREEMENT


def test_where_no_function_fits_any_call_is_wrong_and_where_one_does_none_is() -> None:
    call = ToolCall("anything", {})
    for category in ("irrelevance", "live_irrelevance"):
        found = bfcl_calls.items(category)
        assert len(found) > 200
        assert all(bfcl_calls.score([], asked) and not bfcl_calls.score([call], asked) for asked in found)
        assert all(asked.tools for asked in found)
    relevant = bfcl_calls.items("live_relevance")
    assert all(bfcl_calls.score([call], asked) and not bfcl_calls.score([], asked) for asked in relevant)


def test_a_category_that_is_trained_on_is_not_evaluated() -> None:
    with pytest.raises(ValueError, match="category is 'multiple'"):
        bfcl_calls.items("multiple")


def test_a_checker_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(official_checker, "_PROGRAM", "raise SystemExit('no such checker')")
    with pytest.raises(official_checker.CheckerFailedError, match="no such checker"):
        official_checker.check([])
