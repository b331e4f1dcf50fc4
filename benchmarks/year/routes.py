"""The real store: records of the log, and what serves, changed in two steps as a rollout changes it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from grpc_server import store_cli
from grpc_server.adapters.postgres import PostgresStore
from grpc_server.domain.errors import Conflict, StoreUnavailable
from grpc_server.domain.types import LogRecord, Route, Target, TargetRole

T = TypeVar("T")
ALIAS, BY = "default", "year"
CANARY_WEIGHT = 10
TRIES = 20


def begin(dsn: str, version: str) -> None:
    """Route everything to a version, unless there is a route."""
    with suppress(Conflict):
        on_store(dsn, lambda store: store.set_route(_all_to(version, 0), BY))


def serving(dsn: str) -> str:
    """The stable version of the route."""
    (route,) = on_store(dsn, lambda store: store.all_routes())
    return route.targets[0].model_version


def roll_out(dsn: str, candidate: str) -> None:
    """A tenth of the traffic first, then all of it; a rollout that was killed goes on where it stood."""

    async def change(store: PostgresStore) -> None:
        (now,) = await store.all_routes()
        if now.targets[0].model_version == candidate:
            return
        if len(now.targets) == 1:
            stable = Target(now.targets[0].model_version, TargetRole.STABLE, 100 - CANARY_WEIGHT)
            both = (stable, Target(candidate, TargetRole.CANARY, CANARY_WEIGHT))
            now = await store.set_route(Route(ALIAS, now.revision, both), BY)
        await store.set_route(_all_to(candidate, now.revision), BY)

    on_store(dsn, change)


def stored(dsn: str, records: Sequence[LogRecord]) -> None:
    """Store records. Raises ValueError for what the log will never take."""

    async def store_all(store: PostgresStore) -> None:
        await store.store(records)

    on_store(dsn, store_all)


def on_store(dsn: str, work: Callable[[PostgresStore], Awaitable[T]]) -> T:
    """What `work` gives, on a store of its own; tried again, as servers do, if none answers.

    Raises:
        StoreUnavailable: if it has not answered however often it was tried.
    """
    for _ in range(TRIES - 1):
        try:
            return asyncio.run(store_cli.on_store(dsn, work))
        except StoreUnavailable:
            time.sleep(1)
    return asyncio.run(store_cli.on_store(dsn, work))


def _all_to(version: str, revision: int) -> Route:
    return Route(ALIAS, revision, (Target(version, TargetRole.STABLE, 100),))
