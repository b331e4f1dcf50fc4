"""Is an answer the one that a caller demonstrated? Values are compared as the leaderboard's checker does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from grpc_server.domain.types import Message


def matches(answer: Message, demonstration: Message) -> bool:
    """Whether both are the same call, or the same text.

    The same call: the same name, the same arguments, no more and no fewer. Strings are compared without case,
    blanks and `,./-_*^` (as `training.bfcl.score` does); an integer is the float of the same value, and true
    is not 1. The same text: without case and with blanks drawn together.
    """
    if [call.name for call in answer.tool_calls] != [call.name for call in demonstration.tool_calls]:
        return False
    if demonstration.tool_calls:
        pairs = zip(answer.tool_calls, demonstration.tool_calls, strict=True)
        return all(_same(given.arguments, shown.arguments) for given, shown in pairs)
    return answer.content.split() != [] and _text(answer.content) == _text(demonstration.content)


def _text(content: str) -> str:
    return " ".join(content.casefold().split())


def _same(given: Any, shown: Any) -> bool:
    if isinstance(given, str) and isinstance(shown, str):
        return _plain(given) == _plain(shown)
    if isinstance(given, Mapping) and isinstance(shown, Mapping):
        return given.keys() == shown.keys() and all(_same(given[name], shown[name]) for name in shown)
    if _is_list(given) and _is_list(shown):
        return len(given) == len(shown) and all(map(_same, given, shown))
    if isinstance(given, bool) or isinstance(shown, bool) or given is None or shown is None:
        return given is shown
    return isinstance(given, int | float) and isinstance(shown, int | float) and given == shown


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _plain(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')
