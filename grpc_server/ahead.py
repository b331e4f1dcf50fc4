"""An engine that is asked while the disk still takes the request's start record.

To wait for the disk and then for the engine costs the caller an fsync before its first token. An answer
leaves only when the record is on disk: until then nothing of it is looked at.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from typing import Self

from grpc_server.domain.ports import Finished, Piece
from grpc_server.uninterrupted import uninterrupted

Event = Piece | Finished


class Ahead:
    """The events of an engine's stream, the first of which is waited for from now on. Always close it."""

    def __init__(self, events: AsyncGenerator[Event, None]) -> None:
        self._events = events
        self._begun: asyncio.Task[Event | None] = asyncio.create_task(self._begin(), name="ahead")
        self._first_is_due = True

    async def _begin(self) -> Event | None:
        return await anext(self._events, None)

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Awaitable[Event]:
        """The next event. What the engine raised while nobody looked is raised with the first."""
        if self._first_is_due:
            self._first_is_due = False
            return self._first()
        return anext(self._events)

    async def _first(self) -> Event:
        first = await self._begun
        if first is None:
            raise StopAsyncIteration
        return first

    async def aclose(self) -> None:
        """End the stream, wherever it is; the engine stops."""
        if not self._begun.done():
            self._begun.cancel()
            await uninterrupted(self._ended())
        if not self._begun.cancelled():
            self._begun.exception()  # raised already, or of no interest any more
        await self._events.aclose()

    async def _ended(self) -> None:
        await asyncio.wait({self._begun})
