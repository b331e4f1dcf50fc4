"""How the demo's programs start and end.

Each program gets a session of its own (so that a Ctrl-C reaches only the conductor, which ends the rest in
order), a log, and a mark in its environment, by which also what it started itself is found again: at the end,
and, after a demo that was killed, at the start of the next.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

MARK = "AGENTLOOP_DEMO_STATE"
STOP_SECONDS = 30.0
POLL_SECONDS = 0.05
LAST_WORDS_SECONDS = 1.0  # for output that is still on its way
LOWEST = 19


@dataclass(slots=True)
class Output:
    """What a program printed on its standard output: the latest lines."""

    lines: deque[str] = field(default_factory=lambda: deque(maxlen=100))
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def copy(self, stream: asyncio.StreamReader, log: Path) -> None:
        """Keep the stream's lines, and append them to the log, until it ends."""
        with log.open("ab", buffering=0) as file:
            while True:
                try:
                    line = await stream.readline()
                except ValueError:  # longer than the stream's buffer, which has dropped it
                    continue
                if not line:
                    return
                file.write(line)
                self.lines.append(line.decode(errors="replace").rstrip("\r\n"))
                self.begun.set()


@dataclass(slots=True, eq=False)
class Program:
    """One program that was started."""

    name: str
    log: Path
    process: asyncio.subprocess.Process
    output: Output
    reader: asyncio.Task[None]

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.returncode is None

    async def first_line(self) -> str:
        """The first line on its standard output, or "" if it ends without one."""
        begun = asyncio.create_task(self.output.begun.wait())
        await asyncio.wait({begun, self.reader}, return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()
        return self.output.lines[0] if self.output.lines else ""

    async def exited(self) -> int:
        """Wait for its end; its exit code.

        Not by `Process.wait`: that waits for the end of its output too, which what it started may hold open.
        """
        while self.process.returncode is None:  # noqa: ASYNC110 (asyncio has no event for it)
            await asyncio.sleep(POLL_SECONDS)
        return self.process.returncode

    async def ended(self) -> int:
        """Wait for its end, and for what it printed; its exit code."""
        code = await self.exited()
        await asyncio.wait({self.reader}, timeout=LAST_WORDS_SECONDS)
        return code


class Programs:
    """What this demo started. `mark` is the state folder: one demo at a time uses it."""

    def __init__(self, log_dir: Path, mark: Path, cwd: Path) -> None:
        self._log_dir = log_dir
        self._mark = str(mark)
        self._cwd = cwd
        self._started: list[Program] = []

    async def start(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        low_priority: bool = False,
        secret: bool = False,
    ) -> Program:
        """Start a program whose output goes to `<log_dir>/<name>.log`, which begins anew.

        Of a `secret` one only standard error is logged.
        """
        self._log_dir.mkdir(parents=True, exist_ok=True)
        log = self._log_dir / f"{name}.log"
        with log.open("wb"):
            pass
        with log.open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=self._cwd,
                env=os.environ | dict(environment or {}) | {MARK: self._mark, "PYTHONUNBUFFERED": "1"},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        if low_priority:
            _lowest_priority(process.pid)
        assert process.stdout is not None  # noqa: S101 (it was started with a pipe)
        output = Output()
        reader = asyncio.create_task(output.copy(process.stdout, Path(os.devnull) if secret else log))
        program = Program(name, log, process, output, reader)
        self._started.append(program)
        return program

    async def run(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        secret: bool = False,
    ) -> tuple[int, str]:
        """Run a program to its end: its exit code, and the last lines of its standard output."""
        program = await self.start(name, command, environment, secret=secret)
        code = await program.ended()
        self._started.remove(program)
        return code, "\n".join(program.output.lines)

    async def stop(self) -> None:
        """End everything, the latest first; what is left of it by its mark."""
        while self._started:
            await _stop(self._started.pop())
        await self.sweep()

    async def sweep(self) -> int:
        """End every process that carries our mark; how many there were."""
        left = list(self.marked())
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        while alive := [process for process in left if _alive(process)]:
            if time.monotonic() > deadline:
                for process in alive:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                break
            await asyncio.sleep(POLL_SECONDS)
        return len(left)

    def marked(self) -> Iterator[psutil.Process]:
        """The processes that this demo, or an earlier one on the same state folder, started."""
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self._mark and process.pid != os.getpid():
                    yield process


async def _stop(program: Program) -> None:
    if program.running:
        with suppress(ProcessLookupError):
            program.process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(program.exited(), STOP_SECONDS)
        except TimeoutError:
            with suppress(ProcessLookupError):
                os.killpg(program.process.pid, signal.SIGKILL)  # it leads a group of its own
            await program.exited()
    await asyncio.wait({program.reader}, timeout=LAST_WORDS_SECONDS)
    program.reader.cancel()
    with suppress(asyncio.CancelledError):
        await program.reader


def _alive(process: psutil.Process) -> bool:
    """Whether it runs: one that has ended stays in the table until its parent notices."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _lowest_priority(pid: int) -> None:
    """Put the session of `pid` last in line for the processor.

    Sessions share the processor by autogroup, which plain nice does not reach (sched(7)).
    """
    with suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(LOWEST), encoding="ascii")
    with suppress(OSError):
        os.setpriority(os.PRIO_PGRP, pid, LOWEST)
