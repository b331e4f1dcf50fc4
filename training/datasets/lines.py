"""The line of a set that something shown becomes, or the reason why none."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any
from uuid import UUID

from grpc_server.domain import rules
from grpc_server.domain.chat_format import parse_tool_call, render, render_answer
from grpc_server.domain.errors import InvalidArgument
from grpc_server.domain.plain import message_to_plain, request_to_plain
from grpc_server.domain.types import ChatRequest, Message, Role
from training.datasets import safety
from training.datasets.shown import Shown
from training.examples import Barred
from training.neighbours import question

Line = dict[str, Any]

_NEXT = Message(Role.USER, "?")  # an answer is checked as one that the conversation goes on from


def line_of(shown: Shown, name: str, session: str, barred: Barred) -> Line | str:
    """The line, or the reason: one of `importing.REASONS`, with the rule where the text is hostile.

    Args:
        shown: what a record shows.
        name: of the set.
        session: what to call a record that has no name in its set.
        barred: what is never learned.

    Returns:
        Of a task inference_id, session_id and request; of an example what train.jsonl and gate.jsonl have.
    """
    try:
        rules.check_chat(shown.request)
        prompt = render(shown.request.messages, shown.request.tools)
    except (InvalidArgument, ValueError):
        return "invalid_request"
    completion = "" if shown.answer is None else _completion(shown.request, shown.answer)
    if completion is None:
        return "invalid_demonstration"
    rule = safety.broken(shown)
    if rule is not None:
        return f"hostile: {rule}"
    if shown.request in barred:
        return "barred"
    line: Line = {
        "inference_id": _id(prompt, completion),
        "session_id": _session(name, shown.session or session),
        "request": request_to_plain(shown.request),
    }
    if shown.answer is None:
        return line
    return line | {
        "demonstration": message_to_plain(shown.answer),
        "prompt": prompt,
        "completion": completion,
        "question": question(shown.request),
        "weight": 1.0,
    }


def _completion(request: ChatRequest, answer: Message) -> str | None:
    """What the model must write, if the server would read it as it is meant."""
    try:
        rules.check_chat(replace(request, messages=(*request.messages, answer, _NEXT)))
        completion = render_answer(answer)
    except (InvalidArgument, ValueError):
        return None
    calls = answer.tool_calls
    if calls and parse_tool_call(completion, request.tools) != calls[0]:
        return None
    return completion if calls or answer.content.strip() else None


def _session(name: str, session: str) -> str:
    """What parts of one conversation share; a hash, as sets name conversations by what was asked in them."""
    return hashlib.sha256(f"{name}\0{session}".encode(errors="replace")).hexdigest()[:32]


def _id(prompt: str, completion: str) -> str:
    """An id in the form of the log's, UUIDv7, from what is shown: always the same, and older than the log."""
    digest = hashlib.sha256(f"{prompt}\0{completion}".encode()).digest()
    time = bytes(6)
    rest = bytes([0x70 | digest[0] & 0x0F, digest[1], 0x80 | digest[2] & 0x3F, *digest[3:10]])
    return str(UUID(bytes=time + rest))
