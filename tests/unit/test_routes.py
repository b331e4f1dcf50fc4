# ruff: noqa: ASYNC110 - states that no event tells of
"""Routes from memory: changed here at once, elsewhere soon, and kept through outages and restarts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from grpc_server.adapters.routes import CachedRoutes
from grpc_server.domain.errors import Conflict, NotFound, StoreUnavailable
from grpc_server.domain.types import Route, Target, TargetRole
from tests.fakes import FakeRouteStore, route_to

BEFORE = route_to("gemma:1")
CANARY = Route(
    "default",
    1,
    (Target("gemma:1", TargetRole.STABLE, 90), Target("gemma:2", TargetRole.CANARY, 10)),
)


@pytest.fixture
def store() -> FakeRouteStore:
    return FakeRouteStore([BEFORE])


@pytest.fixture
async def routes(store: FakeRouteStore, tmp_path: Path) -> AsyncIterator[CachedRoutes]:
    made = CachedRoutes(store, tmp_path / "routes.json", 3600)
    await made.start()
    yield made
    await made.close()


async def test_an_alias_leads_to_its_route(routes: CachedRoutes) -> None:
    assert routes.get("default") == BEFORE
    assert routes.all() == [BEFORE]


async def test_an_unknown_alias_is_told_with_those_that_there_are(routes: CachedRoutes) -> None:
    with pytest.raises(NotFound, match=r"'nope'.*default"):
        routes.get("nope")


async def test_a_change_made_here_acts_at_once(routes: CachedRoutes, store: FakeRouteStore) -> None:
    changed = await routes.set(CANARY, "ops")
    assert changed.revision == 2
    assert routes.get("default") == changed
    assert store.changes == [(changed, "ops")]


async def test_a_change_made_here_acts_though_the_database_goes_down_right_after(
    routes: CachedRoutes, store: FakeRouteStore
) -> None:
    real = store.set_route

    async def then_down(route: Route, changed_by: str) -> Route:
        changed = await real(route, changed_by)
        store.down = True
        return changed

    store.set_route = then_down  # type: ignore[method-assign]
    await routes.set(CANARY, "ops")
    assert routes.get("default").targets == CANARY.targets


async def test_a_lost_race_shows_what_is_in_force_now(routes: CachedRoutes, store: FakeRouteStore) -> None:
    other = await store.set_route(CANARY, "someone else")
    with pytest.raises(Conflict):
        await routes.set(CANARY, "ops")
    assert routes.get("default") == other


async def test_a_change_made_elsewhere_acts_with_the_next_read(store: FakeRouteStore, tmp_path: Path) -> None:
    routes = CachedRoutes(store, tmp_path / "routes.json", 0.001)
    await routes.start()
    changed = await store.set_route(CANARY, "another server")
    async with asyncio.timeout(5):
        while routes.get("default") != changed:
            await asyncio.sleep(0.001)
    await routes.close()


async def test_an_outage_leaves_the_routes_in_force(routes: CachedRoutes, store: FakeRouteStore) -> None:
    store.down = True
    with pytest.raises(StoreUnavailable):
        await routes.set(CANARY, "ops")
    assert routes.get("default") == BEFORE


async def test_a_restart_during_an_outage_knows_the_routes(
    routes: CachedRoutes, store: FakeRouteStore, tmp_path: Path
) -> None:
    changed = await routes.set(CANARY, "ops")
    store.down = True
    again = CachedRoutes(store, tmp_path / "routes.json", 3600)
    await again.start()
    assert again.get("default") == changed
    await again.close()


async def test_a_read_that_fails_in_an_unknown_way_is_not_the_last(
    store: FakeRouteStore, tmp_path: Path
) -> None:
    routes = CachedRoutes(store, tmp_path / "routes.json", 0.001)
    await routes.start()
    real, failures = store.all_routes, [RuntimeError("a bug")] * 2

    async def sometimes() -> list[Route]:
        if failures:
            raise failures.pop()
        return await real()

    routes._last_known._read = sometimes
    changed = replace(await store.set_route(CANARY, "another server"))
    async with asyncio.timeout(5):
        while routes.get("default") != changed:
            await asyncio.sleep(0.001)
    await routes.close()
