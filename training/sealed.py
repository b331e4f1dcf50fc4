"""The last line of `make learn`: one model version on the sealed items, scored once.

`simple_python` 300-399 are read here, and nowhere else but in `data.make_barred`, which keeps traffic and
training away from them. What is scored is what serves: the version's own GGUF, through the same server,
asked as callers ask, greedily; what is right is said by the leaderboard's own AST checker.

The seal is a folder: `opened.json`, written before the first item is read, says for which version it was
broken, and when; `result.json` has the score. A scoring that was killed goes on for the same version; a
second one is refused, and so is one of another version, because who may try again can choose. Of questions
and answers nothing is left at the end, only which items were right.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grpc_server.domain.plain import message_from_plain, plain
from grpc_server.domain.types import ChatRequest, JsonObject, Message, Sampling, ToolCall
from training import bfcl, cycle, official_checker, suites
from training.asking import Question, ask_all, key
from training.own_server import generator
from training.statistics import wilson
from training.subjects import Place, Subject
from training.watching import Progress, unwatched

CATEGORY = "simple_python"
OPENED, RESULT, ANSWERS = "opened.json", "result.json", "answers"


class SealBrokenError(RuntimeError):
    """The items were scored already, or the seal was broken for another version; the text says which."""


def result(folder: Path) -> dict[str, Any] | None:
    """The score, if it was taken."""
    path = folder / RESULT
    return cycle.read_json(path) if path.is_file() else None


async def score(
    folder: Path,
    subject: Subject,
    place: Place,
    *,
    numbers: range = bfcl.SEALED,
    config: suites.Config | None = None,
    progress: Progress = unwatched,
) -> dict[str, Any]:
    """Score `subject`, once; what `result.json` holds.

    `accuracy` is the share right, with Wilson's 95 % interval `ci_low` to `ci_high`. `numbers` are other
    items where a test or a short run must not touch the sealed ones.

    Raises:
        SealBrokenError: if there is a score, or another version's scoring was begun.
        bfcl.DataNotInstalledError: if the leaderboard is not installed.
        official_checker.CheckerFailedError: if its checker cannot be run.
        own_server.ServerFailedError: if the server for evaluation fails.
    """
    config = config or suites.read_config()
    opened = _open(folder, subject, numbers)
    rows = {row["id"]: row for row in map(json.loads, bfcl.read_lines(CATEGORY, numbers, unsealed=True))}
    accepted = bfcl.read_answers(CATEGORY, numbers, unsealed=True)
    made_by = generator(place.engine)
    questions = [_question(row, accepted[row["id"]][0], subject, made_by, config) for row in rows.values()]
    answers = await ask_all(questions, config, replace(place, state_dir=folder / ANSWERS), progress)
    said = {each.item.id: message_from_plain(answers[each.key]["answer"]) for each in questions}
    right = _right(said, rows, accepted)
    correct, interval = sum(right.values()), wilson(sum(right.values()), len(right))
    found = {
        **opened,
        "scored_at": _now(),
        "checker": f"bfcl-eval {version('bfcl-eval')}, ast_checker",
        "n": len(right),
        "correct": correct,
        "accuracy": correct / len(right),
        "ci_low": interval.low,
        "ci_high": interval.high,
        "correct_by_our_scorer": sum(each.item.is_right(said[each.item.id]) for each in questions),
        "right": sorted(item_id for item_id, is_right in right.items() if is_right),
        "wrong": sorted(item_id for item_id, is_right in right.items() if not is_right),
    }
    cycle.write_json(folder / RESULT, found)
    shutil.rmtree(folder / ANSWERS, ignore_errors=True)
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _open(folder: Path, subject: Subject, numbers: range) -> dict[str, Any]:
    """Break the seal for `subject`, or go on where that was done before."""
    if (before := result(folder)) is not None:
        raise SealBrokenError(
            f"{before['items']} were scored at {before['scored_at']}, for {before['model_version']}:"
            f" {before['accuracy']:.3f}; that stands ({folder / RESULT})"
        )
    items = f"{CATEGORY} {numbers[0]}-{numbers[-1]}"
    path = folder / OPENED
    if not path.is_file():
        cycle.write_json(path, {"items": items, "opened_at": _now(), **subject.who})
    opened = cycle.read_json(path)
    if (opened["sha256"], opened["items"]) != (subject.sha256, items):
        raise SealBrokenError(
            f"the seal was broken at {opened['opened_at']} to score {opened['model_version']} on"
            f" {opened['items']}; only that can go on, not {subject.model_version} on {items}"
        )
    return opened


def _question(
    row: JsonObject,
    accepted: JsonObject,
    subject: Subject,
    made_by: Mapping[str, str],
    config: suites.Config,
) -> Question:
    asked = bfcl.item_of(row, accepted)
    greedy = Sampling(temperature=0.0, max_tokens=config.max_tokens, seed=0)
    request = ChatRequest(asked.messages, tools=asked.tools, sampling=greedy)
    item = suites.Item(asked.id, asked.id, request, lambda answer: bfcl.score(_only_call(answer), asked), "")
    return Question("sealed", item, subject, request, key(subject, request, made_by))


def _only_call(answer: Message) -> ToolCall | None:
    return answer.tool_calls[0] if len(answer.tool_calls) == 1 else None


def _right(
    said: Mapping[str, Message],
    rows: Mapping[str, JsonObject],
    accepted: Mapping[str, Sequence[Mapping[str, JsonObject]]],
) -> dict[str, bool]:
    """By item, whether the answer is one call, and the official checker accepts it."""
    calls = {item_id: call for item_id, answer in said.items() if (call := _only_call(answer))}
    cases: list[official_checker.Case] = [
        (
            rows[item_id]["function"],
            [{call.name: plain(call.arguments)}],
            [dict(each) for each in accepted[item_id]],
            CATEGORY,
        )
        for item_id, call in calls.items()
    ]
    verdicts = dict(zip(calls, official_checker.check(cases), strict=True))
    return {item_id: verdicts.get(item_id) is True for item_id in said}
