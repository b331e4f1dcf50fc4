"""What goes wrong with a step: it is killed in the middle, the disk is full, the log's server dies."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psycopg

_FULL_DISK = 4096  # bytes: what a file may have on a disk that is full
_WAIT_SECONDS = 120


def begun_and_killed(run: Callable[[], Any], seconds: float) -> None:
    """Run a step in a process of its own, which SIGKILL ends after so long, if it has not ended."""
    child = _begun(run)
    _ended(child, seconds)


def begun_without_room(run: Callable[[], Any]) -> None:
    """Run a step in a process of its own whose files may not grow: it fails, in whichever place."""
    _ended(_begun(run, _FULL_DISK), _WAIT_SECONDS)


def postgres_killed(process: int | None) -> None:
    """End the log's server as a power cut would; its keeper starts it again."""
    if process is not None:
        os.kill(process, signal.SIGQUIT)  # Postgres' immediate shutdown: the next start recovers


def until_up(dsn: str) -> None:
    """Return when the database answers, or has not for long."""
    over = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < over:
        with suppress(psycopg.Error), psycopg.connect(dsn, connect_timeout=5):
            return
        time.sleep(0.2)


def _begun(run: Callable[[], Any], room: int = -1) -> int:
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
            run()
        os._exit(0)
    return child


def _ended(child: int, seconds: float) -> None:
    """Wait for a process, so long; then kill it."""
    over = time.monotonic() + seconds
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > over:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return
        time.sleep(0.02)
