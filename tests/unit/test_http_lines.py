"""What an engine streams is read in lines, and no more of it is held than a line."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from grpc_server.adapters.http_lines import MAX_LINE_BYTES, MAX_REFUSAL_BYTES, lines, refusal
from grpc_server.domain.errors import EngineFailed


def answered(*chunks: bytes, endless: bytes = b"") -> tuple[httpx.Response, list[int]]:
    """A response of these chunks, then of `endless` ones; and how many of these were read."""
    read = [0]

    async def body() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk
        while endless:
            read[0] += 1
            yield endless

    return httpx.Response(200, content=body()), read


async def test_lines_end_at_newlines_only_wherever_chunks_end() -> None:
    response, _ = answered(b'{"a":"\xe2\x80', b'\xa8"}\r\n\n{"b"', b':1}\n{"c":2}')
    assert [line async for line in lines(response)] == [[b'{"a":"\xe2\x80\xa8"}'], [b'{"b":1}'], [b'{"c":2}']]


async def test_lines_that_come_at_once_are_given_at_once() -> None:
    response, _ = answered(b"a\nb\n\nc", b"\nd\n", b"\n", b"e")
    assert [there async for there in lines(response)] == [[b"a", b"b"], [b"c", b"d"], [b"e"]]


async def test_a_line_without_end_is_given_up_at_its_limit() -> None:
    response, read = answered(b"first\n", endless=b"x" * 65536)
    source = lines(response)
    assert await anext(source) == [b"first"]
    with pytest.raises(EngineFailed, match=f"more than {MAX_LINE_BYTES} bytes"):
        await anext(source)
    assert read == [MAX_LINE_BYTES // 65536 + 1]


async def test_of_a_refusal_without_end_only_the_beginning_is_read() -> None:
    response, read = answered(endless=b"y" * 40000)
    assert await refusal(response) == b"y" * MAX_REFUSAL_BYTES
    assert read == [2]
