"""Is a text of a public set hostile? What the guard's rules find in it, secrets, and what no text has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

from grpc_server.domain.plain import texts_in
from grpc_server.guard.hostile import Matcher
from grpc_server.guard.private_text import Finder
from training.datasets.shown import Shown

# Control characters but tab, line feed and carriage return; Unicode's noncharacters of the first plane.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")
_hostile = lru_cache(maxsize=1)(Matcher)
_secrets = lru_cache(maxsize=1)(Finder)


def broken(shown: Shown) -> str | None:
    """The name of the first rule that a text of it breaks; None if there is none."""
    return next((rule for text in _texts(shown) for rule in _broken(text)), None)


def _broken(text: str) -> Iterator[str]:
    if _UNPRINTABLE.search(text):
        yield "unprintable"
    yield from (rule.name for rule in _hostile().find(text))
    yield from (f"secret {kind}" for _, _, kind in _secrets().secrets(text))


def _texts(shown: Shown) -> Iterable[str]:
    answer = () if shown.answer is None else (shown.answer,)
    for message in (*shown.request.messages, *answer):
        yield message.content
        for call in message.tool_calls:
            yield from texts_in(call.arguments)
    for tool in shown.request.tools:
        yield tool.description
        yield from texts_in(tool.parameters)
