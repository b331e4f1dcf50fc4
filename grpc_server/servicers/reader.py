"""A caller who does not read: its answer may not hold a place at the engine for ever.

HTTP/2's flow control lets a caller stop the server's writes without a word. The engine stops then too, and
keeps its place, while others wait for one.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

import grpc

from grpc_server.cancellation import CallerGone

HEAD_SECONDS = 1.0
"""What a stream's head gets to leave, once its call is cancelled."""

_GONE = (grpc.aio.InternalError, grpc.aio.UsageError)
"""What gRPC raises from a write to a call that has ended: its core refuses, or it knows of the end."""


class Reader:
    """Writes responses to one caller; cancels the call's task when one of them is unread for `seconds`.

    Between two looks, a write costs nothing more than to note when it began.
    """

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], seconds: float) -> None:
        self.stopped = False
        """Whether the caller was cut off because it did not read."""
        self._context = context
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None
        self._begun = False
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        self._timer = self._loop.call_later(self._seconds / 2, self._look)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def write(self, response: Any) -> None:
        """Send it. Raises CallerGone if the caller has, and gRPC has not cancelled us yet."""
        self._since = self._loop.time()
        try:
            if self._begun:
                await self._context.write(response)
            else:
                await self._begin(response)
        except _GONE as error:
            raise CallerGone from error
        finally:
            self._since = None

    async def _begin(self, response: Any) -> None:
        """Write the first response, with the stream's head. A cancellation takes effect when that has left.

        gRPC notes that the head was sent when this write is over. To one that was torn off it would send
        another head with the status, which its core refuses: the caller would wait for ever.
        """
        writing = asyncio.ensure_future(self._context.write(response))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait({writing}, timeout=HEAD_SECONDS)
            if not writing.done():
                writing.cancel()
                raise CallerGone from None
            writing.result()
            raise
        self._begun = True

    def _look(self) -> None:
        assert self._task is not None  # noqa: S101 - entered
        if self._since is not None and self._loop.time() - self._since >= self._seconds:
            self.stopped = True
            self._task.cancel()
        else:
            self._timer = self._loop.call_later(self._seconds / 2, self._look)
