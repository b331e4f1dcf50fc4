"""What does a row of the snapshot teach? An example, or the reason why nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpc_server.domain.chat_format import parse_tool_call, render, render_answer
from grpc_server.domain.plain import message_from_plain, raw_prompt, request_from_plain
from grpc_server.domain.types import ChatRequest, Message, Role, ToolChoice
from training import bfcl, cycle
from training.data.make_barred import fingerprint, normalised

COLUMNS = ("inference_id", "session_id", "request_json", "feedback_json")
"""Columns of the snapshot that an example is made of."""


@dataclass(frozen=True, slots=True)
class Example:
    """One demonstration: what was asked, as the model reads it, and what it should write."""

    inference_id: str
    session_id: str
    prompt: str
    completion: str
    request: ChatRequest = field(repr=False)
    demonstration: Message = field(repr=False)


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


def example(row: Mapping[str, Any], barred: Barred, max_characters: int) -> Example | str:
    """What `row` (with COLUMNS) teaches, or the reason, one of `curate.REASONS`, why nothing.

    How the inference ended does not matter: a caller has shown the answer that it should have had. Of several
    demonstrations the latest valid one counts. A prompt and its completion of more than `max_characters`
    together are too long.
    """
    try:
        feedback = json.loads(row["feedback_json"] or "[]")
        shown = [each for each in feedback if each.get("demonstration")]
    except (ValueError, TypeError, AttributeError, RecursionError):
        return "invalid_demonstration"
    if not shown:
        return "no_demonstration"
    try:
        asked = json.loads(row["request_json"])
        if raw_prompt(asked) is not None:  # no conversation: its answer would teach none
            return "raw_prompt"
        request = request_from_plain(asked)
        prompt = render(request.messages, request.tools, request.tool_choice, request.response_schema)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return "invalid_request"
    shown.sort(key=lambda each: (str(each.get("created_at")), str(each.get("id"))), reverse=True)
    answers = (_answer(each["demonstration"], request) for each in shown)
    answer = next((each for each in answers if each is not None), None)
    if answer is None:
        return "invalid_demonstration"
    if request in barred:
        return "barred"
    completion = render_answer(answer)
    if len(prompt) + len(completion) > max_characters:
        return "too_long"
    session_id = str(row["session_id"] or "")
    return Example(str(row["inference_id"]), session_id, prompt, completion, request, answer)


def _answer(demonstration: Any, request: ChatRequest) -> Message | None:
    """The demonstrated answer, if the model can write it and the server would read it as it is meant."""
    try:
        message = message_from_plain(demonstration)
        completion = render_answer(message)
    except (ValueError, TypeError, AttributeError):
        return None
    if message.role is not Role.ASSISTANT:
        return None
    if not message.tool_calls:
        return message if message.content.strip() else None
    offered = () if request.tool_choice is ToolChoice.NONE else request.tools
    return message if parse_tool_call(completion, offered) == message.tool_calls[0] else None
