"""Administrative acts, and attempts at them that were denied, in the table of events.

An act is written down before it is done, and again how it ended. Where the first cannot be written the act is
refused: so none is done that nobody could read of. An attempt that was denied changed nothing, and is written
in the background; what comes often is counted, not repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from grpc_server.background import in_background
from grpc_server.domain.errors import AgentLoopError
from grpc_server.domain.ports import EventStore
from grpc_server.domain.types import Caller
from grpc_server.uninterrupted import uninterrupted

FLUSH_SECONDS = 60.0
MAX_DENIED = 100
"""Callers and methods whose denied attempts are kept apart between two writes; of others there is one row."""

log = logging.getLogger(__name__)


class Outcome:
    """How an act ends, for its event; `detail` may be added to while it runs."""

    def __init__(self) -> None:
        self.detail: dict[str, Any] = {}


class Audit:
    """Writes events of this server. `running()` writes denied attempts, too."""

    def __init__(self, store: EventStore, server_id: str = "server") -> None:
        self._store = store
        self._server_id = server_id
        self._denied: dict[tuple[str, str, str], int] = {}

    @contextlib.asynccontextmanager
    async def act(
        self, kind: str, caller: Caller, subject: str, detail: Mapping[str, Any]
    ) -> AsyncIterator[Outcome]:
        """Do an act inside the block: `kind` with `outcome` asked, then done, failed or cancelled.

        Raises:
            StoreUnavailable: before the block, if that cannot be written; then nothing must be done.
        """
        told = {**detail, "key_id": caller.key_id, "server_id": self._server_id}
        await self._store.note(kind, caller.name, subject, {**told, "outcome": "asked"})
        outcome = Outcome()
        try:
            yield outcome
        except BaseException as error:
            ended = "cancelled" if isinstance(error, asyncio.CancelledError) else "failed"
            found = {**told, **outcome.detail, "outcome": ended, "error": type(error).__name__}
            await uninterrupted(self._ended(kind, caller.name, subject, found))
            raise
        await uninterrupted(
            self._ended(kind, caller.name, subject, {**told, **outcome.detail, "outcome": "done"})
        )

    async def done(self, kind: str, caller: Caller, subject: str, detail: Mapping[str, Any]) -> None:
        """Write an act down that is done whether that can be written or not."""
        told = {**detail, "key_id": caller.key_id, "server_id": self._server_id, "outcome": "done"}
        await self._ended(kind, caller.name, subject, told)

    def denied(self, caller: Caller, method: str) -> None:
        """A caller's token did not allow an administrative call."""
        key = (caller.key_id, caller.name, method)
        if key not in self._denied and len(self._denied) >= MAX_DENIED:
            key = ("", "", "")
        if key not in self._denied:
            log.warning(
                "an administrative call was denied",
                extra={"caller": caller.name, "key_id": caller.key_id, "method": method},
            )
        self._denied[key] = self._denied.get(key, 0) + 1

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Write denied attempts every few seconds, and at the end what is left."""
        try:
            async with in_background(self._keep_writing(), "audit"):
                yield
        finally:
            await self.flush()

    async def flush(self) -> None:
        """Write the denied attempts so far; those that the database does not take stay for the next time."""
        denied, self._denied = self._denied, {}
        for (key_id, name, method), times in denied.items():
            detail = {"key_id": key_id, "server_id": self._server_id, "times": times}
            try:
                await self._store.note("denied", name, method, detail)
            except AgentLoopError as error:
                log.warning("denied attempts are not written yet: %s", error)
                break
            denied[key_id, name, method] = 0
        for key, times in denied.items():
            if times:
                self._denied[key] = self._denied.get(key, 0) + times

    async def _keep_writing(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            try:
                await self.flush()
            except Exception:  # whatever it was, later ones may be written
                log.exception("denied attempts could not be written")

    async def _ended(self, kind: str, actor: str, subject: str, detail: Mapping[str, Any]) -> None:
        """What was asked is written already: that its end cannot be does not undo it."""
        try:
            await self._store.note(kind, actor, subject, detail)
        except AgentLoopError as error:
            log.error(
                "the end of an act was not written: %s",
                error,
                extra={"kind": kind, "subject": subject, **detail},
            )
