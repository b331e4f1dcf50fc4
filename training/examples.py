"""What does a row of the snapshot teach? An example, or the reason why nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from grpc_server.domain.chat_format import parse_tool_call, render, render_answer
from grpc_server.domain.plain import message_from_plain, raw_prompt, request_from_plain
from grpc_server.domain.types import ChatRequest, FinishReason, Message, Role, Status, ToolChoice
from training import bfcl, cycle
from training.data.make_barred import fingerprint, normalised

COLUMNS = (
    "inference_id",
    "caller",
    "session_id",
    "request_json",
    "answer_json",
    "status",
    "finish_reason",
    "feedback_json",
)
"""Columns of the snapshot that an example is made of."""

Source = Literal["demonstrated", "accepted"]


@dataclass(frozen=True, slots=True)
class Example:
    """What was asked, as the model reads it, and what it should write; `caller` is who said so."""

    inference_id: str
    caller: str
    session_id: str
    source: Source
    prompt: str
    completion: str
    request: ChatRequest = field(repr=False)
    answer: Message = field(repr=False)


@dataclass(frozen=True, slots=True)
class Barred:
    """Fingerprints of the questions and functions that nothing may be trained on."""

    questions: frozenset[str]
    functions: frozenset[str]

    def __contains__(self, request: ChatRequest) -> bool:
        said = [[{"role": each.role.value, "content": each.content} for each in request.messages]]
        return fingerprint(normalised(said)) in self.questions or any(
            fingerprint(tool.name) in self.functions for tool in request.tools
        )


def read_barred(path: Path = bfcl.BARRED_FILE) -> Barred:
    """The fingerprints in `data/barred.json`."""
    known = cycle.read_json(path)["fingerprints"]
    return Barred(frozenset(known["questions"]), frozenset(known["functions"]))


def example(
    row: Mapping[str, Any], barred: Barred, max_characters: int, accepted_score: float
) -> Example | str:
    """What `row` (with COLUMNS) teaches, or the reason, one of `curation_record.REASONS`, why nothing.

    A demonstration teaches however the inference ended; of several the latest valid one counts. Without any,
    the model's own answer does, if it came to its end and each caller who judged it accepted it at last: by
    true, or a score of `accepted_score` or more. A prompt and its completion of more than `max_characters`
    together are too long.
    """
    try:
        feedback = sorted(json.loads(row["feedback_json"] or "[]"), key=_said_at)
        shown = [each for each in feedback if each.get("demonstration")]
        judged = _judged(feedback, accepted_score)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return "invalid_demonstration"
    if not shown and not judged:
        return "no_demonstration"
    if not shown and not all(judged.values()):
        return "rejected"
    try:
        asked = json.loads(row["request_json"])
        if raw_prompt(asked) is not None:  # no conversation: its answer would teach none
            return "raw_prompt"
        request = request_from_plain(asked)
        prompt = render(request.messages, request.tools, request.tool_choice, request.response_schema)
        prompt.encode()  # half a character (a lone surrogate) could not be written
    except (ValueError, TypeError, AttributeError, RecursionError):
        return "invalid_request"
    caller, answer = _demonstrated(shown, request) if shown else _liked(row, list(judged), request)
    if answer is None:
        return "invalid_demonstration" if shown else "invalid_answer"
    if request in barred:
        return "barred"
    completion = render_answer(answer)
    if len(prompt) + len(completion) > max_characters:
        return "too_long"
    return Example(
        inference_id=str(row["inference_id"]),
        caller=caller or str(row["caller"] or ""),
        session_id=str(row["session_id"] or ""),
        source="demonstrated" if shown else "accepted",
        prompt=prompt,
        completion=completion,
        request=request,
        answer=answer,
    )


def _said_at(feedback: Mapping[str, Any]) -> tuple[str, str]:
    return str(feedback.get("created_at")), str(feedback.get("id"))


def _judged(feedback: Sequence[Mapping[str, Any]], accepted_score: float) -> dict[str, bool]:
    """Whether each caller who judged the answer has, at last, accepted it."""
    judged = {}
    for each in feedback:
        caller = str(each.get("caller") or "")
        if isinstance(each.get("boolean"), bool):
            judged[caller] = each["boolean"]
        elif isinstance(each.get("score"), int | float):
            judged[caller] = each["score"] >= accepted_score
    return judged


def _demonstrated(shown: Sequence[Mapping[str, Any]], request: ChatRequest) -> tuple[str, Message | None]:
    """Who showed the latest valid demonstration, and what it is."""
    for each in reversed(shown):
        answer = _answer(each["demonstration"], request)
        if answer is not None:
            return str(each.get("caller") or ""), answer
    return "", None


def _liked(
    row: Mapping[str, Any], callers: Sequence[str], request: ChatRequest
) -> tuple[str, Message | None]:
    """Who accepted the model's own answer, and what it is, if it came to its end."""
    ended = row["status"] == Status.OK and row["finish_reason"] in (
        FinishReason.STOP,
        FinishReason.TOOL_CALLS,
    )
    try:
        said = json.loads(row["answer_json"] or "{}") if ended else None
    except (ValueError, RecursionError):
        said = None
    return callers[0], _answer(said, request)


def _answer(said: Any, request: ChatRequest) -> Message | None:
    """An answer, if the model can write it and the server would read it as it is meant."""
    try:
        message = message_from_plain(said)
        completion = render_answer(message)
        completion.encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    if message.role is not Role.ASSISTANT:
        return None
    if not message.tool_calls:
        return message if message.content.strip() else None
    offered = () if request.tool_choice is ToolChoice.NONE else request.tools
    return message if parse_tool_call(completion, offered) == message.tool_calls[0] else None
