"""The leaderboard's categories whose answer is several calls, or none.

All are asked in evaluation; only `live_irrelevance` is traffic too, in `make learn`, which evaluates on
`irrelevance`.

| category                                                           | right is                            |
|--------------------------------------------------------------------|-------------------------------------|
| parallel, parallel_multiple, live_parallel, live_parallel_multiple | the accepted calls, in any order    |
| irrelevance, live_irrelevance                                      | no call: none of the functions fits |
| live_relevance                                                     | a call, whichever                   |
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from grpc_server.domain.types import JsonObject, Message, Role, Tool, ToolCall
from training import bfcl

Category = Literal[
    "parallel",
    "parallel_multiple",
    "live_parallel",
    "live_parallel_multiple",
    "irrelevance",
    "live_irrelevance",
    "live_relevance",
]
CATEGORIES: tuple[str, ...] = get_args(Category)

NO_CALL = "None of the functions offered fits this."
"""What a caller shows where none fits. Always the same: the gate compares words."""


@dataclass(frozen=True, slots=True)
class CallsItem:
    """One question. `accepted` has an item for each call of the answer; `calls` says what else is right."""

    id: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    accepted: tuple[bfcl.Item, ...]
    calls: Literal["accepted", "none", "any"]

    @property
    def answer(self) -> Message:
        """What a caller shows where no function fits: that in words.

        Raises:
            ValueError: if the right answer is another, which is not one turn.
        """
        if self.calls != "none":
            raise ValueError(f"{self.id} is answered by calls, not in words")
        return Message(Role.ASSISTANT, NO_CALL)


def items(category: str) -> list[CallsItem]:
    """The items of a category, in the published order; those that offer no function are left out.

    Raises:
        ValueError: if the category is none of CATEGORIES.
        bfcl.DataNotInstalledError: if `bfcl_eval` is not installed.
    """
    if category not in CATEGORIES:
        raise ValueError(f"category is {category!r}; it must be one of {', '.join(CATEGORIES)}")
    rows = list(map(json.loads, bfcl.read_lines(category, None)))
    if "relevance" in category:
        calls: Literal["none", "any"] = "none" if "irrelevance" in category else "any"
        return [_item(row, (), calls) for row in rows if row["function"]]
    answers = bfcl.read_answers(category, None)
    return [_item(row, [bfcl.item_of(row, one) for one in answers[row["id"]]], "accepted") for row in rows]


def _item(
    row: JsonObject, accepted: Sequence[bfcl.Item], calls: Literal["accepted", "none", "any"]
) -> CallsItem:
    return CallsItem(
        id=row["id"],
        messages=tuple(Message(Role(turn["role"]), turn["content"]) for turn in row["question"][0]),
        tools=bfcl.tools_of(row),
        accepted=tuple(accepted),
        calls=calls,
    )


def score(calls: Sequence[ToolCall], asked: CallsItem) -> bool:
    """Whether these calls are an accepted answer, in any order: each accepted call has one of its own."""
    if asked.calls != "accepted":
        return bool(calls) is (asked.calls == "any")
    if len(calls) != len(asked.accepted):
        return False
    left = list(calls)
    for one in asked.accepted:
        fits = next((call for call in left if bfcl.score(call, one)), None)
        if fits is None:
            return False
        left.remove(fits)
    return True
