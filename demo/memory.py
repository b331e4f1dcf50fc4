"""How much memory the demo takes, all its processes together."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from demo.processes import Programs

SAMPLE_SECONDS = 2.0


class MemoryMeter:
    """Samples the process tree; `peak_bytes` is the most that it held at once.

    Counted is the proportional set size (`Pss` of proc(5)'s smaps_rollup): a page that several processes
    share, as Postgres' buffers and a mapped model are, counts once. Where the kernel does not tell it, the
    resident size.
    """

    def __init__(self, programs: Programs, postmaster_pid: Path) -> None:
        self.peak_bytes = 0
        self._programs = programs
        self._postmaster_pid = postmaster_pid

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            await asyncio.to_thread(self.sample)
            await asyncio.sleep(SAMPLE_SECONDS)

    def sample(self) -> int:
        """Bytes held now."""
        now = sum(_bytes(process) for process in _with_children(self._roots()))
        self.peak_bytes = max(self.peak_bytes, now)
        return now

    def _roots(self) -> Iterator[psutil.Process]:
        """This process, what carries the demo's mark, and Postgres, which leaves its starter's tree."""
        yield psutil.Process(os.getpid())
        yield from self._programs.marked()
        with suppress(OSError, ValueError, IndexError, psutil.Error):
            yield psutil.Process(int(self._postmaster_pid.read_text().splitlines()[0]))


def _with_children(roots: Iterable[psutil.Process]) -> set[psutil.Process]:
    found: set[psutil.Process] = set()
    for root in roots:
        if root not in found:
            found.add(root)
            with suppress(psutil.Error):
                found.update(root.children(recursive=True))
    return found


def _bytes(process: psutil.Process) -> int:
    try:
        with Path(f"/proc/{process.pid}/smaps_rollup").open(encoding="ascii") as lines:
            for line in lines:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        with suppress(psutil.Error):
            return int(process.memory_info().rss)
    return 0
