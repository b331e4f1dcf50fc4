"""What stands in for engines: every question of an evaluation is answered by the models' files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from benchmarks.year import model
from benchmarks.year.model import CONSTRAINED, Model
from grpc_server.domain.plain import message_to_plain
from grpc_server.domain.types import Message, Role
from training import bfcl, regressions
from training.asking import Answer, Question
from training.subjects import Place
from training.suites import Config
from training.watching import Progress

_AT_A_LOSS = message_to_plain(Message(Role.ASSISTANT, "I do not know."))


class Answers:
    """Answers to the questions of one cycle's evaluation; `ask` is what `training.evaluate.run` calls.

    `wrong` are the ids of inferences whose demonstration is wrong: to match it, a model must have learned
    from what is wrong.
    """

    def __init__(self, directory: Path, wrong: AbstractSet[str]) -> None:
        self._wrong = wrong
        self._shown: dict[str, Mapping[str, Any]] = {
            item.id: message_to_plain(Message(Role.ASSISTANT, tool_calls=(item.demonstration,)))
            for item in bfcl.evaluation_items()
        }
        self._callers = frozenset[str]()
        for path in (directory / "dataset" / "gate.jsonl", regressions.before(directory)):
            for line in _lines(path):
                self._shown[line["inference_id"]] = line["demonstration"]
                self._callers |= {line["inference_id"]}

    async def ask(
        self, questions: Sequence[Question], config: Config, place: Place, progress: Progress
    ) -> dict[str, Answer]:
        """By the key of each question, its answer."""
        del config, place
        models = {gguf: model.read(gguf) for gguf in {question.subject.gguf for question in questions}}
        answers = {
            question.key: self._answer(question, models[question.subject.gguf]) for question in questions
        }
        progress(len(answers), len(answers))
        return answers

    def _answer(self, question: Question, asked: Model) -> Answer:
        item = question.item.id
        cut = asked.right(f"the end of {item}", asked.cut)
        if question.subject.name == "base_constrained":
            cut, right = False, asked.right(item, CONSTRAINED)
        else:
            right = not cut and asked.right(item, self._chance(item, asked))
        return {
            "key": question.key,
            "finish_reason": "length" if cut else "stop",
            "output_tokens": 64 if cut else 24,
            "latency_ms": 400.0,
            "answer": self._shown[item] if right else _AT_A_LOSS,
        }

    def _chance(self, item: str, asked: Model) -> float:
        if item not in self._callers:
            return asked.target
        if item in self._wrong:
            return asked.wrong
        calls = self._shown[item]["tool_calls"]
        return asked.tools.get(calls[0]["name"] if calls else "", asked.untaught)


def _lines(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
