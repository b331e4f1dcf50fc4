"""What is wrong in a row's request, answer and feedback, as counts.

What a row would teach, its demonstrations if it has any and else its answer, is held to more than the rest:
an answer that a caller has corrected may be as wrong as it likes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec

from grpc_server.domain.plain import message_from_plain, raw_prompt, request_from_plain, texts_in
from grpc_server.domain.types import ChatRequest, Message, Role, Status, Tool, ToolCall
from grpc_server.guard.hostile import Kind, Matcher
from grpc_server.guard.private_text import Finder
from validation.sized_cache import SizedCache
from validation.time_limit import within
from validation.tool_schemas import Arguments, arguments_of
from validation.turns import turns_out_of_order

HOSTILE = {kind: f"hostile_{kind}" for kind in Kind}
"""The feature that counts each kind of hostile text."""

CONTENT = (
    "unreadable_json",
    "inconsistent_tokens",
    "missing_prompt",
    "missing_answer",
    "unprintable_characters",
    "turns_out_of_order",
    "invalid_tools",
    "invalid_tool_calls",
    "invalid_demonstrations",
    "invalid_feedback",
    "secrets",
    *HOSTILE.values(),
    "unscanned_text",
)

_VALUES = ("boolean", "score", "comment", "demonstration")
# Control characters but tab, line feed and carriage return; lone surrogates; Unicode's noncharacters of the
# first plane.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
# The same of ASCII: what is left when the good characters are taken out, five times as fast.
_GOOD_ASCII = bytes(each for each in range(128) if not _UNPRINTABLE.match(chr(each)))
# Engines count an end-of-turn token or do not.
_UNCOUNTED_TOKENS = 1
# A text of 1 MiB takes 2 s of processor time (measured); short ones are not timed.
_SCAN_SECONDS = 10.0
_LONG_CHARACTERS = 16 << 10
_CACHE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Offered:
    """The tools of a request, read once: what is wrong with them, and what each of them allows."""

    tools: tuple[Tool, ...]
    allowed: Mapping[str, Arguments | None]
    wrong: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Content:
    """A row that could be read. `taught`: its demonstrations, or else its answer."""

    prompt: str | None
    request: ChatRequest
    offered: Offered
    answer: Message
    demonstrations: tuple[Message, ...]
    feedback: Sequence[Mapping[str, Any]]

    @property
    def taught(self) -> tuple[Message, ...]:
        """What is learned, if anything is."""
        return self.demonstrations or (self.answer,)


def read(request_json: str, answer_json: str | None, feedback_json: str | None) -> Content | None:
    """The content of a row; None if it has not the log's form. The request comes without its tools."""
    try:
        asked, offered = _asked(request_json)
        feedback = _decoded(feedback_json or "[]")
        return Content(
            raw_prompt(asked),
            request_from_plain(asked),
            offered,
            message_from_plain({"role": "assistant"} | _decoded(answer_json or "{}")),
            tuple(
                message_from_plain(each["demonstration"])
                for each in feedback
                if each["demonstration"] is not None
            ),
            feedback,
        )
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError):
        return None


def wrong(found: Content, status: str | None, read: int | None, written: int | None) -> dict[str, int]:
    """What is wrong in a row that could be read, by feature; what is not named is 0.

    `read` and `written` are its tokens.
    """
    counts: dict[str, int] = {}
    answered = status == Status.OK.value
    if _tokens_are_inconsistent(found, answered, read, written):
        counts["inconsistent_tokens"] = 1
    if answered and not any(map(says_something, found.taught)):
        counts["missing_answer"] = 1
    if found.feedback:
        counts["invalid_feedback"] = sum(
            sum(each.get(value) is not None for value in _VALUES) != 1 for each in found.feedback
        )
    if (
        found.prompt is not None
    ):  # a raw prompt has no turns and no tools, and curation learns nothing from it
        counts["missing_prompt"] = int(not found.prompt)
        return counts
    messages = found.request.messages
    if not any(each.role is Role.USER and _has_text(each) for each in messages):
        counts["missing_prompt"] = 1
    counts["turns_out_of_order"] = turns_out_of_order(messages)
    for feature, count in found.offered.wrong.items():
        counts[feature] = count
    for feature, count in scanned(_texts((*messages, *found.taught), found.offered.allowed)).items():
        counts[feature] = counts.get(feature, 0) + count
    if not found.offered.wrong.get("invalid_tools"):
        allowed = found.offered.allowed
        if answered and not found.demonstrations:
            counts["invalid_tool_calls"] = _invalid_calls(found.answer.tool_calls, allowed)
        counts["invalid_demonstrations"] = sum(
            not _demonstration_is_valid(each, allowed) for each in found.demonstrations
        )
    return counts


def scanned(texts: Iterable[str]) -> dict[str, int]:
    """What no text that is learned may hold, by feature: unprintable characters, secrets, hostile text."""
    text = "\n".join(filter(None, texts))
    if len(text) < _LONG_CHARACTERS:
        return _scanned(text)
    try:
        with within(_SCAN_SECONDS):
            return _scanned(text)
    except TimeoutError:
        return {"unscanned_text": 1}


def _scanned(text: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    if unprintable := _unprintable(text):
        counts["unprintable_characters"] = unprintable
    if secrets := sum(1 for _ in _finder().secrets(text)):
        counts["secrets"] = secrets
    for rule in _matcher().find(text):
        feature = HOSTILE[rule.kind]
        counts[feature] = counts.get(feature, 0) + 1
    return counts


def _unprintable(text: str) -> int:
    if text.isascii():
        return len(text.encode().translate(None, _GOOD_ASCII))
    return len(_UNPRINTABLE.findall(text))


# Read when first needed: they take half a second, and not everybody who imports this judges a row.
_finder = cache(Finder)
_matcher = cache(Matcher)


def _decoded(text: str) -> Any:
    """What `json.loads` gives, twice as fast; what msgspec does not take (NaN, lone surrogates) by it."""
    try:
        return msgspec.json.decode(text)
    except msgspec.MsgspecError:
        return json.loads(text)


_PIECES = msgspec.json.Decoder(dict[str, msgspec.Raw])


def _asked(request_json: str) -> tuple[dict[str, Any], Offered]:
    """A plain request without its tools, and its tools."""
    try:
        pieces = _PIECES.decode(request_json)
        tools = bytes(pieces.pop("tools", b"[]"))
        return {name: msgspec.json.decode(piece) for name, piece in pieces.items()}, _offered(tools)
    except msgspec.MsgspecError:
        asked = json.loads(request_json)
        return asked, _offered(json.dumps(asked.pop("tools", [])).encode())


def _offer(tools_json: bytes) -> Offered:
    tools = request_from_plain({"messages": (), "tools": _decoded(tools_json.decode())}).tools
    allowed: dict[str, Arguments | None] = {}
    invalid = 0
    for tool in tools:
        arguments = arguments_of(tool.parameters)
        invalid += tool.name in allowed or not tool.name or arguments is None
        allowed.setdefault(tool.name, arguments)
    counts = scanned(text for tool in tools for text in _tool_texts(tool))
    return Offered(tools, allowed, counts | ({"invalid_tools": invalid} if invalid else {}))


_offered = SizedCache(_offer, _CACHE_BYTES)


def _tokens_are_inconsistent(found: Content, answered: bool, read: int | None, written: int | None) -> bool:
    """Counts below zero, more than was allowed, or none for an answer that says something."""
    if read is None or written is None or read < 0 or written < 0:
        return True
    if written > found.request.sampling.max_tokens + _UNCOUNTED_TOKENS:
        return True
    return answered and (read == 0 or (written == 0 and says_something(found.answer)))


def _has_text(message: Message) -> bool:
    return bool(message.content.strip())


def says_something(message: Message) -> bool:
    """Whether it holds text or a call."""
    return bool(message.tool_calls) or _has_text(message)


def _texts(messages: Iterable[Message], known: Container[str]) -> Iterable[str]:
    """Every text that messages are rendered from, but the names of tools that are known."""
    for message in messages:
        yield message.content
        if message.tool_name not in known:
            yield message.tool_name
        for call in message.tool_calls:
            if call.name not in known:
                yield call.name
            yield from texts_in(call.arguments)


def _tool_texts(tool: Tool) -> Iterable[str]:
    yield tool.name
    yield tool.description
    yield from texts_in(tool.parameters)


def _invalid_calls(calls: Sequence[ToolCall], allowed: Mapping[str, Arguments | None]) -> int:
    """How many calls name a tool that was not offered, or have arguments that its schema does not allow."""
    wrong = 0
    for call in calls:
        arguments = allowed.get(call.name)
        wrong += arguments is None or not arguments.allow(call.arguments)
    return wrong


def _demonstration_is_valid(message: Message, allowed: Mapping[str, Arguments | None]) -> bool:
    """An assistant's turn that says something, every call of it one of the tools', by their schemas."""
    return (
        message.role is Role.ASSISTANT
        and says_something(message)
        and _invalid_calls(message.tool_calls, allowed) == 0
    )
