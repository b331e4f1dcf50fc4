"""How much memory is left for this process: of the machine, and of each control group that bounds it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

FRESH_SECONDS = 0.5
"""How old an answer may be: it is asked with each request."""


@dataclass(frozen=True, slots=True)
class _Bound:
    """A control group with a limit. What the kernel can drop of its page cache counts as free."""

    folder: Path
    limit: str
    usage: str
    droppable: re.Pattern[str]

    def available(self) -> int | None:
        """None where there is no limit, or it cannot be read."""
        try:
            limit = (self.folder / self.limit).read_text().strip()
            if not limit.isdigit():  # "max"
                return None
            usage = int((self.folder / self.usage).read_text())
            cache = self.droppable.search((self.folder / "memory.stat").read_text())
        except (OSError, ValueError):
            return None
        return max(0, int(limit) - usage + (int(cache[1]) if cache else 0))


class MemoryAvailable:
    """Called, it gives bytes; `root` is where /proc and /sys are."""

    def __init__(self, *, root: Path = Path("/"), monotonic: Callable[[], float] = time.monotonic) -> None:
        self._bounds = tuple(_bounds(root))
        self._monotonic = monotonic
        self._read_at: float | None = None
        self._bytes = 0

    def __call__(self) -> int:
        """Bytes that can be had without swapping, as of at most FRESH_SECONDS ago."""
        now = self._monotonic()
        if self._read_at is None or now - self._read_at > FRESH_SECONDS:
            groups = [bound.available() for bound in self._bounds]
            self._bytes = min([psutil.virtual_memory().available, *(b for b in groups if b is not None)])
            self._read_at = now
        return self._bytes


def _bounds(root: Path) -> Iterator[_Bound]:
    """This process's control groups, version 2 and 1, each with those that it lies in."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top = root / "sys/fs/cgroup"
            files = ("memory.max", "memory.current", re.compile(r"^inactive_file (\d+)$", re.MULTILINE))
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            files = (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                re.compile(r"^total_inactive_file (\d+)$", re.MULTILINE),
            )
        else:
            continue
        below = Path(path.lstrip("/"))
        for folder in (top / below, *(top / parent for parent in below.parents)):
            if (folder / files[0]).exists():
                yield _Bound(folder, *files)
