"""Moves the spool's records into the database, in order, and never gives one up silently.

A batch that the database refuses is halved until the records that it will never take stand alone; these go
to the spool's `dead/` folder, and to the table `dead_letter` where the database takes them. While it is down
the records stay where they are, and tries are spaced by a back-off with jitter. Before it stores anything
it asks which database that is: one that was restored to a point in time gets again what the spool has kept.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from grpc_server.adapters.spool_frame import Corrupt
from grpc_server.domain.errors import StoreUnavailable
from grpc_server.domain.ports import LogStore
from grpc_server.domain.types import LogRecord

BATCH_RECORDS = 500
LINGER_SECONDS = 0.2
"""How long a batch may gather: a commit of the database costs about as much as 50 records."""
FIRST_DELAY_SECONDS = 0.1
LONGEST_DELAY_SECONDS = 5.0
LOOK_SECONDS = 10.0
"""How often a drain that has nothing to store looks whether the database is another."""

_log = logging.getLogger(__name__)
_Item = tuple[int, LogRecord | Corrupt]


class Source(Protocol):
    """The reading side of a spool; `FileSpool` describes each method."""

    async def read_batch(self, limit: int) -> list[_Item]:
        """The next records, each with the position to commit once it is stored."""

    async def commit(self, position: int) -> None:
        """Forget what is before `position`."""

    async def remember(self, history: str) -> int:
        """Say which database it is; how many records come again, as it is another."""

    async def dead_letter(self, position: int, what: LogRecord | Corrupt, reason: str) -> None:
        """Keep what cannot be stored."""

    async def wait(self, seconds: float) -> None:
        """Return when there is something to read, or the time is over."""


class DeadLetterTable(Protocol):
    """Where a dead letter can be seen without a look at the server's disk."""

    async def add_dead_letter(self, what: LogRecord | Corrupt, reason: str) -> None:
        """Store it. Raises StoreUnavailable, or ValueError if the database will not take it either."""


class Drain:
    """Stores what is in the spool until it is stopped.

    Args:
        source: the spool.
        store: where the records go.
        dead_letters: a table for what the store will never take, next to the spool's own folder.
        stored: called with the number of records of each batch that was stored.
        dead_lettered: called with the number of records set aside.
    """

    def __init__(
        self,
        source: Source,
        store: LogStore,
        *,
        dead_letters: DeadLetterTable | None = None,
        stored: Callable[[int], None] = lambda _: None,
        dead_lettered: Callable[[int], None] = lambda _: None,
        batch_records: int = BATCH_RECORDS,
        linger_seconds: float = LINGER_SECONDS,
    ) -> None:
        self.store_up = False
        """Whether the last try to store something succeeded."""
        self.last_error = ""
        """Why the last try failed; empty when it did not."""
        self._source = source
        self._store = store
        self._dead_letters = dead_letters
        self._stored = stored
        self._dead_lettered = dead_lettered
        self._batch_records = batch_records
        self._linger_seconds = linger_seconds
        self._one_at_a_time = asyncio.Lock()
        self._looked = time.monotonic()

    async def run(self) -> None:
        """Store records as they come, for ever; cancel it to stop (nothing is lost)."""
        failures = 0
        while True:
            if await self._step(looking=True):
                failures = 0
                await self._source.wait(1.0)
                await asyncio.sleep(self._linger_seconds)
            else:
                await self._pause(failures)
                failures += 1

    async def flush(self, timeout: float) -> bool:  # noqa: ASYNC109
        """Store all that is in the spool now; False if `timeout` (seconds) was over before."""
        try:
            async with asyncio.timeout(timeout):
                failures = 0
                while not await self._step():
                    await self._pause(failures)
                    failures += 1
        except TimeoutError:
            return False
        return True

    async def _pause(self, failures: int) -> None:
        longest = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2.0 ** min(failures, 16))
        await asyncio.sleep(longest * random.uniform(0.5, 1.0))  # noqa: S311 - so that servers spread out

    async def _step(self, *, looking: bool = False) -> bool:
        """Store until the spool is empty. False if the database, or the disk, does not answer.

        `looking` asks now and then where nothing comes, too: what a restored database lacks must not wait.
        """
        async with self._one_at_a_time:
            try:
                asked = False
                if looking and time.monotonic() - self._looked > LOOK_SECONDS:
                    asked = True
                    await self._is_another()
                while batch := await self._source.read_batch(self._batch_records):
                    if not asked:  # a restore stops the database, which ends this loop
                        asked = True
                        if await self._is_another():
                            continue
                    await self._store_batch(batch)
                    await self._source.commit(batch[-1][0])
            except (StoreUnavailable, OSError) as error:
                self._fail(str(error))
                return False
            except Exception as error:  # the log must go on, whatever a driver raises
                _log.exception("drain: unexpected")
                self._fail(f"{type(error).__name__}: {error}")
                return False
            self.last_error = ""
            return True

    async def _is_another(self) -> bool:
        """Whether the database is another than before, so that records come again."""
        again = await self._source.remember(await self._store.history())
        self._looked = time.monotonic()
        if again:
            _log.warning("drain: the database was restored, or is another: %d records come again", again)
        return again > 0

    def _fail(self, reason: str) -> None:
        if reason != self.last_error:
            _log.warning("drain: %s; records wait in the spool", reason)
        self.store_up = False
        self.last_error = reason

    async def _store_batch(self, batch: Sequence[_Item]) -> None:
        """Store a batch; what is bad is found by halving, and set aside."""
        records = [what for _, what in batch if not isinstance(what, Corrupt)]
        if len(records) < len(batch):
            if len(batch) == 1:
                await self._set_aside(*batch[0], "these bytes of the spool are no record")
            else:
                await self._store_halves(batch)
            return
        try:
            await self._store.store(records)
        except ValueError as error:
            self.store_up = True
            if len(batch) == 1:
                await self._set_aside(*batch[0], str(error))
            else:
                await self._store_halves(batch)
        else:
            self.store_up = True
            self._stored(len(batch))

    async def _store_halves(self, batch: Sequence[_Item]) -> None:
        middle = len(batch) // 2
        await self._store_batch(batch[:middle])
        await self._store_batch(batch[middle:])

    async def _set_aside(self, position: int, what: LogRecord | Corrupt, reason: str) -> None:
        if await self._is_another():  # meanwhile: what it lacks is the reason
            raise StoreUnavailable("the database was restored just now")
        await self._source.dead_letter(position, what, reason)
        if self._dead_letters is not None:
            try:
                await self._dead_letters.add_dead_letter(what, reason)
            except ValueError as error:
                _log.warning("drain: only the spool's dead/ has the record at %d: %s", position, error)
        _log.error("drain: dead-lettered the record at %d: %s", position, reason)
        self._dead_lettered(1)
