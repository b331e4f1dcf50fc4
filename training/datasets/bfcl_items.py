"""The Berkeley Function-Calling Leaderboard: questions, with `possible_answer/<same name>` beside their file.

Only what has one accepted call is taught, by the reader of `training.bfcl`: several calls are no turn of
ours, and a question without a call has no answer to show. Held-out items are not parsed (`reading.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from grpc_server.domain.types import ChatRequest, Message, Role
from training import bfcl
from training.datasets.reading import is_held_out
from training.datasets.shown import Published, Read, Record, Shown

PAGE = "https://gorilla.cs.berkeley.edu/leaderboard.html"
_TYPES = {"object", "array", "string", "integer", "number", "boolean"}


class _Said(Published):
    role: str
    content: str


class _Function(Published):
    name: str
    description: str
    parameters: dict[str, Any]


class _Record(Published):
    id: str
    question: list[list[_Said]] = Field(min_length=1)
    function: list[_Function] | None = None


def recognises(record: Record) -> bool:
    """Whether it has questions in turns of messages."""
    question = record.get("question")
    return isinstance(question, list) and bool(question) and isinstance(question[0], list)


def answers_of(path: Path) -> Path:
    """Where the answers of a file of questions are."""
    return path.parent / "possible_answer" / path.name


def opened(path: Path) -> Read:
    """Reads questions with the answers that lie beside their file; without any, nothing is shown of them.

    Raises:
        ValueError: if the file of answers is not one.
    """
    answers = _answers(answers_of(path))
    return lambda record: shown(record, answers)


def shown(record: Record, answers: Mapping[str, Any]) -> Iterator[Shown | str]:
    """What one question shows, with the accepted answers by id.

    Raises:
        pydantic.ValidationError: naming the field that is not as the leaderboard writes it.
    """
    read = _Record.model_validate(record)
    accepted = answers.get(read.id)
    if not read.function or len(read.question) != 1 or not accepted:
        yield "no_demonstration"
    elif len(accepted) > 1:
        yield "several_calls"
    elif any(_foreign(each.parameters) for each in read.function):
        yield "foreign_types"
    else:
        item = bfcl.item_of(record, accepted[0])
        request = ChatRequest(item.messages, tools=item.tools)
        if bfcl.score(item.demonstration, item):
            yield Shown(read.id, request, Message(Role.ASSISTANT, tool_calls=(item.demonstration,)))
        else:
            yield "invalid_demonstration"


def _foreign(declared: Mapping[str, Any]) -> bool:
    """Whether a parameter has a type that JSON has not, as those of Java and JavaScript do."""
    schema = bfcl.json_schema(declared)
    return any(
        isinstance(each, Mapping) and each.get("type", "string") not in _TYPES
        for each in dict(schema.get("properties", {})).values()
    )


def _answers(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    answers = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip() or is_held_out(line):
                continue
            try:
                answer = _Answer.model_validate(json.loads(line))
            except (ValidationError, ValueError):
                raise ValueError(f"{path}, line {number}: it must be JSON with id and ground_truth") from None
            answers[answer.id] = answer.ground_truth
    return answers


class _Answer(Published):
    id: str
    ground_truth: list[Any]
