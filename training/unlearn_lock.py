"""Forgetting and learning at the same time would bring back what is forgotten: one of them waits.

An unlearning is one command, and holds a lock beside the cycles from before its erasure until its evidence is
written. A night is many commands, and holds nothing between them: a step refuses to begin during an
unlearning, and an unlearning while a step runs, or before the night has ended. Each takes its own lock first
and looks for the other's then, so that of two that begin at once one sees the other. A lock ends with its
process.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from agentloop.night import Night, cycles_in

LOCK = ".unlearning"
_OURS = "AGENTLOOP_UNLEARNING"
"""Says to the steps that an unlearning runs itself, in their environment, whose lock it is."""
_REPORT = "report.html"


class BusyError(RuntimeError):
    """Somebody else learns, or forgets, now; the text says who."""


@contextmanager
def alone(cycles: Path) -> Iterator[None]:
    """No night learns, and nothing else is unlearned, in this folder of cycles while the block runs.

    Raises:
        BusyError: naming the other unlearning, the step that runs, or the night that has not ended.
    """
    with (cycles / LOCK).open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{_holder(cycles)} is at work; wait for it") from None
        lock.truncate(0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        lock.write(f"an unlearning, process {os.getpid()} on {socket.gethostname()}, since {since},")
        lock.flush()
        os.environ[_OURS] = str(cycles.resolve())
        try:
            _refuse_beside_a_night(cycles)
            yield
        finally:
            del os.environ[_OURS]


def refuse_while_unlearning(cycles: Path) -> None:
    """Return unless somebody else unlearns in this folder of cycles.

    Raises:
        BusyError: naming the unlearning.
    """
    path = cycles / LOCK
    if not path.is_file() or os.environ.get(_OURS) == str(cycles.resolve()):
        return
    with path.open(encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{_holder(cycles)} is at work; wait for it") from None


def _holder(cycles: Path) -> str:
    return (cycles / LOCK).read_text(encoding="utf-8").rstrip(",") or "an unlearning"


def _refuse_beside_a_night(cycles: Path) -> None:
    nights = [night for each in cycles_in(cycles) if not (night := Night(each)).unlearn]
    for night in nights:
        if night.running:
            raise BusyError(
                f"{night.running[0]} of {night.cycle_id} is running; unlearn when that night is over"
            )
    if nights and not (nights[-1].directory / _REPORT).is_file():
        last = nights[-1].cycle_id
        raise BusyError(
            f"the night {last} has not ended: it has no {_REPORT}; wait for it, or, if it was broken off,"
            f" end it by `python -m training report --cycle {cycles / last}`"
        )
