r"""Any text as text that Postgres takes, and back, without loss.

Postgres refuses NUL, and a lone surrogate has no UTF-8. In JSON both are written as escapes, which columns of
type json keep. In columns of type text they are written the same way, as the six characters `\u0000` or
`\ud800`; backslashes right before them are doubled, and so are those before a `u0000` that a caller wrote
himself. All other text is stored as it is.
"""

from __future__ import annotations

import json
import re
from typing import Any

from grpc_server.domain.plain import plain

_UNTAKEN = re.compile(r"(\\*)(?:([\x00\ud800-\udfff])|(?<=\\)(u(?:0000|d[89a-f][0-9a-f]{2})))")
_WRITTEN = re.compile(r"(\\+)(u(?:0000|d[89a-f][0-9a-f]{2}))")


def to_text(text: str) -> str:
    """`text` without NUL and lone surrogates."""
    return _UNTAKEN.sub(_write, text)


def from_text(text: str) -> str:
    """What `to_text` was given."""
    return _WRITTEN.sub(_read, text)


def to_json(value: Any) -> str:
    """`value` as JSON in ASCII, for a column of type json.

    Raises:
        ValueError: if JSON cannot hold it (NaN, another type, a nesting without end).
    """
    try:
        return json.dumps(plain(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"JSON cannot hold it: {error}") from error


def _write(found: re.Match[str]) -> str:
    backslashes, character, written = found.groups()
    if character is not None:
        return f"{backslashes * 2}\\u{ord(character):04x}"
    return f"{backslashes * 2}{written}"


def _read(found: re.Match[str]) -> str:
    backslashes, written = found.groups()
    half = "\\" * (len(backslashes) // 2)
    if len(backslashes) % 2:
        return half + chr(int(written[1:], 16))
    return half + written
