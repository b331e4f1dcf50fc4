"""A record of the log, text by text: what of it is said by someone, what is structure, and it without a word.

Structure stays as it is: keys, roles, the names of tools, the caller and the session.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from grpc_server.domain.plain import message_from_plain, message_to_plain
from grpc_server.domain.types import Feedback, InferenceEnded, InferenceStarted, LogRecord

LONG_NUMBER = 10**11
"""A whole number of so many digits may be that of a card or an account."""

Change = Callable[[str], str]


def changed(record: LogRecord, change: Change) -> LogRecord:
    """The record with `change` made to each of its texts, in an order that is always the same.

    A long number in a tool's arguments is asked for as text, and stays a number unless it is changed.

    Raises:
        ValueError: if it is nested too deeply, or holds what JSON cannot.
    """
    try:
        match record:
            case InferenceStarted():
                return replace(record, request=_request(record.request, change))
            case InferenceEnded():
                return replace(record, answer=_message(record.answer, change))
            case Feedback():
                return _feedback(record, change)
    except (RecursionError, TypeError, AttributeError) as error:
        raise ValueError(f"a record that JSON cannot hold: {type(error).__name__}") from error
    return record


def without_text(record: LogRecord, digest: Change) -> LogRecord:
    """The record with counts, and a `digest` of all its texts, in their place."""
    texts: list[str] = []

    def taken(text: str) -> str:
        texts.append(text)
        return ""

    match record:
        case InferenceStarted():
            changed(record, taken)
            return replace(record, request=_request_without_text(record.request, texts, digest))
        case InferenceEnded():
            changed(record, taken)
            calls = record.answer.get("tool_calls", ())
            told = _counts(texts, digest) | {"tool_calls": len(calls)}
            return replace(record, answer={**_NO_MESSAGE, "role": "assistant", "withheld": told})
        case Feedback(demonstration=shown) if shown is not None:
            changed(record, taken)
            return replace(
                record, demonstration=message_from_plain({**_NO_MESSAGE, "role": shown.role.value})
            )
    return changed(record, lambda _: "")


_NO_MESSAGE = {"content": "", "tool_calls": [], "tool_name": ""}


def _counts(texts: Sequence[str], digest: Change) -> dict[str, Any]:
    return {"characters": sum(map(len, texts)), "digest": digest("\0".join(texts))}


def _request_without_text(request: Mapping[str, Any], texts: Sequence[str], digest: Change) -> dict[str, Any]:
    """In the form of every request, so that whoever reads one can read this one."""
    messages, tools = request.get("messages", ()), request.get("tools", ())
    return {
        "messages": [{**_NO_MESSAGE, "role": one.get("role", "user")} for one in messages],
        "tools": [],
        "tool_choice": request.get("tool_choice", "auto"),
        "sampling": {**request.get("sampling", {}), "stop": []},
        "response_schema": None,
        "withheld": {**_counts(texts, digest), "messages": len(messages), "tools": len(tools)},
    }


def _request(request: Mapping[str, Any], change: Change) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in request.items():
        match key:
            case "messages":
                found[key] = [_message(one, change) for one in value]
            case "tools":
                found[key] = [_named(one, change) for one in value]
            case "tool_choice":
                found[key] = value
            case _:
                found[key] = _any(value, change)
    return found


def _message(message: Mapping[str, Any], change: Change) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in message.items():
        match key:
            case "role" | "tool_name":
                found[key] = value
            case "tool_calls":
                found[key] = [_named(one, change) for one in value]
            case _:
                found[key] = _any(value, change)
    return found


def _named(value: Mapping[str, Any], change: Change) -> dict[str, Any]:
    """A tool, or a call of one: all but its name."""
    return {key: one if key == "name" else _any(one, change) for key, one in value.items()}


def _any(value: Any, change: Change) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _any(one, change) for key, one in value.items()}
    if isinstance(value, Sequence):
        return [_any(one, change) for one in value]
    if isinstance(value, int) and abs(value) >= LONG_NUMBER:
        text = str(value)
        new = change(text)
        return value if new == text else new
    return value


def _feedback(record: Feedback, change: Change) -> Feedback:
    if record.comment is not None:
        return replace(record, comment=change(record.comment))
    if record.demonstration is not None:
        shown = _message(message_to_plain(record.demonstration), change)
        return replace(record, demonstration=message_from_plain(shown))
    return record
