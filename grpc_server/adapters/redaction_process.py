"""Finds secrets and personal data in texts, off the event loop and in bounded time.

Two processes (`redaction_child`): one for short requests and one for long ones, so that a caller's 1 MiB
delays no other's. Each starts again after a question that it did not survive.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Sequence

from grpc_server.adapters.answering_process import AnsweringProcess, CannotStartError, ClosedError

CPU_SECONDS = 3.0
"""1 MiB of prose takes 0.1 s, the worst that was found for these patterns 2 s (docs/decisions.md)."""
WALL_SECONDS = 30.0
LONG_CHARACTERS = 32 << 10

Span = tuple[int, int, str]
"""Start, end and kind of what was found in a text."""

_log = logging.getLogger(__name__)


class UnscannedError(Exception):
    """Nobody can tell what is in these texts: that took too long, or there is no process to ask."""


class RedactionProcess:
    """Asks the children."""

    def __init__(self, *, cpu_seconds: float = CPU_SECONDS, wall_seconds: float = WALL_SECONDS) -> None:
        self._short, self._long = (
            AnsweringProcess(
                "grpc_server.adapters.redaction_child", str(cpu_seconds), wall_seconds=wall_seconds
            )
            for _ in range(2)
        )

    async def start(self) -> None:
        """Begin the process for short requests now: the first caller need not wait for it."""
        with contextlib.suppress(CannotStartError, ClosedError):  # the first question will tell
            await self._short.start()

    async def find(self, texts: Sequence[str]) -> list[list[Span]]:
        """What is in each text, in order and apart.

        Raises:
            UnscannedError: it could not be told.
        """
        characters = sum(map(len, texts))
        process = self._short if characters <= LONG_CHARACTERS else self._long
        try:
            reply = await process.ask(json.dumps(texts).encode() + b"\n")
        except (CannotStartError, ClosedError) as error:
            _log.warning("texts cannot be scanned: there is no process", extra={"error": str(error)})
            raise UnscannedError from error
        if not reply:
            _log.warning("a record's texts took too long to scan", extra={"characters": characters})
            raise UnscannedError
        return [[(start, end, kind) for start, end, kind in spans] for spans in json.loads(reply)]

    async def close(self) -> None:
        """End both processes."""
        await asyncio.gather(self._short.close(), self._long.close())
