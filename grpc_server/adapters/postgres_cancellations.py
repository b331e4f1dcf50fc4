"""Cancelling what another server on the same Postgres runs: asked by a row, heard by LISTEN.

The row says what is to end, and whose; a notice only says that there is one (migration 0010). Everybody who
may connect may send a notice, and read what one carries, so it decides nothing and names nobody.

The log's own row tells whether it is worth while to ask: of an inference that has ended, or is another
caller's, nobody is asked. It also tells whose silence it was, where nobody answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from uuid import UUID, uuid4

from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from grpc_server.adapters.postgres import PostgresStore
from grpc_server.adapters.postgres_text import from_text, to_text
from grpc_server.domain.errors import Exhausted, StoreUnavailable, Unavailable

WAIT_SECONDS = 1.0
"""What the others get to answer in."""
MOST_WAITING = 64
MOST_OF_A_CALLER = 8
"""Cancellations that wait for others at once: they are cheap to ask for, and each is a transaction or two."""

_LOOK = "SELECT caller, status, server_id FROM inference WHERE id = %s"
_ASK = "INSERT INTO cancellation (id, inference_id, caller) VALUES (%s, %s, %s)"
_FORGET = "DELETE FROM cancellation WHERE asked_at < now() - interval '1 minute'"
_ASKED = (
    "SELECT id, inference_id, caller, ended_by FROM cancellation "
    "WHERE asked_at > now() - interval '5 seconds'"
)
_ENDED = "UPDATE cancellation SET ended_by = %s WHERE id = ANY(%s)"
_ANSWER = "SELECT ended_by FROM cancellation WHERE id = %s"

_log = logging.getLogger(__name__)


class PostgresCancellations:
    """`Elsewhere` over one database.

    `end_here` ends an inference of this server, of the caller who is named (None: of anybody), and says
    whether it did; it is set once there is a pipeline.
    """

    def __init__(self, store: PostgresStore, server_id: str) -> None:
        self.end_here: Callable[[UUID, str | None], bool] = lambda *_: False
        self._store = store
        self._server_id = server_id
        self._waiting: dict[UUID, asyncio.Event] = {}
        self._whose: Counter[str | None] = Counter()

    async def cancel(self, inference_id: UUID, caller: str | None) -> bool:
        """See `Elsewhere.cancel`."""
        if self._whose[caller] >= MOST_OF_A_CALLER:
            whose = "server" if caller is None else f"caller:{caller}"
            raise Exhausted(
                f"{MOST_OF_A_CALLER} of your cancellations wait for other servers; try again", subject=whose
            )
        if len(self._waiting) >= MOST_WAITING:
            raise Exhausted(f"{MOST_WAITING} cancellations wait for other servers; try again")
        ask = uuid4()
        self._waiting[ask] = answered = asyncio.Event()
        self._whose[caller] += 1
        try:
            if not await self._ask(ask, inference_id, caller):
                return False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WAIT_SECONDS):
                    await answered.wait()
            return await self._answer(ask, inference_id, caller)
        except StoreUnavailable as error:
            raise StoreUnavailable(
                f"inference {inference_id} does not run on this server, and the others could not be asked:"
                f" {error}"
            ) from error
        finally:
            del self._waiting[ask]
            self._whose -= Counter({caller: 1})  # keeps no caller at zero

    async def look(self) -> None:
        """End here what others ask for, and hear what they have answered: to be done at each notice."""
        try:
            async with self._store.reading() as connection:
                rows = await (await connection.execute(_ASKED)).fetchall()
                ended = [ask for ask, *row in rows if self._ends(ask, *row)]
                if ended:
                    await connection.execute(_ENDED, (to_text(self._server_id), ended))
        except StoreUnavailable as error:
            _log.warning("what other servers ask to be cancelled could not be read: %s", error)

    def _ends(self, ask: UUID, inference_id: UUID, caller: str | None, ended_by: str | None) -> bool:
        """Whether this server has ended it just now."""
        if ask in self._waiting:
            if ended_by is not None:
                self._waiting[ask].set()
            return False
        return ended_by is None and self.end_here(inference_id, None if caller is None else from_text(caller))

    async def _ask(self, ask: UUID, inference_id: UUID, caller: str | None) -> bool:
        """Ask the others; False where none of them can have it running."""
        async with self._store.reading() as connection:
            row = await (await connection.execute(_LOOK, (inference_id,))).fetchone()
            # Without a row it may have begun just now: its start is on its way from that server's spool.
            if row is not None and not self._runs(row, caller):
                return False
            await connection.execute(_FORGET)
            await connection.execute(_ASK, (ask, inference_id, None if caller is None else to_text(caller)))
        return True

    async def _answer(self, ask: UUID, inference_id: UUID, caller: str | None) -> bool:
        """Whether somebody has ended it. Raises Unavailable if the one who runs it has not answered."""
        async with self._store.reading() as connection:
            found = await (await connection.execute(_ANSWER, (ask,))).fetchone()
            if found is not None and found[0] is not None:
                return True
            silent = await self._running_on(connection, inference_id, caller)
        if silent is None:
            return False
        raise Unavailable(
            f"inference {inference_id} runs on server {silent}, by the log, which did not answer within"
            f" {WAIT_SECONDS:g} s; try again"
        )

    async def _running_on(
        self, connection: AsyncConnection[TupleRow], inference_id: UUID, caller: str | None
    ) -> str | None:
        row = await (await connection.execute(_LOOK, (inference_id,))).fetchone()
        return from_text(row[2]) if row is not None and self._runs(row, caller) else None

    def _runs(self, row: TupleRow, caller: str | None) -> bool:
        """Whether the log says that it runs, is the caller's, and is another server's."""
        whose, status, server_id = from_text(row[0]), row[1], from_text(row[2])
        return status == "started" and caller in (None, whose) and server_id != self._server_id
