"""One suite for every Spool, LogStore, TokenStore and RouteStore: fakes keep what the real parts promise."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from grpc_server.adapters import postgres as postgres_module
from grpc_server.adapters.credentials import new_token
from grpc_server.adapters.postgres import PostgresStore
from grpc_server.adapters.spool import FileSpool
from grpc_server.domain.errors import AlreadyExists, Conflict, SpoolFull, StoreUnavailable
from grpc_server.domain.types import (
    Limits,
    Route,
    Scope,
    ServerStarted,
    Target,
    TargetRole,
)
from tests import records as make
from tests.fakes import FakeLogStore, FakeRouteStore, FakeSpool, FakeTokenStore
from tests.integration.conftest_log import dsn, postgres

__all__ = ["dsn", "postgres"]

DOWN = "postgresql://postgres@127.0.0.1:9/agentloop"


@pytest.fixture
async def real_store(request: pytest.FixtureRequest) -> AsyncIterator[PostgresStore]:
    made = PostgresStore(request.getfixturevalue("dsn"))
    await made.open()
    yield made
    await made.close()


@pytest.fixture
async def down_store(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[PostgresStore]:
    monkeypatch.setattr(postgres_module, "CONNECT_SECONDS", 1)
    made = PostgresStore(DOWN)
    await made.open()
    yield made
    await made.close()


def either(fake: Any) -> Any:
    """A fixture of the fake, then of the real store."""

    @pytest.fixture(params=["fake", "real"])
    def store(request: pytest.FixtureRequest) -> Any:
        return fake() if request.param == "fake" else request.getfixturevalue("real_store")

    return store


def either_down(fake: Any) -> Any:
    @pytest.fixture(params=["fake", "real"])
    def store(request: pytest.FixtureRequest) -> Any:
        return fake(down=True) if request.param == "fake" else request.getfixturevalue("down_store")

    return store


log_store, log_store_down = either(FakeLogStore), either_down(FakeLogStore)
token_store, token_store_down = either(FakeTokenStore), either_down(FakeTokenStore)
route_store, route_store_down = either(FakeRouteStore), either_down(FakeRouteStore)


# Spool


@pytest.fixture(params=["fake", "real"])
async def spool(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Any]:
    made: Any = FakeSpool() if request.param == "fake" else FileSpool(tmp_path, "server-1", 64 << 20)
    await made.open()
    yield made
    await made.close()


async def read(spool: Any, limit: int = 1000) -> list[tuple[int, Any]]:
    items = await spool.read_batch(limit)
    return [item for item in items if not isinstance(item[1], ServerStarted)]


async def test_a_spool_gives_back_what_was_appended_in_order(spool: Any) -> None:
    start = make.started()
    written = [start, make.feedback(start.id), make.ended(start.id)]
    for record in written:
        await spool.append(record)
    assert [what for _, what in await read(spool)] == written


async def test_a_spool_keeps_records_until_they_are_committed(spool: Any) -> None:
    written = [make.started() for _ in range(5)]
    for record in written:
        await spool.append(record)
    items = await read(spool)
    assert await read(spool) == items
    await spool.commit(items[2][0])
    assert [what for _, what in await read(spool)] == written[3:]


async def test_a_spool_tells_its_depth(spool: Any) -> None:
    for position, _ in await spool.read_batch(10):
        await spool.commit(position)
    assert (spool.state().records, spool.state().bytes, spool.state().oldest_seconds) == (0, 0, 0)
    await spool.append(make.started())
    assert spool.state().records == 1
    assert spool.state().bytes > 0
    assert not spool.state().full


@pytest.fixture(params=["fake", "real"])
async def full_spool(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Any, Any]]:
    """A spool without room for new work, and an inference that it accepted before."""
    accepted = make.started()
    made: Any
    if request.param == "fake":
        made = FakeSpool()
        await made.append(accepted)
        made.full = True
    else:
        made = FileSpool(tmp_path, "server-1", 20_000, end_bytes=4096)
        await made.open()
        await made.append(accepted)
        with pytest.raises(SpoolFull):
            while True:
                await made.append(make.feedback(accepted.id, comment="x" * 500))
    yield made, accepted
    await made.close()


async def test_a_full_spool_refuses_starts_and_feedback(full_spool: tuple[Any, Any]) -> None:
    spool, accepted = full_spool
    assert spool.state().full
    with pytest.raises(SpoolFull):
        await spool.append(make.started())
    with pytest.raises(SpoolFull):
        await spool.append(make.feedback(accepted.id, comment="x" * 500))


async def test_a_full_spool_takes_the_ends_of_what_it_accepted(full_spool: tuple[Any, Any]) -> None:
    spool, accepted = full_spool
    end = make.ended(accepted.id)
    await spool.append(end)
    assert (await read(spool))[-1][1] == end


# LogStore


async def test_a_log_store_takes_a_batch_and_takes_it_again(log_store: Any) -> None:
    start = make.started()
    batch = [
        ServerStarted("server-1", make.NOON),
        start,
        make.feedback(make.new_id()),
        make.ended(start.id),
    ]
    await log_store.store(batch)
    await log_store.store(batch)
    await log_store.store([])


async def test_a_log_store_takes_dead_letters(log_store: Any) -> None:
    await log_store.add_dead_letter(make.started(), "poison")


async def test_a_log_store_has_one_history(log_store: Any) -> None:
    told = await log_store.history()
    assert told.isascii() and told
    assert await log_store.history() == told


async def test_a_log_store_that_is_up_says_so(log_store: Any) -> None:
    await log_store.check()


async def test_a_log_store_that_is_down_says_so(log_store_down: Any) -> None:
    with pytest.raises(StoreUnavailable):
        await log_store_down.store([make.started()])
    with pytest.raises(StoreUnavailable):
        await log_store_down.add_dead_letter(make.started(), "poison")
    with pytest.raises(StoreUnavailable):
        await log_store_down.check()


# TokenStore

NOW = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
_, TOKEN = new_token("billing", frozenset({Scope.INFER, Scope.MODELS_READ}), NOW, NOW + timedelta(days=1))


async def test_tokens_come_back_as_they_were_stored(token_store: Any) -> None:
    assert await token_store.all_tokens() == []
    _, forever = new_token("agent 'x' é", frozenset(Scope), NOW + timedelta(seconds=1), None)
    await token_store.create(TOKEN)
    await token_store.create(forever)
    assert await token_store.all_tokens() == [TOKEN, forever]


async def test_a_token_is_revoked_once(token_store: Any) -> None:
    await token_store.create(TOKEN)
    assert await token_store.revoke(TOKEN.key_id, NOW)
    assert not await token_store.revoke(TOKEN.key_id, NOW + timedelta(days=1))
    assert not await token_store.revoke("nobody", NOW)
    assert await token_store.all_tokens() == [replace(TOKEN, revoked_at=NOW)]


@pytest.mark.parametrize(("learning", "text"), [(True, True), (False, True), (True, False)])
async def test_whether_a_tokens_caller_is_learned_from_and_logged_is_kept(
    token_store: Any, learning: bool, text: bool
) -> None:
    token = replace(TOKEN, learning=learning, text=text)
    await token_store.create(token)
    (kept,) = await token_store.all_tokens()
    assert kept == token
    assert (kept.caller().learning, kept.caller().text) == (learning and text, text)


async def test_a_tokens_limits_are_kept_changed_and_lifted(token_store: Any) -> None:
    limits = Limits(10, 20_000, 3, frozenset({"default", "agent"}))
    await token_store.create(replace(TOKEN, limits=limits))
    assert await token_store.all_tokens() == [replace(TOKEN, limits=limits)]
    other = Limits(requests_per_minute=1, aliases=frozenset({"agent"}))
    assert await token_store.limit(TOKEN.key_id, other)
    assert await token_store.all_tokens() == [replace(TOKEN, limits=other)]
    assert await token_store.limit(TOKEN.key_id, Limits())
    assert await token_store.all_tokens() == [TOKEN]
    assert not await token_store.limit("nobody", other)
    await token_store.revoke(TOKEN.key_id, NOW)
    assert not await token_store.limit(TOKEN.key_id, other)


async def test_a_key_id_is_taken_once(token_store: Any) -> None:
    await token_store.create(TOKEN)
    with pytest.raises(AlreadyExists, match=TOKEN.key_id):
        await token_store.create(replace(TOKEN, name="other"))


async def test_a_token_store_that_is_down_says_so(token_store_down: Any) -> None:
    with pytest.raises(StoreUnavailable):
        await token_store_down.all_tokens()
    with pytest.raises(StoreUnavailable):
        await token_store_down.create(TOKEN)
    with pytest.raises(StoreUnavailable):
        await token_store_down.revoke(TOKEN.key_id, NOW)
    with pytest.raises(StoreUnavailable):
        await token_store_down.limit(TOKEN.key_id, Limits())


# RouteStore

FIRST = Route("default", 0, (Target("gemma:1", TargetRole.STABLE, 100),))
CANARY = (
    Target("gemma:1", TargetRole.STABLE, 90),
    Target("gemma:2", TargetRole.CANARY, 10),
    Target("gemma:3", TargetRole.SHADOW, 0),
)


async def test_a_route_is_set_and_changed_by_revision(route_store: Any) -> None:
    assert await route_store.all_routes() == []
    first = await route_store.set_route(FIRST, "ops")
    assert first == replace(FIRST, revision=1)
    second = await route_store.set_route(replace(first, targets=CANARY), "ops")
    assert (second.revision, second.targets) == (2, CANARY)
    other = await route_store.set_route(replace(FIRST, alias="agent"), "ops")
    assert await route_store.all_routes() == [other, second]


@pytest.mark.parametrize("revision", [0, 1, 3])
async def test_a_route_that_changed_meanwhile_is_not_overwritten(route_store: Any, revision: int) -> None:
    first = await route_store.set_route(FIRST, "ops")
    second = await route_store.set_route(replace(first, targets=CANARY), "ops")
    with pytest.raises(Conflict, match="revision 2"):
        await route_store.set_route(replace(FIRST, revision=revision), "ops")
    assert await route_store.all_routes() == [second]


async def test_a_revision_of_a_route_that_is_not_there_is_a_conflict(route_store: Any) -> None:
    with pytest.raises(Conflict):
        await route_store.set_route(replace(FIRST, revision=1), "ops")
    assert await route_store.all_routes() == []


async def test_a_route_store_that_is_down_says_so(route_store_down: Any) -> None:
    with pytest.raises(StoreUnavailable):
        await route_store_down.all_routes()
    with pytest.raises(StoreUnavailable):
        await route_store_down.set_route(FIRST, "ops")
