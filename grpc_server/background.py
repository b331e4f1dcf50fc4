"""Work that goes on beside a block, and ends with it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")
END_SECONDS = 5.0


@asynccontextmanager
async def in_background(work: Coroutine[Any, Any, T], name: str) -> AsyncIterator[asyncio.Task[T]]:
    """Run `work` while the block runs; then it is cancelled and waited for. What it raised is dropped."""
    task = asyncio.create_task(work, name=name)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def in_rounds(
    work: Callable[[], float], name: str, ending: threading.Event | None = None
) -> AsyncIterator[None]:
    """Run `work` again and again while the block runs, in a thread of its own; it says when: in seconds.

    Where it hangs at the end, its thread is left behind after END_SECONDS, and ends with the process.
    `ending`, set at the end, lets it stop in the middle.
    """
    ended = ending or threading.Event()

    def go_on() -> None:
        wait = 0.0
        while not ended.wait(wait):
            wait = work()

    thread = threading.Thread(target=go_on, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        await asyncio.to_thread(thread.join, END_SECONDS)
