"""Work that a cancellation must not tear in two."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


async def uninterrupted(work: Coroutine[Any, Any, object]) -> None:
    """Run `work` to its end even when the caller's task is cancelled meanwhile; then raise CancelledError.

    What `work` raises comes first; so after a CancelledError `work` is done.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled
