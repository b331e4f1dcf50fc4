"""What a step took and how it ended: `steps/<name>.json`, for the report and the manifest."""

from __future__ import annotations

import fcntl
import platform
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import monotonic

from validation.files import write_json

Progress = Callable[[int, int], None]
"""Told how many rows are done, and how many there are."""


def silent(done: int, total: int) -> None:
    """Show no progress."""


class StepRunningError(Exception):
    """Another process runs the same step of the same cycle now."""


class NothingToDoError(Exception):
    """The step has nothing to do; the text says why. What follows is skipped."""


@contextmanager
def step(cycle: Path, name: str, packages: Sequence[str]) -> Iterator[None]:
    """Run a step alone, and note how it ended in `steps/<name>.json`.

    The note has outcome (done, skipped, failed) with its reason, started_at and ended_at (UTC), seconds,
    peak_memory_gb (10^9 bytes, of this process) and the versions of Python and of `packages`.

    Raises:
        StepRunningError: if another process is in the same step of this cycle.
    """
    notes = cycle / "steps"
    notes.mkdir(parents=True, exist_ok=True)
    with (notes / f".{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StepRunningError(
                f"{name} of {cycle.name} is running in another process; wait for it"
            ) from None
        started, clock = datetime.now(UTC), monotonic()
        outcome, reason = "done", ""
        try:
            yield
        except BaseException as error:
            outcome = "skipped" if isinstance(error, NothingToDoError) else "failed"
            reason = str(error) or type(error).__name__
            raise
        finally:
            note = {
                "outcome": outcome,
                "reason": reason,
                "started_at": started.isoformat(),
                "ended_at": datetime.now(UTC).isoformat(),
                "seconds": round(monotonic() - clock, 3),
                "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
                "seed": None,
                "versions": {"python": platform.python_version()}
                | {package: version(package) for package in packages},
            }
            write_json(notes / f"{name}.json", note)
