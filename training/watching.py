"""Who watches a step: told how much is done, and how much there is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Told how many are done, and how many there will be."""


def unwatched(_done: int, _total: int) -> None:
    """The progress that nobody looks at."""
