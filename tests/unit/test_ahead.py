"""An engine that is asked ahead: its events, errors and end are those of one that is asked in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from grpc_server.ahead import Ahead
from grpc_server.domain.errors import EngineFailed
from grpc_server.domain.ports import Finished, Piece
from grpc_server.domain.types import FinishReason, Usage

END = Finished(FinishReason.STOP, Usage(1, 2))


class Script:
    """An engine's stream that does as it is told, and remembers whether it was closed."""

    def __init__(self, *events: Piece | Finished | BaseException) -> None:
        self.events = events
        self.asked = asyncio.Event()
        self.closed = False

    async def stream(self) -> AsyncGenerator[Piece | Finished, None]:
        self.asked.set()
        try:
            for event in self.events:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            self.closed = True


async def test_it_is_asked_before_anybody_looks_and_gives_every_event_in_turn() -> None:
    script = Script(Piece("a"), Piece("b"), END)
    ahead = Ahead(script.stream())
    await asyncio.wait_for(script.asked.wait(), 10)
    assert [event async for event in ahead] == [Piece("a"), Piece("b"), END]
    await ahead.aclose()


async def test_what_it_raised_while_nobody_looked_is_raised_with_the_first() -> None:
    ahead = Ahead(Script(EngineFailed("nonsense")).stream())
    await asyncio.sleep(0)
    with pytest.raises(EngineFailed, match="nonsense"):
        await anext(ahead)
    await ahead.aclose()


async def test_a_stream_without_events_ends() -> None:
    ahead = Ahead(Script().stream())
    assert [event async for event in ahead] == []
    await ahead.aclose()


@pytest.mark.parametrize("looked", [False, True])
async def test_closing_stops_the_engine_wherever_it_is(looked: bool) -> None:
    script = Script(Piece("a"), Piece("b"), END)
    ahead = Ahead(script.stream())
    await script.asked.wait()
    if looked:
        assert await anext(ahead) == Piece("a")
    await ahead.aclose()
    assert script.closed


async def test_a_caller_who_is_cancelled_is_cancelled() -> None:
    async def never() -> AsyncGenerator[Piece | Finished, None]:
        await asyncio.Event().wait()
        yield END

    ahead = Ahead(never())

    async def look() -> Piece | Finished:
        return await anext(ahead)

    looking = asyncio.create_task(look())
    await asyncio.sleep(0)
    looking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looking
    await ahead.aclose()
