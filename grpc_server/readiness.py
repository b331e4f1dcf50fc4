"""Whether this server can take work: asked over HTTP, told over gRPC's health service."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from grpc_server.domain.errors import AgentLoopError
from grpc_server.domain.ports import Engine, Routes, Spool

log = logging.getLogger(__name__)

CHECK_SECONDS = 5.0
"""A part that does not answer by then is down."""


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that is needed, and a sentence on it."""

    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class State:
    """Every part; `ready` is whether requests can be answered and logged."""

    ready: bool
    engine: Part
    spool: Part
    store: Part
    route: Part


class Readiness:
    """Checks every part. Postgres may be down: the spool takes what it cannot, for as long as it has room.

    `away` is why requests are refused while the engine is well: its GPU is lent to a training.
    """

    def __init__(
        self,
        engine: Engine,
        spool: Spool,
        routes: Routes,
        check_store: Callable[[], Awaitable[object]],
        away: Callable[[], str] = str,
    ) -> None:
        self._engine = engine
        self._spool = spool
        self._routes = routes
        self._check_store = check_store
        self._away = away
        self.closing = False

    async def state(self) -> State:
        """The parts as they are now, within CHECK_SECONDS."""
        engine, store = await asyncio.gather(_part(self._engine.check), _part(self._check_store))
        spool, route = self._spool_part(), self._route_part()
        if not store.ok:
            store = Part(False, f"{store.detail}; {self._spool.state().records} records wait in the spool")
        away = self._away()
        if engine.ok and away:
            engine = Part(True, away)
        ready = engine.ok and spool.ok and route.ok and not self.closing and not away
        return State(ready, engine, spool, store, route)

    def _spool_part(self) -> Part:
        state = self._spool.state()
        detail = f"{state.records} records and {state.bytes} of {state.max_bytes} bytes wait"
        return Part(False, f"full: {detail}") if state.full else Part(True, detail)

    def _route_part(self) -> Part:
        routes = self._routes.all()
        if not routes:
            return Part(False, "there is no route: install a model version and set one")
        return Part(
            True,
            "; ".join(
                f"{route.alias}: " + ", ".join(f"{t.model_version} {t.weight} %" for t in route.targets)
                for route in routes
            ),
        )


async def _part(check: Callable[[], Awaitable[object]]) -> Part:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await check()
    except TimeoutError:
        return Part(False, f"no answer within {CHECK_SECONDS:g} s")
    except AgentLoopError as error:
        return Part(False, str(error))
    except Exception as error:
        log.exception("a check failed")
        return Part(False, f"unexpected {type(error).__name__}")
    return Part(True, "answers")
