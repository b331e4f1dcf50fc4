"""Who gets a place at the engine, and when: as many as it runs at once, the others in the order they came."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from grpc_server.domain.errors import Exhausted


class Admission:
    """`places` at once; at most `queue_size` wait, at most `queue_seconds` each."""

    def __init__(self, places: int, *, queue_size: int = 64, queue_seconds: float = 30) -> None:
        self._free = places
        self._places = places
        self._queue_size = queue_size
        self._queue_seconds = queue_seconds
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def in_flight(self) -> int:
        """Places taken."""
        return self._places - self._free

    @property
    def queued(self) -> int:
        """Requests that wait for one."""
        return len(self._waiting)

    @asynccontextmanager
    async def place(self, *, wait: bool = True) -> AsyncIterator[None]:
        """Hold a place while the block runs.

        Raises:
            Exhausted: if the queue is full, or the wait took longer than `queue_seconds`; without `wait`,
                if no place is free.
        """
        await self._take(wait)
        try:
            yield
        finally:
            self._give_back()

    async def _take(self, wait: bool) -> None:
        if self._free > 0:
            self._free -= 1
            return
        if not wait or len(self._waiting) >= self._queue_size:
            raise Exhausted(
                f"all {self._places} places are taken and {len(self._waiting)} requests wait; try again later"
            )
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self._queue_seconds):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._give_back()  # the place came in the same moment as the end of the wait
            elif turn in self._waiting:
                self._waiting.remove(turn)
            if isinstance(error, TimeoutError):
                raise Exhausted(
                    f"no place became free in {self._queue_seconds:g} s; try again later"
                ) from None
            raise

    def _give_back(self) -> None:
        """Hand the place to the first who waits, or free it."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
