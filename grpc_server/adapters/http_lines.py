"""Lines of a streamed HTTP answer, split at newlines only.

httpx's own `aiter_lines` also splits at U+0085, U+2028 and U+2029, which stand unescaped inside JSON strings:
a model that writes one of them would break its own stream.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

import httpx


async def lines(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """Every line that is not empty, without its line end; what stands after the last newline counts too."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if line := line.rstrip(b"\r"):
                yield line
    if rest := rest.rstrip(b"\r"):
        yield rest
