"""Lines of a streamed HTTP answer, split at newlines only, none longer than memory should hold.

httpx's own `aiter_lines` also splits at U+0085, U+2028 and U+2029, which stand unescaped inside JSON strings:
a model that writes one of them would break its own stream.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

import httpx

from grpc_server.domain.errors import EngineFailed

MAX_LINE_BYTES = 1 << 20
"""A line holds one token, or an error: a hundred times less."""
MAX_REFUSAL_BYTES = 1 << 16


async def lines(response: httpx.Response) -> AsyncGenerator[list[bytes], None]:
    """The lines as they come: those together that are there at once, never an empty list.

    Empty lines are left out, and line ends; what stands after the last newline is a line, too.

    Raises:
        EngineFailed: for a line of more than MAX_LINE_BYTES, of which no more is read.
    """
    rest = b""
    async for chunk in response.aiter_bytes():
        *whole, rest = (rest + chunk).split(b"\n")
        if there := [line for each in whole if (line := each.rstrip(b"\r"))]:
            yield there
        if len(rest) > MAX_LINE_BYTES:
            raise EngineFailed(f"the engine sent a line of more than {MAX_LINE_BYTES} bytes")
    if rest := rest.rstrip(b"\r"):
        yield [rest]


async def refusal(response: httpx.Response) -> bytes:
    """The body of an answer that is no stream, or its first MAX_REFUSAL_BYTES."""
    body = b""
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) >= MAX_REFUSAL_BYTES:
            break
    return body[:MAX_REFUSAL_BYTES]
