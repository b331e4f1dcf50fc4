"""What the database said last, kept through its outages and through restarts of the server."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from grpc_server.domain.errors import StoreUnavailable

T = TypeVar("T")

SOONEST_SECONDS = 0.5
"""Reads that someone waits for are at least this far apart, however many ask."""

_log = logging.getLogger(__name__)


class LastKnown(Generic[T]):
    """Some rows, read every few seconds; while they cannot be read, those read last stay in force.

    Args:
        read: gives all rows; raises StoreUnavailable.
        file: where the rows are kept (mode 0600, replaced atomically) for a start without a database.
        refresh_seconds: how old the rows may become while the database answers.
        changed: called with the rows whenever they were read.
        encode, decode: a row as plain JSON, and back (ValueError, KeyError or TypeError if it is none).
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[list[T]]],
        file: Path,
        refresh_seconds: float,
        *,
        changed: Callable[[Sequence[T]], None],
        encode: Callable[[T], dict[str, Any]],
        decode: Callable[[dict[str, Any]], T],
    ) -> None:
        self._read = read
        self._file = file
        self._refresh_seconds = refresh_seconds
        self._changed = changed
        self._encode = encode
        self._decode = decode
        self._rows: list[T] | None = None
        self._in_force = asyncio.Lock()
        self._read_at = float("-inf")
        self._soon: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Read once, from the file if the database does not answer, and go on reading."""
        if not await self.refresh():
            rows = await asyncio.to_thread(self._load)
            if rows is not None and self._rows is None:
                self._changed(rows)
        self._spawn(self._keep_reading())

    async def close(self) -> None:
        """Stop reading."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def refresh(self) -> bool:
        """Read now; False if it cannot be done."""
        async with self._in_force:
            return await self._take()

    async def _take(self) -> bool:
        self._read_at = time.monotonic()
        try:
            rows = await self._read()
        except StoreUnavailable as error:
            _log.warning("%s: the last known stay in force: %s", self._file.stem, error)
            return False
        known, self._rows = self._rows, rows
        self._changed(rows)
        if rows != known:
            await asyncio.to_thread(self._save, rows)
        return True

    async def refresh_soon(self, apart: float = SOONEST_SECONDS) -> None:
        """Return after a read that began after this call; all who ask meanwhile share it.

        Reads are at least `apart` seconds apart, however many ask.
        """
        if self._soon is None:
            self._soon = self._spawn(self._read_soon(apart))
        await asyncio.shield(self._soon)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"read {self._file.stem}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _read_soon(self, apart: float) -> None:
        await asyncio.sleep(max(0.0, self._read_at + apart - time.monotonic()))
        async with self._in_force:  # while the database is down, each read holds it for seconds
            self._soon = None  # who comes from now on needs another
            await self._take()

    async def _keep_reading(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_seconds)
            try:
                await self.refresh()
            except Exception:  # whatever it was, the next read may succeed
                _log.exception("%s could not be read", self._file.stem)

    def _load(self) -> list[T] | None:
        try:
            return [self._decode(row) for row in json.loads(self._file.read_text(encoding="utf-8"))]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("%s is unreadable, and the database is down: %s", self._file, error)
            return None

    def _save(self, rows: Sequence[T]) -> None:
        """On a full disk the server goes on; it only knows less if it must start without a database."""
        text = json.dumps([self._encode(row) for row in rows], indent=2)
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self._file.parent, prefix=self._file.name)
            new = Path(name)
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(descriptor)
                new.replace(self._file)
            except BaseException:
                new.unlink(missing_ok=True)
                raise
        except OSError as error:
            _log.warning("%s could not be written: %s", self._file, error)
