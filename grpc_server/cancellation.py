"""Which CancelledError is a caller's doing.

gRPC, and asyncio's own timeouts, cancel the task that answers. A library may let a cancellation of its own
out all the same, when one of its connections breaks: to pass it on would tell a caller who waits that it has
cancelled, and leave the call without a status.
"""

from __future__ import annotations

import asyncio


class CallerGone(asyncio.CancelledError):
    """The caller has gone, or takes nothing any more, and our task is not cancelled yet."""


def asked_for(error: asyncio.CancelledError) -> bool:
    """Whether somebody has cancelled the task that runs now, or its caller has gone."""
    task = asyncio.current_task()
    return isinstance(error, CallerGone) or task is None or task.cancelling() > 0
