"""What was made of a piece of JSON, kept for when the same bytes come again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Made = TypeVar("Made")


class SizedCache(Generic[Made]):
    """Remembers what `make` returned, by the bytes that it was given; forgets all when they grow too many.

    A log has few sets of tools and many rows, so that nearly all are found. The objects that JSON becomes
    take about ten times its size, so `max_bytes` of keys bound them to about ten times as much.
    """

    def __init__(self, make: Callable[[bytes], Made], max_bytes: int) -> None:
        self._make = make
        self._max_bytes = max_bytes
        self._bytes = 0
        self._made: dict[bytes, Made] = {}

    def __call__(self, raw: bytes) -> Made:
        """What `make` returns for `raw`; what it raises is raised each time."""
        try:
            return self._made[raw]
        except KeyError:
            made = self._make(raw)
        if self._bytes + len(raw) > self._max_bytes:
            self._made.clear()
            self._bytes = 0
        if len(raw) <= self._max_bytes:
            self._made[raw] = made
            self._bytes += len(raw)
        return made
