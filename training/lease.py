"""A training that runs on a GPU that serving has lent it stops in time: at a step, or by force.

Who holds the lease (`training.with_gpu`) writes into a file until when the GPU is ours, by the monotonic
clock, which all processes of a machine share and nobody sets. A process that trains looks before every step;
and where a step hangs, or the holder was killed, a thread of it ends the process.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "AGENTLOOP_GPU_LEASE_FILE"
LOST = 75
"""Exit code of a process that had to end: EX_TEMPFAIL of sysexits.h."""
LOOK_SECONDS = 0.2


class LeaseLostError(RuntimeError):
    """The GPU is serving's again."""


@dataclass(frozen=True, slots=True)
class Until:
    """When to stop, and when to be gone, in monotonic seconds."""

    stop: float
    gone: float

    def write(self, path: Path) -> None:
        """Say so; whoever reads finds all of it."""
        partial = path.with_suffix(".partial")
        partial.write_text(f"{self.stop!r} {self.gone!r}")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> Until:
        """What was said. A file that is lost, or damaged, is a lost lease."""
        try:
            stop, gone = path.read_text().split()
            return cls(float(stop), float(gone))
        except (OSError, ValueError):
            return cls(0.0, 0.0)


def ours() -> Path | None:
    """The file of the lease under which this process trains; None where the GPU is not lent."""
    name = os.environ.get(VARIABLE)
    return Path(name) if name else None


def over() -> bool:
    """Whether there was a lease, and it is over."""
    file = ours()
    return file is not None and time.monotonic() >= Until.read(file).stop


def end_when_over() -> None:
    """Have a thread end this process when its lease says that it must be gone. Without a lease: nothing."""
    if (file := ours()) is not None:
        threading.Thread(target=_watch, args=(file,), name="gpu lease", daemon=True).start()


def _watch(file: Path) -> None:
    while time.monotonic() < Until.read(file).gone:
        time.sleep(LOOK_SECONDS)
    print("the lease of the GPU is over: this training ends; start it again", file=sys.stderr, flush=True)
    os._exit(LOST)
