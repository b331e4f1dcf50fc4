"""What changed in the database elsewhere, told at once: LISTEN on a connection of its own.

Of routes and tokens it only makes known sooner what is read every few seconds anyway (`last_known`), so it
may fail: behind a pooler that gives each transaction another connection (PgBouncer's `transaction`) no notice
ever arrives. Then no server hears what another is asked to cancel, and who asks is told so.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing

import psycopg
from psycopg import AsyncConnection

from grpc_server.adapters.postgres import CONNECT_SECONDS, translate
from grpc_server.domain.errors import StoreUnavailable

ROUTES = "route"
TOKENS = "api_token"
CANCELLATIONS = "cancellation"
TABLES = (ROUTES, TOKENS, CANCELLATIONS)
"""What notices name (migrations 0003, 0010)."""

APPLICATION = "agentloop changes"
"""How the connection is called in `pg_stat_activity`."""

FIRST_PAUSE = 0.25
LONGEST_PAUSE = 10.0
"""Seconds between two attempts to listen; twice as long after each that failed."""

_log = logging.getLogger(__name__)

Changes = Callable[[], AsyncGenerator[str, None]]
Read = Callable[[], Awaitable[object]]


async def changes(dsn: str) -> AsyncGenerator[str, None]:
    """The name of each table that changed, every one at first: what changed before was not heard.

    Raises StoreUnavailable when the connection is lost, or cannot be made.
    """
    try:
        async with await AsyncConnection.connect(
            dsn,
            autocommit=True,
            connect_timeout=CONNECT_SECONDS,
            application_name=APPLICATION,
            keepalives_idle=10,
            keepalives_interval=5,
            keepalives_count=3,
        ) as connection:
            await connection.execute("LISTEN agentloop_changed")
            for table in TABLES:
                yield table
            async for notice in connection.notifies():
                yield notice.payload
    except (psycopg.Error, OSError) as error:
        raise translate(error) from error


class Watch:
    """Reads a table as soon as it has changed, however often: notices that come during a read are one.

    Args:
        listen: begins to listen, as `changes` does; done again whenever it ends.
        reads: what to await for which table.
    """

    def __init__(self, listen: Changes, reads: Mapping[str, Read]) -> None:
        self._listen = listen
        self._reads = dict(reads)
        self._changed = {table: asyncio.Event() for table in reads}

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_listening())
            for table, read in self._reads.items():
                tasks.create_task(self._keep_reading(self._changed[table], read))

    async def _keep_listening(self) -> None:
        failures = 0
        while True:
            try:
                async with aclosing(self._listen()) as notices:
                    async for table in notices:
                        failures = 0
                        if table in self._changed:
                            self._changed[table].set()
            except StoreUnavailable as error:
                _log.warning("changes made elsewhere are not heard, and read every few seconds: %s", error)
            except Exception:  # whatever it was, the next attempt may succeed
                _log.exception("changes made elsewhere are not heard, and read every few seconds")
            failures += 1
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (failures - 1))
            # Servers that lost the same database do not all come back in one moment.
            await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 (no secret)

    async def _keep_reading(self, changed: asyncio.Event, read: Read) -> None:
        while True:
            await changed.wait()
            changed.clear()
            try:
                await read()
            except Exception:  # the next read may succeed, and there is one every few seconds
                _log.exception("a change made elsewhere could not be read")
