"""Which feedback is an opinion, and of which version's answer."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from grpc_server.domain.types import Message, Role
from grpc_server.opinions import RecentAnswers, opinion
from tests import records

ONE, OTHER = UUID(int=1), UUID(int=2)
CANARY = ("default", "m:new", "canary")


def bad(inference_id: UUID = ONE, caller: str = "billing") -> Any:
    return records.feedback(inference_id, boolean=False, caller=caller)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"boolean": True}, "positive"),
        ({"boolean": False}, "negative"),
        ({"score": 0.0}, "negative"),
        ({"score": 0.49}, "negative"),
        ({"score": 0.5}, ""),
        ({"score": 1.0}, "positive"),
        ({"comment": "terrible"}, ""),
        ({"demonstration": Message(Role.ASSISTANT, "It rains.")}, ""),
    ],
)
def test_an_opinion_says_whether_an_answer_was_good(value: dict[str, Any], said: str) -> None:
    assert opinion(records.feedback(ONE, **value)) == said


def test_an_opinion_is_of_the_version_that_answered() -> None:
    answers = RecentAnswers()
    answers.add(ONE, "billing", CANARY)
    assert answers.heard(bad()) == (CANARY, "negative")


def test_of_each_answer_the_first_opinion_counts() -> None:
    answers = RecentAnswers()
    answers.add(ONE, "billing", CANARY)
    assert answers.heard(records.feedback(ONE, comment="hm", caller="billing")) is None
    assert answers.heard(bad()) is not None
    assert answers.heard(bad()) is None


def test_nobody_speaks_of_another_callers_answers_or_of_unknown_ones() -> None:
    answers = RecentAnswers()
    answers.add(ONE, "billing", CANARY)
    assert answers.heard(bad(caller="sales")) is None
    assert answers.heard(bad(OTHER)) is None
    assert answers.heard(bad(OTHER, caller="")) is None
    assert answers.heard(bad()) is not None


def test_the_oldest_answers_are_forgotten() -> None:
    answers = RecentAnswers(most=1)
    answers.add(ONE, "billing", CANARY)
    answers.add(OTHER, "billing", CANARY)
    assert answers.heard(bad(ONE)) is None
    assert answers.heard(bad(OTHER)) is not None
