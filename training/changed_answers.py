"""Which answers changed from right to wrong, or back, with the question and what was expected."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from agentloop.night import Night
from training import bfcl

EXAMPLES = 10
"""Answers that got better, and as many that got worse, are shown."""


@dataclass(frozen=True, slots=True)
class Example:
    """One question, what was said to it, and what should have been; all as text that is not yet escaped."""

    suite: str
    item_id: str
    asked: str
    expected: str
    champion: str
    candidate: str


@dataclass(frozen=True, slots=True)
class Changes:
    """How many answers changed, and the first of them."""

    count: int
    shown: list[Example]


def changed(night: Night, suites: Sequence[str], *, became_right: bool) -> Changes:
    """The questions that only the candidate answered right, or only the champion; `suites` take turns."""
    by_suite = []
    for suite in suites:
        answers: dict[str, dict[str, Any]] = {}
        for line in night.lines(f"evaluation/{suite}.jsonl"):
            if {"item_id", "subject", "correct"} <= line.keys():
                answers.setdefault(str(line["item_id"]), {})[str(line["subject"])] = line
        by_suite.append(
            [
                (suite, item_id, both)
                for item_id, both in sorted(answers.items())
                if "champion" in both
                and "candidate" in both
                and both["candidate"]["correct"] is became_right
                and both["champion"]["correct"] is not became_right
            ]
        )
    turns: list[tuple[str, str, Mapping[str, Any]]] = [
        change for turn in zip_longest(*by_suite) for change in turn if change is not None
    ]
    questions = _questions(night)
    return Changes(len(turns), [_example(*each, questions) for each in turns[:EXAMPLES]])


def _example(
    suite: str, item_id: str, both: Mapping[str, Any], questions: Mapping[str, tuple[str, str]]
) -> Example:
    asked, expected = questions.get(item_id) or _leaderboard(item_id)
    return Example(
        suite=suite.replace("_", " "),
        item_id=item_id,
        asked=asked,
        expected=expected,
        champion=said(both["champion"].get("answer") or {}),
        candidate=said(both["candidate"].get("answer") or {}),
    )


def _questions(night: Night) -> dict[str, tuple[str, str]]:
    """Question and right answer of the cycle's own gate items, by id; what is no item is passed over."""
    found = {}
    for line in night.lines("dataset/gate.jsonl"):
        try:
            asked = str(line["request"]["messages"][-1]["content"])
            found[str(line["inference_id"])] = (shortened(asked), said(line["demonstration"]))
        except (KeyError, TypeError, IndexError, AttributeError):
            continue
    return found


def _leaderboard(item_id: str) -> tuple[str, str]:
    """Question and an accepted answer of an item of the leaderboard; "" where it is not installed."""
    try:
        item = bfcl.item(item_id)
    except (LookupError, OSError, ValueError):
        return "", ""
    call = {"name": item.demonstration.name, "arguments": item.demonstration.arguments}
    return shortened(item.messages[-1].content), said({"content": "", "tool_calls": [call]})


def said(message: Mapping[str, Any]) -> str:
    """An answer in a line: its calls as `name(key=value, …)`, else its text, shortened."""
    calls = [
        f"{call['name']}({', '.join(f'{key}={_value(value)}' for key, value in call['arguments'].items())})"
        for call in message.get("tool_calls", ())
    ]
    return shortened("; ".join(calls) or message.get("content", "")) or "(nothing)"


def shortened(text: str, characters: int = 160) -> str:
    """White space as single spaces, what cannot be printed as �, and no longer than `characters`."""
    plain = "".join(letter if letter.isprintable() else "�" for letter in " ".join(text.split()))
    return plain if len(plain) <= characters else f"{plain[: characters - 1]}…"


def _value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
