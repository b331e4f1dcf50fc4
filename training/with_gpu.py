"""Run a command on the GPU that a server on this machine lends: `python -m training with-gpu -- COMMAND`.

The lease is renewed while the command runs, and given back when it ends, however it ends. Where it is lost
the command is gone before serving takes the GPU back: the lease is reckoned from before each renewal was
asked for, the command is told to stop STOP of its length early, and killed GONE of it early.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

import psutil

from agentloop.errors import AgentLoopError, NotFound
from agentloop.types import GpuLease
from training import lease
from training.lease import Until

STOP, GONE = 0.3, 0.1
LOOK_SECONDS = 0.1
END_SECONDS = 5.0
"""What a command gets to end in that is ended for another reason."""
RELEASE_SECONDS = 600.0

Say = Callable[[str], None]


class Lender(Protocol):
    """What is needed of `agentloop.Client`."""

    def lease_gpu(self, holder: str) -> GpuLease:
        """Take the GPU."""

    def renew_gpu_lease(self, lease_id: str, *, timeout_s: float) -> GpuLease:
        """Put the end off."""

    def release_gpu_lease(self, lease_id: str, *, timeout_s: float) -> bool:
        """Give it back."""


def holder() -> str:
    """Who wants the GPU, for whoever asks where it is."""
    return f"{getpass.getuser()}@{socket.gethostname()} (process {os.getpid()})"[:128]


def run(command: Sequence[str], lender: Lender, environment: Mapping[str, str], say: Say) -> int:
    """Run `command` under a lease; its exit code, or `lease.LOST` if the lease was lost.

    Raises:
        AgentLoopError: if the GPU cannot be had, with who has it and until when.
    """
    held = lender.lease_gpu(holder())
    say(f"the GPU is ours, for {held.remaining_s:.0f} s at most")
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _Held(lender, held, Path(folder) / "until", say).run(command, environment)
    finally:
        try:
            lender.release_gpu_lease(held.id, timeout_s=RELEASE_SECONDS)
            say(f"the GPU is given back after {time.monotonic() - began:.0f} s")
        except AgentLoopError as error:
            say(f"the GPU was not given back; serving takes it by itself: {error}")


class _Held:
    """A lease, and the command that runs under it."""

    def __init__(self, lender: Lender, held: GpuLease, file: Path, say: Say) -> None:
        self._lender, self._held, self._file, self._say = lender, held, file, say
        self._signal = 0
        self._until = self._lasts(time.monotonic(), held)

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Renew the lease until the command ends, or has to."""
        with _signals(self._told):
            process = subprocess.Popen(command, env={**environment, lease.VARIABLE: str(self._file)})
            try:
                self._watch(process)
                code = process.poll()
                if self._signal:
                    return 128 + self._signal
                return lease.LOST if code is None else code
            finally:
                lost = time.monotonic() >= self._until.stop
                end(process, self._until.gone - time.monotonic() if lost else END_SECONDS)

    def _told(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Return when the command has ended, or is to be ended."""
        due = time.monotonic() + self._held.lease_s / 5
        while process.poll() is None and not self._signal:
            if time.monotonic() >= due:
                due = time.monotonic() + self._held.lease_s / (5 if self._renewed() else 20)
            if time.monotonic() >= self._until.stop:
                self._say("the GPU is serving's again: the command is ended; start it again")
                return
            time.sleep(LOOK_SECONDS)

    def _renewed(self) -> bool:
        asked = time.monotonic()
        try:
            now = self._lender.renew_gpu_lease(self._held.id, timeout_s=self._held.lease_s / 10)
        except NotFound:  # it is over: stop now
            self._until = Until(asked, asked + (STOP - GONE) * self._held.lease_s)
            self._until.write(self._file)
        except AgentLoopError as error:
            left = self._until.stop - time.monotonic()
            self._say(f"the lease of the GPU was not renewed, and lasts {left:.0f} s more: {error}")
            return False
        else:
            self._until = self._lasts(asked, now)
        return True

    def _lasts(self, asked: float, now: GpuLease) -> Until:
        end_ = asked + now.expires_in_s
        until = Until(end_ - STOP * now.lease_s, end_ - GONE * now.lease_s)
        until.write(self._file)
        return until


def end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """End a command and all that it started, politely for so long; none is left when this returns.

    A launcher's workers may be in sessions of their own, so they are found by their parents.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(process.pid)
        everyone = [first, *first.children(recursive=True)]
        first.terminate()
        _, still = psutil.wait_procs(everyone, timeout=max(0.0, seconds))
        for each in still:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(still)
    process.wait()


@contextlib.contextmanager
def _signals(told: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Hear of a wish to end, so that the command ends and the GPU is given back first."""
    before = {number: signal.signal(number, told) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
