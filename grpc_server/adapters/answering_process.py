"""A child process that answers one question at a time, and may be killed by one.

It is for work on what callers send that is not sure to end: what hangs in a thread cannot be ended, and would
hang the server. The child says `ready`, then answers each line of stdin with one of stdout.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

_PACKAGE_ROOT = Path(__file__).parents[2]
_START_SECONDS = 60.0
_REPLY_BYTES = 64 << 20


class ClosedError(Exception):
    """`close` was called."""


class CannotStartError(Exception):
    """The process did not come up."""


class AnsweringProcess:
    """`python -m <module> <arguments>`, begun with the first question, and again after one that ended it."""

    def __init__(self, module: str, *arguments: str, wall_seconds: float | None = None) -> None:
        self._arguments = ("-m", module, *arguments)
        self._wall_seconds = wall_seconds
        self._process: asyncio.subprocess.Process | None = None
        self._one_at_a_time = asyncio.Lock()
        self._closed = False

    async def start(self) -> None:
        """Begin it now, rather than with the first question. Raises CannotStartError, ClosedError."""
        async with self._one_at_a_time:
            await self._running()

    async def ask(self, line: bytes) -> bytes:
        """The line that answers `line`; empty if the process did not survive it, or took too long.

        Raises:
            CannotStartError: nobody can be asked.
            ClosedError: after `close`.
        """
        async with self._one_at_a_time:
            process, reply = await self._running(), b""
            try:
                with contextlib.suppress(TimeoutError):
                    reply = await asyncio.wait_for(_reply(process, line), self._wall_seconds)
            finally:
                if not reply:  # it has died, or is left in the middle of a question
                    await self._end()
        return reply

    async def close(self) -> None:
        """End the process, and start no other."""
        self._closed = True
        if self._process is not None and self._process.returncode is None:  # whoever waits for it need not
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        async with self._one_at_a_time:
            await self._end()

    async def _running(self) -> asyncio.subprocess.Process:
        if self._closed:
            raise ClosedError
        if self._process is not None and self._process.returncode is None:
            return self._process
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *self._arguments,
                cwd=_PACKAGE_ROOT,
                env={name: value for name, value in os.environ.items() if not name.startswith("AGENTLOOP_")},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,  # it might quote a caller
                process_group=0,  # see `embedded_process`
                limit=_REPLY_BYTES,
            )
            ready = await asyncio.wait_for(_reply(self._process, b""), _START_SECONDS)
        except (OSError, TimeoutError) as error:
            await self._end()
            raise CannotStartError(str(error)) from error
        except BaseException:
            await self._end()
            raise
        if not ready:
            await self._end()
            raise CannotStartError("it ended as it started")
        return self._process

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _reply(process: asyncio.subprocess.Process, line: bytes) -> bytes:
    """The next line that it says, to `line`; empty if it has died, or says too much."""
    assert process.stdin and process.stdout  # noqa: S101
    with contextlib.suppress(ConnectionError):
        process.stdin.write(line)
        await process.stdin.drain()
    try:
        return await process.stdout.readline()
    except ValueError:  # longer than the limit
        return b""
