"""What drift is measured on: a few plain facts of some rows, drawn by their ids.

A share of all rows is enough to see a distribution move, and keeps the costly facts (a text's language)
bounded. Which rows are drawn hangs on their ids alone: not on their order, nor on which process reads them.
"""

from __future__ import annotations

import re
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

import pyarrow as pa
import yaml

from grpc_server.domain.types import Message, Role, Status
from validation.content import Content, says_something

REFUSALS = Path(__file__).with_name("refusals.yaml")
NO_CALL = "none"
SHORT = "short"

DRAWN = (
    ("drawn", pa.bool_()),
    ("prompt_length", pa.int64()),
    ("language", pa.string()),
    ("tool", pa.string()),
    ("refusal", pa.bool_()),
    ("feedback", pa.bool_()),
)
"""Columns with their types; null where a row was not drawn, or says nothing of it.

`prompt_length` is in characters; `language` an ISO 639-1 code, or `short`; `tool` a digest of the name of the
first tool that what is learned calls, or `none`; `refusal` whether what is learned refuses to help.
"""

_LETTERS = re.compile(r"[^\W\d_]")
# Below, the identifier mostly guesses.
_LEAST_LETTERS = 20
# What language a text has, its beginning tells; and refusals come first.
_BEGINNING = 300


class Draw:
    """What is drawn of a batch of rows, one `take` or `leave` for each row in their order."""

    def __init__(self, rate: float) -> None:
        self._below = rate * 2**32
        self._columns: dict[str, list[Any]] = {name: [] for name, _ in DRAWN}

    def leave(self) -> None:
        """Draw nothing of this row."""
        for column in self._columns.values():
            column.append(None)

    def take(self, inference_id: str | None, status: str | None, found: Content) -> None:
        """Draw this row, if it is one of those that are."""
        if not self._below or crc32((inference_id or "").encode()) >= self._below:
            self.leave()
            return
        taught = found.taught if found.demonstrations or status == Status.OK.value else ()
        values = (True, *_facts(found), *_taught(taught), bool(found.feedback))
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def arrays(self) -> list[pa.Array]:
        """The columns of `DRAWN`."""
        return [pa.array(self._columns[name], kind) for name, kind in DRAWN]


def _facts(found: Content) -> tuple[int, str]:
    """How long the prompt is, and in which language the user wrote."""
    said = [message.content for message in found.request.messages]
    length = len(found.prompt or "") + sum(map(len, said))
    users = [each.content for each in found.request.messages if each.role is Role.USER]
    return length, language(found.prompt or (users[-1] if users else ""))


def _taught(taught: tuple[Message, ...]) -> tuple[str | None, bool | None]:
    """Which tool is called first, and whether help is refused; None where nothing is learned."""
    if not any(map(says_something, taught)):
        return None, None
    calls = [call.name for message in taught for call in message.tool_calls]
    # A name comes from a caller or a model: it may be any text, and is not shown.
    tool = sha256(calls[0].encode("utf-8", "replace")).hexdigest()[:12] if calls else NO_CALL
    return tool, not calls and any(refuses(message.content) for message in taught)


def language(text: str) -> str:
    """The language of a text, as its beginning tells it: an ISO 639-1 code, or `short` if it is too short."""
    beginning = text[:_BEGINNING]
    if len(_LETTERS.findall(beginning)) < _LEAST_LETTERS:
        return SHORT
    from py3langid import classify  # reads its model, 5 MB, when first asked

    return str(classify(beginning)[0])


def refuses(text: str) -> bool:
    """Whether a text begins by refusing to help, by the phrases of refusals.yaml."""
    beginning = " ".join(text[:_BEGINNING].replace("\u2019", "'").casefold().split())
    return any(phrase in beginning for phrase in _refusals())


@cache
def _refusals() -> tuple[str, ...]:
    phrases = yaml.safe_load(REFUSALS.read_text(encoding="utf-8"))["phrases"]
    return tuple(str(phrase).casefold() for phrase in phrases)
