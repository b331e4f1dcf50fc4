"""Of which model version a caller speaks that calls an answer good or bad, where this server gave it.

The figures that a canary is judged by need the version, and feedback names only the inference. Servers
remember their newest answers for that, and of each the first opinion of its own caller: so nobody brings a
version down by saying the same thing often, or of other callers' answers. Feedback that reaches another
server, or comes later than so many answers, is in the log and not in the figures; that is the same for
every version.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal
from uuid import UUID

from grpc_server.domain.types import Feedback

REMEMBERED = 20_000
"""Answers, of some 400 bytes each."""
MIDDLE = 0.5
"""A score below it is negative, one above it positive."""

Opinion = Literal["negative", "positive", ""]
Answered = tuple[str, str, str]
"""Alias, model version, role."""


def opinion(feedback: Feedback) -> Opinion:
    """What `feedback` says of the answer; empty where it does not say.

    Comments are not read, and a demonstration shows what is right, be the answer wrong or not.
    """
    if feedback.boolean is not None:
        return "positive" if feedback.boolean else "negative"
    if feedback.score is None or feedback.score == MIDDLE:
        return ""
    return "negative" if feedback.score < MIDDLE else "positive"


class RecentAnswers:
    """The newest answers on which nobody has given an opinion yet, at most so many."""

    def __init__(self, most: int = REMEMBERED) -> None:
        self._most = most
        self._answers: OrderedDict[UUID, tuple[str, Answered]] = OrderedDict()

    def add(self, inference_id: UUID, caller: str, answered: Answered) -> None:
        """Remember one, and forget the oldest where they are too many."""
        self._answers[inference_id] = (caller, answered)
        if len(self._answers) > self._most:
            self._answers.popitem(last=False)

    def heard(self, feedback: Feedback) -> tuple[Answered, Opinion] | None:
        """Which answer it is an opinion on; None where it is none, or of an answer that is not remembered."""
        said, remembered = opinion(feedback), self._answers.get(feedback.inference_id)
        if not said or remembered is None or remembered[0] != feedback.caller:
            return None
        del self._answers[feedback.inference_id]
        return remembered[1], said
