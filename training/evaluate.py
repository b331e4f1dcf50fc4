"""How good are champion and candidate? Asks both the same questions, through a server of their own.

Who is asked: the champion (stable target of the live server's route `default`, or, where that is this cycle's
candidate already, whom it replaced), the candidate (this cycle's model.gguf), of all that ever served the one
that was best on a suite, where that is not the champion, and, on the target suite, the untouched base, shown
examples and held to the schema. All answer greedily. What is measured is what will serve: the same program,
engine and renderer.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from grpc_server.domain.plain import message_from_plain
from training import bfcl, cycle, measures, regressions, suites
from training.asking import Answer, Question, ask_all, key
from training.own_server import generator
from training.statistics import wilson
from training.subjects import Place, Subject, UnknownModelError, best, candidate, serving, subjects
from training.suites import Config, Item, Suite
from training.watching import Progress, unwatched

T = TypeVar("T")
Asking = Callable[[Sequence[Question], Config, Place, Progress], Coroutine[Any, Any, dict[str, Answer]]]


def run(
    directory: Path,
    place: Place,
    *,
    config_file: Path = suites.CONFIG,
    champion: str | None = None,
    progress: Progress = unwatched,
    ask: Asking = ask_all,
) -> dict[str, Any]:
    """Write `<cycle>/evaluation/`, unless it is there of the same inputs; return its summary.

    `champion` names a model version instead of asking the live server which one serves; `ask` is what gets
    the answers.

    Raises:
        FileNotFoundError: if the cycle has no model.gguf or no dataset.
        UnknownModelError: if the champion's GGUF cannot be found, or nothing says whom a candidate that
            serves already replaced.
        agentloop.AgentLoopError: if the live server does not answer.
        own_server.ServerFailedError: if the server for evaluation fails.
    """
    config = suites.read_config(config_file)
    few_shot = [bfcl.item(item_id) for item_id in config.few_shot]
    name, sha256 = _serving(directory, place) if champion is None else (champion, "")
    asked = subjects(directory, place, few_shot, name, sha256)
    gate_file = directory / "dataset" / "gate.jsonl"
    failed = regressions.before(directory)
    found = {suite: suites.items(suite, gate_file, config.max_tokens, failed) for suite in config.suites}
    ever = {
        suite.name: best(directory, place, suite.name, asked[0])
        for suite in config.suites
        if "best_ever" in suite.subjects
    }
    who: dict[str, Any] = {subject.name: subject.who for subject in asked}
    who["best_ever"] = {suite: subject.who for suite, subject in ever.items()}
    inputs = {
        "subjects": who,
        "suites": {suite.name: suites.sha256(items) for suite, items in found.items()},
        "options": {"engine": place.engine, "config": config.model_dump(mode="json")},
    }
    output = directory / "evaluation"
    if not cycle.done(output / "evaluation.json", inputs):
        packages = ("xllamacpp",) if place.engine == "embedded" else ()
        with cycle.step(directory, "evaluate", seed=0, packages=packages, outputs=["evaluation"]):
            questions = list(_questions(found, asked, ever, generator(place.engine)))
            answers = asyncio.run(until_stopped(ask(questions, config, place, progress)))
            rows = {
                suite.name: [_row(q, answers[q.key]) for q in questions if q.suite == suite.name]
                for suite in config.suites
            }
            measured = measures.measure(asked, config.measures) if config.measures else {}
            _write(output, rows, {**who, "measures": measured, "inputs": inputs})
    return cycle.read_json(output / "summary.json")


def _serving(directory: Path, place: Place) -> tuple[str, str]:
    """The champion and the sha256 of its GGUF: what serves, but never this cycle's own candidate.

    A cycle that is gone on with after its candidate was promoted would else judge it against itself.
    """
    name, sha256 = asyncio.run(serving(place))
    if name != candidate(directory, place):
        return name, sha256
    for record in (directory / "evaluation" / "evaluation.json", directory / "gate.json"):
        before = cycle.read_json(record)["champion"] if record.is_file() else {}
        if before.get("model_version", name) != name:
            return before["model_version"], before["sha256"]
    raise UnknownModelError(
        f"{name}, the candidate of this very cycle, serves, and neither evaluation/evaluation.json nor"
        " gate.json says whom it replaced; name that version with --champion"
    )


def _questions(
    found: Mapping[Suite, Sequence[Item]],
    asked: Sequence[Subject],
    ever: Mapping[str, Subject],
    made_by: Mapping[str, str],
) -> Iterator[Question]:
    """What each is asked; the best ever only where it is not the champion, whose answers are its own then."""
    champion = asked[0]
    for suite, items in found.items():
        third = ever.get(suite.name, champion)
        for subject in (*asked, *([] if third.sha256 == champion.sha256 else [third])):
            if subject.name in suite.subjects:
                for item in items:
                    request = subject.prepare(item.request)
                    yield Question(suite.name, item, subject, request, key(subject, request, made_by))


async def until_stopped(work: Coroutine[Any, Any, T]) -> T:
    """The work's result; on SIGTERM the work is cancelled, and so puts away what it started."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


def _write(output: Path, rows: Mapping[str, Sequence[Mapping[str, Any]]], about: Mapping[str, Any]) -> None:
    with cycle.new_directory(output) as building:
        for suite, lines in rows.items():
            with (building / f"{suite}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines)
        cycle.write_json(building / "summary.json", {suite: summary(lines) for suite, lines in rows.items()})
        cycle.write_json(building / "evaluation.json", about)


def _row(question: Question, answer: Answer) -> dict[str, Any]:
    return {
        "item_id": question.item.id,
        "subject": question.subject.name,
        "model_version": question.subject.model_version,
        "model_sha256": question.subject.sha256,
        "session_id": question.item.session_id,
        "correct": question.item.is_right(message_from_plain(answer["answer"])),
        "finish_reason": answer["finish_reason"],
        "output_tokens": answer["output_tokens"],
        "latency_ms": answer["latency_ms"],
        "answer": answer["answer"],
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By subject: n, correct, accuracy with Wilson's 95 % interval, share of answers cut by max_tokens."""
    found = {}
    for subject in dict.fromkeys(row["subject"] for row in rows):
        own = [row for row in rows if row["subject"] == subject]
        correct = sum(row["correct"] for row in own)
        interval = wilson(correct, len(own))
        found[subject] = {
            "n": len(own),
            "correct": correct,
            "accuracy": correct / len(own),
            "ci_low": interval.low,
            "ci_high": interval.high,
            "length_share": sum(row["finish_reason"] == "length" for row in own) / len(own),
        }
    return found
