"""The one schema: what was asked, and the answer that it should have had. Every format is read into it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from grpc_server.domain.types import ChatRequest, JsonObject, Message, Role, Tool

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Shown:
    """A request with its answer, or, of a task that nobody has solved, with none.

    `session` is what the record is called in its set: parts of one record, or of one conversation, share it.
    """

    session: str
    request: ChatRequest
    answer: Message | None


Read = Callable[[Record], Iterable[Shown | str]]
"""From one record to what it shows, or the reason why a part of it is not used (`importing.REASONS`)."""


@dataclass(frozen=True, slots=True)
class Format:
    """A published format: the page that defines it, how it is known, and how a file of it is read."""

    name: str
    page: str
    recognises: Callable[[Record], bool]
    opened: Callable[[Path], Read]


class Published(BaseModel):
    """A record as its page defines it. Fields that are not needed are not looked at."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


def turns(
    session: str,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    taught: Collection[int] | None = None,
) -> Iterator[Shown]:
    """Each turn of the assistant with all that was said before it; of `taught`, if given, only those."""
    for index, message in enumerate(messages):
        if message.role is Role.ASSISTANT and (taught is None or index in taught):
            yield Shown(session, ChatRequest(tuple(messages[:index]), tools=tuple(tools)), message)


def parameters(declared: Any) -> JsonObject:
    """A declaration of parameters as JSON Schema of type object; of none, of no parameters."""
    if not isinstance(declared, Mapping):
        return {"type": "object", "properties": {}}
    return {**declared, "type": "object"} if "properties" not in declared else {"type": "object", **declared}


def strict_json(text: str) -> Any:
    """The value that `text` is; NaN and Infinity, which JSON has not, are refused.

    Raises:
        ValueError: if it is not JSON.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
