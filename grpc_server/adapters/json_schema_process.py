"""The process that checks callers' schemas: begun with the first question, again after one that ended it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path

from grpc_server.domain.errors import EngineUnavailable

_PACKAGE_ROOT = Path(__file__).parents[2]
_START_SECONDS = 60.0

CPU_SECONDS = 2.0
"""A schema of 64 KiB needs 0.2 s, unless it is one of those that need ages."""


class TooComplexError(Exception):
    """The process did not survive the question."""


class SchemaProcess:
    """Runs `json_schema_child`, which answers one question at a time, in `cpu_seconds` each."""

    def __init__(self, cpu_seconds: float = CPU_SECONDS) -> None:
        self._cpu_seconds = cpu_seconds
        self._process: asyncio.subprocess.Process | None = None
        self._one_at_a_time = asyncio.Lock()
        self._closed = False

    async def ask(self, schema: str, answer: str | None = None) -> str:
        """What is wrong with `schema` (JSON), or with `answer` by it; empty if nothing.

        Raises:
            TooComplexError: it takes too much time or memory to tell.
            EngineUnavailable: nobody can be asked.
        """
        line = json.dumps({"schema": schema, "answer": answer}).encode() + b"\n"
        async with self._one_at_a_time:
            process, reply = await self._running(), b""
            try:
                reply = await _reply(process, line)
            finally:
                if not reply:  # it has died, or is left in the middle of a question
                    await self._end()
        if not reply:
            raise TooComplexError
        return str(json.loads(reply)["problem"])

    async def close(self) -> None:
        """End the process, and start no other."""
        self._closed = True
        async with self._one_at_a_time:
            await self._end()

    async def _running(self) -> asyncio.subprocess.Process:
        if self._closed:
            raise EngineUnavailable("the engine is closed")
        if self._process is not None and self._process.returncode is None:
            return self._process
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "grpc_server.adapters.json_schema_child",
                str(self._cpu_seconds),
                cwd=_PACKAGE_ROOT,
                env={name: value for name, value in os.environ.items() if not name.startswith("AGENTLOOP_")},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,  # it might quote a caller
                process_group=0,  # see `embedded_process`
            )
            ready = await asyncio.wait_for(_reply(self._process, b""), _START_SECONDS)
        except (OSError, TimeoutError) as error:
            await self._end()
            raise EngineUnavailable("the JSON Schema cannot be checked now; try again") from error
        except BaseException:
            await self._end()
            raise
        if not ready:
            await self._end()
            raise EngineUnavailable("the JSON Schema cannot be checked now; try again")
        return self._process

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _reply(process: asyncio.subprocess.Process, line: bytes) -> bytes:
    """The next line that it says, to `line`; empty if it has died."""
    assert process.stdin and process.stdout  # noqa: S101
    with contextlib.suppress(ConnectionError):
        process.stdin.write(line)
        await process.stdin.drain()
    return await process.stdout.readline()
