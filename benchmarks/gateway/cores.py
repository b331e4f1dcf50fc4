"""Which cores what runs on, so that those who are compared have the same and do not take each other's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

_ALL = sorted(os.sched_getaffinity(0))
SERVERS = frozenset(_ALL[: max(1, len(_ALL) // 2)])
"""The gateway's, and those of who is compared with it."""
OTHERS = frozenset(_ALL[max(1, len(_ALL) // 2) :]) or SERVERS
"""The engine's, and the client's where many streams are asked."""


@contextlib.contextmanager
def on(cores: frozenset[int]) -> Iterator[None]:
    """What is started in the block runs on `cores` only, and so does this process meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
