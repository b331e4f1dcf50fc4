"""One model version's child process: started, spoken to with its own key, and started anew when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from pathlib import Path

import httpx

from grpc_server.adapters.embedded_child import ChildOptions
from grpc_server.adapters.http_client import http_client
from grpc_server.domain.errors import EngineFailed, EngineUnavailable

_log = logging.getLogger(__name__)

_PACKAGE_ROOT = Path(__file__).parents[2]
_LOAD_SECONDS = 600.0  # a model of tens of gigabytes, from a cold disk
_END_SECONDS = 2.0
_TIMEOUT = httpx.Timeout(connect=5.0, write=30.0, read=600.0, pool=5.0)
"""Reading waits for a place and for the prompt to be read; the caller's deadline comes first, as a rule."""

_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 30.0
_STEADY_SECONDS = 60.0
"""A child that lived this long was well: the next pause is the first again."""

_PATIENCE = 1.0
"""Callers wait for a restart that is nearer than this, and are refused at once otherwise (seconds)."""


class ChildProcess:
    """A running child, ready to be asked through `client`."""

    def __init__(self, process: asyncio.subprocess.Process, address: str, key: str) -> None:
        self.process = process
        self.client = http_client(
            address,
            _TIMEOUT,
            headers={"Authorization": f"Bearer {key}"},
            keep_connections=False,  # the server closes one after a stream: never use it twice
        )

    @classmethod
    async def start(cls, options: ChildOptions) -> ChildProcess:
        """A child that has loaded its model. Raises EngineFailed if it ended, or took too long."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "grpc_server.adapters.embedded_child",
            cwd=_PACKAGE_ROOT,
            env={name: value for name, value in os.environ.items() if not name.startswith("AGENTLOOP_")},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # A terminal's Ctrl-C is for the parent. A session of its own would shield it, too, but also from
            # the parent's low priority (autogroup) when that evaluates at night.
            process_group=0,
        )
        try:
            address = await asyncio.wait_for(_introduce(process, options), _LOAD_SECONDS)
        except BaseException as error:
            await _end(process)
            if isinstance(error, TimeoutError):
                raise EngineFailed(f"the model took more than {_LOAD_SECONDS:.0f} s to load") from error
            raise
        return cls(process, address, options.key)

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.returncode is None

    async def wait(self) -> int:
        """Its exit code, once it has ended (negative: the signal that ended it)."""
        return await self.process.wait()

    async def settle(self) -> None:
        """Give a process that is just dying the moment in which its end is noticed."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self.process.wait()), 0.5)

    async def close(self) -> None:
        """End it; it is gone when this returns."""
        await _end(self.process)
        await self.client.aclose()


async def _introduce(process: asyncio.subprocess.Process, options: ChildOptions) -> str:
    """Tell the child what to serve, and wait until it does; returns its address."""
    assert process.stdin and process.stdout and process.stderr  # noqa: S101
    with contextlib.suppress(ConnectionError):  # it ended already
        process.stdin.write(options.to_line())
        await process.stdin.drain()
    line, said = await asyncio.gather(process.stdout.readline(), process.stderr.read())
    if not line:
        code = await process.wait()
        tail = said.decode(errors="replace")[-2000:]
        _log.error("the embedded engine could not load %s (exit code %d):\n%s", options.model, code, tail)
        raise EngineFailed("the embedded engine could not load this model version; its file may be damaged")
    return str(json.loads(line)["address"])


async def _end(process: asyncio.subprocess.Process) -> None:
    """Close its stdin, which ends it; kill it if that does not help."""
    if process.stdin:
        process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), _END_SECONDS)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


class Supervisor:
    """Keeps one child running until it is closed. `name` is the model version's, for logs and errors."""

    def __init__(self, name: str, options: ChildOptions) -> None:
        self._name = name
        self._options = options
        self._child: ChildProcess | None = None
        self._failure = ""
        self._ran = False
        self._next_start = 0.0
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._keep())

    @property
    def ready(self) -> bool:
        """Whether its child has loaded the model, and lives."""
        return self._child is not None and self._child.alive

    @property
    def down(self) -> bool:
        """Whether its child died, and the next does not answer yet."""
        return self._ran and not self.ready

    async def child(self) -> ChildProcess:
        """The child, once it is ready.

        Raises:
            EngineFailed: it could not load the model when it was first started.
            EngineUnavailable: it died and starts anew only in a while, or it is being closed.
        """
        while not (self._child and self._child.alive):
            if self._failure:
                raise EngineFailed(self._failure)
            if self._task.done():
                raise EngineUnavailable(f"model version {self._name} is being unloaded; try again")
            pause = self._next_start - time.monotonic()
            if pause > _PATIENCE:
                raise EngineUnavailable(
                    f"the embedded engine of {self._name} died; it starts anew in {pause:.0f} s"
                )
            await self._changed.wait()
        return self._child

    async def close(self) -> None:
        """End the child, and start no other."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._tell()

    async def _keep(self) -> None:
        try:
            await self._start_again_and_again()
        except Exception as error:
            _log.exception("the embedded engine of %s is given up", self._name)
            self._failure = f"model version {self._name}: unexpected {type(error).__name__}; ask again"
        finally:
            self._tell()

    async def _start_again_and_again(self) -> None:
        """Return only if the model could not be loaded when it was first started; `_failure` says why."""
        deaths = 0
        while True:
            started = time.monotonic()
            try:
                child = await ChildProcess.start(self._options)
            except (EngineFailed, OSError) as error:
                if not deaths:
                    self._failure = f"model version {self._name}: {error}"
                    return
            else:
                self._child, self._ran = child, True
                self._tell()
                try:
                    code = await child.wait()
                finally:
                    self._child = None
                    await child.close()
                _log.error("the embedded engine of %s died (exit code %d)", self._name, code)
            deaths = 1 if time.monotonic() - started > _STEADY_SECONDS else deaths + 1
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (deaths - 1))
            self._next_start = time.monotonic() + pause
            self._tell()
            await asyncio.sleep(pause)

    def _tell(self) -> None:
        """Wake all who wait for a change."""
        self._changed.set()
        self._changed = asyncio.Event()
