"""What of a record may be kept, decided before it reaches a disk: wraps the Spool port.

`mask` puts a kind in the place of what was found, as in `<EMAIL>`; `hash` a name of its own, as in
`<EMAIL:4f2a90c1d3e7>`: the same value has the same name in every record, so that an answer which repeats what
its prompt says still does so when it is learned, and whoever lacks the key cannot tell the value. What nobody
could scan is not kept: `<UNSCANNED>`. Of a caller who is not to be logged, only counts and a digest are.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import math
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol
from uuid import UUID

from grpc_server.adapters.redaction_process import Span, UnscannedError
from grpc_server.domain import key_file
from grpc_server.domain.errors import Precondition
from grpc_server.domain.ports import Spool, SpoolState
from grpc_server.domain.types import Feedback, InferenceEnded, InferenceStarted, LogRecord, ServerStarted
from grpc_server.domain.withheld import changed, without_text

Mode = Literal["off", "mask", "hash"]
UNSCANNED = "UNSCANNED"
KEY_BYTES = 32
_MANY_TEXTS = 2000
_MANY_CHARACTERS = 64 << 10
_SEPARATORS = re.compile(r"[\s().-]")


class Finder(Protocol):
    """`RedactionProcess`, or what stands in for it."""

    async def find(self, texts: Sequence[str]) -> list[list[Span]]:
        """What is in each text. Raises UnscannedError."""


class RedactingSpool:
    """A spool that gets records without what must not be kept.

    Args:
        spool: where the records go.
        finder: finds secrets and personal data; asked for nothing where `mode` is `off`.
        key: of the hashes.
        redacted: told a kind and how often it was found, once the record is on disk.
    """

    def __init__(
        self,
        spool: Spool,
        finder: Finder,
        mode: Mode,
        key: bytes,
        *,
        redacted: Callable[[str, int], None] = lambda _kind, _times: None,
    ) -> None:
        self._spool = spool
        self._finder = finder
        self._mode = mode
        self._key = key
        self._redacted = redacted
        self._without_text: set[UUID] = set()  # inferences that have not ended

    async def append(self, record: LogRecord) -> None:
        """As the spool's own, of what may be kept of `record`; raises what that raises."""
        if isinstance(record, ServerStarted):
            await self._spool.append(record)
            return
        texts = _few_texts(record)
        aside = asyncio.to_thread if texts is None else _here
        if self._is_without_text(record):
            kept = await aside(lambda: without_text(record, self._digest))
        elif self._mode == "off":
            kept = record
        else:
            kept = await self._scanned(record, texts, aside)
        await self._appended(kept)
        if not isinstance(kept, ServerStarted):
            for kind, times in kept.redacted.items():
                self._redacted(kind, times)

    def state(self) -> SpoolState:
        """The spool's."""
        return self._spool.state()

    async def close(self) -> None:
        """Close the spool."""
        await self._spool.close()

    async def _appended(self, record: LogRecord) -> None:
        """An inference whose start was refused, or given up, has no end to come."""
        try:
            await self._spool.append(record)
        except BaseException:
            if isinstance(record, InferenceStarted):
                self._without_text.discard(record.id)
            raise

    def _is_without_text(self, record: InferenceStarted | InferenceEnded | Feedback) -> bool:
        match record:
            case InferenceStarted(text=False):
                self._without_text.add(record.id)
                return True
            case InferenceEnded() if record.id in self._without_text:
                self._without_text.discard(record.id)
                return True
            case Feedback(text=False):
                return True
        return False

    def _digest(self, text: str) -> str:
        return hmac.new(self._key, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()

    async def _scanned(
        self,
        record: InferenceStarted | InferenceEnded | Feedback,
        texts: list[str] | None,
        aside: _Aside,
    ) -> LogRecord:
        if texts is None:
            texts = await asyncio.to_thread(lambda: _texts(record))
        if not any(texts):
            return record
        try:
            found = await self._finder.find(texts)
        except UnscannedError:
            unscanned = sum(map(bool, texts))
            kept = await aside(lambda: changed(record, lambda text: text and f"<{UNSCANNED}>"))
            return _noted(kept, {UNSCANNED: unscanned})
        if not any(found):
            return record
        replaced = iter([self._replaced(*pair) for pair in zip(texts, found, strict=True)])
        kept = await aside(lambda: changed(record, lambda _: next(replaced)))
        return _noted(kept, Counter(kind for spans in found for _, _, kind in spans))

    def _replaced(self, text: str, spans: Sequence[Span]) -> str:
        if not spans:
            return text
        new = self._put_in(text, spans, quoted=False)
        # A number of JSON that stood outside of quotes needs them now.
        if text.lstrip()[:1] in ("{", "[") and _is_json(text) and not _is_json(new):
            new = self._put_in(text, spans, quoted=True)
        return new

    def _put_in(self, text: str, spans: Sequence[Span], *, quoted: bool) -> str:
        parts, at = [], 0
        for start, end, kind in spans:
            name = self._name(kind, text[start:end])
            if quoted and text[start:end].isdigit() and text[start - 1 : start] != '"':
                name = f'"{name}"'
            parts += [text[at:start], name]
            at = end
        return "".join([*parts, text[at:]])

    def _name(self, kind: str, value: str) -> str:
        if self._mode == "mask":
            return f"<{kind}>"
        same = value.casefold() if kind == "EMAIL" else value
        if kind in ("CARD", "IBAN", "PHONE"):  # however they were written
            same = _SEPARATORS.sub("", value)
        return f"<{kind}:{self._digest(f'{kind} {same}')[:12]}>"


def read_key(path: Path) -> bytes:
    """The key in a file, which is made if there is none (mode 0600).

    Raises:
        Precondition: if there is a file that is no key.
        OSError: if it cannot be read or made.
    """
    key_file.made(path, KEY_BYTES)
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise Precondition(
            f"{path} has {len(key)} bytes; a key of redaction has {KEY_BYTES}. Put back the file that was"
            " there: without it, hashes of before match none of today"
        )
    return key


_Aside = Callable[[Callable[[], LogRecord]], Awaitable[LogRecord]]
"""Does what is to be done with a record: in a thread where that is much, so that the event loop goes on."""


async def _here(work: Callable[[], LogRecord]) -> LogRecord:
    return work()


class _Large(Exception):  # noqa: N818 - ends a count
    pass


def _few_texts(record: LogRecord) -> list[str] | None:
    """The record's texts; None for a large one, whose texts are many or long."""
    try:
        return _texts(record, _MANY_TEXTS, _MANY_CHARACTERS)
    except _Large:
        return None


def _texts(record: LogRecord, most: float = math.inf, characters: float = math.inf) -> list[str]:
    """The record's texts, in the order of `changed`. Raises _Large for more, or longer ones, than these."""
    texts: list[str] = []
    left = characters

    def taken(text: str) -> str:
        nonlocal left
        texts.append(text)
        left -= len(text)
        if len(texts) > most or left < 0:
            raise _Large
        return text

    changed(record, taken)
    return texts


def _noted(record: LogRecord, found: dict[str, int]) -> LogRecord:
    assert not isinstance(record, ServerStarted)  # noqa: S101 - it has no texts
    return replace(record, redacted=dict(sorted(found.items())))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
