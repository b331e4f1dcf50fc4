# ruff: noqa: ASYNC110 - states that no event tells of
"""Two servers on one Postgres: what one changes the other knows, though it does not read by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from grpc_server.adapters import postgres_changes
from grpc_server.adapters.credentials import CachedAuthenticator, new_token
from grpc_server.adapters.postgres import PostgresStore
from grpc_server.adapters.postgres_changes import APPLICATION, ROUTES, TOKENS, Watch, changes
from grpc_server.adapters.routes import CachedRoutes
from grpc_server.domain.errors import NotFound, StoreUnavailable, Unauthenticated
from grpc_server.domain.types import Scope
from tests.fakes import route_to
from tests.integration.conftest_log import dsn, postgres

__all__ = ["dsn", "postgres"]

NEVER = 3600.0  # what is known within a test was told, not read by and by


@dataclass
class Server:
    """What one server keeps of the database."""

    store: PostgresStore
    routes: CachedRoutes
    tokens: CachedAuthenticator

    def leads_to(self, alias: str = "default") -> str:
        try:
            return self.routes.get(alias).targets[0].model_version
        except NotFound:
            return ""

    async def knows(self, token: str) -> bool:
        try:
            await self.tokens.authenticate(token)
        except Unauthenticated:
            return False
        return True


class Servers:
    """Makes servers on one database, and ends them."""

    def __init__(self, dsn: str, folder: Path, stack: AsyncExitStack) -> None:
        self.dsn = dsn
        self._folder = folder
        self._stack = stack

    async def start(self, name: str) -> Server:
        store = PostgresStore(self.dsn)
        await store.open()
        self._stack.push_async_callback(store.close)
        routes = CachedRoutes(store, self._folder / name / "routes.json", NEVER)
        tokens = CachedAuthenticator(store, self._folder / name / "tokens.json", NEVER)
        for part in (routes, tokens):
            await part.start()
            self._stack.push_async_callback(part.close)
        reads = {ROUTES: routes.changed_elsewhere, TOKENS: tokens.changed_elsewhere}
        task = asyncio.create_task(Watch(lambda: changes(self.dsn), reads).run())
        self._stack.push_async_callback(_end, task)
        return Server(store, routes, tokens)

    def listening(self) -> list[int]:
        rows = self.query(
            "SELECT pid FROM pg_stat_activity WHERE application_name = %s AND datname = current_database() "
            "AND state = 'idle'",
            APPLICATION,
        )
        return [row[0] for row in rows]

    def query(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            cursor = connection.execute(sql, values)
            return cursor.fetchall() if cursor.description else []


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def servers(dsn: str, tmp_path: Path) -> AsyncIterator[Servers]:
    async with AsyncExitStack() as stack:
        yield Servers(dsn, tmp_path, stack)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_route_that_one_server_sets_the_other_follows(servers: Servers) -> None:
    one, other = await servers.start("one"), await servers.start("other")
    await until(lambda: len(servers.listening()) == 2)
    first = await one.routes.set(route_to("gemma:1", revision=0), "ops")
    await until(lambda: other.leads_to() == "gemma:1")
    await other.routes.set(route_to("gemma:2", revision=first.revision), "ops")
    await until(lambda: one.leads_to() == "gemma:2")


async def test_a_change_made_by_hand_is_told_too(servers: Servers) -> None:
    server = await servers.start("one")
    await server.routes.set(route_to("gemma:1", revision=0), "ops")
    await until(lambda: len(servers.listening()) == 1)
    servers.query("UPDATE route_target SET model_version = 'gemma:9'")
    await until(lambda: server.leads_to() == "gemma:9")
    servers.query("TRUNCATE route CASCADE")
    await until(lambda: server.leads_to() == "")


async def test_a_token_that_is_revoked_elsewhere_is_refused(servers: Servers) -> None:
    server, elsewhere = await servers.start("one"), PostgresStore(servers.dsn)
    await elsewhere.open()
    now = datetime.now(UTC)
    token, record = new_token("billing", frozenset({Scope.INFER}), now, None)
    await elsewhere.create(record)
    assert await server.knows(token)
    await elsewhere.revoke(record.key_id, now)
    async with asyncio.timeout(20):
        while await server.knows(token):
            await asyncio.sleep(0.01)
    await elsewhere.close()


async def test_a_listener_whose_backend_is_ended_listens_again_and_misses_nothing(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = await servers.start("one"), await servers.start("other")
    await until(lambda: len(servers.listening()) == 2)
    before = set(servers.listening())
    servers.query("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) AS x (pid)", list(before))
    # Nobody hears of this one: it is read when the listeners are back.
    first = await one.routes.set(route_to("gemma:1", revision=0), "ops")
    await until(lambda: other.leads_to() == "gemma:1")
    await until(lambda: len(set(servers.listening()) - before) == 2)
    await one.routes.set(route_to("gemma:2", revision=first.revision), "ops")
    await until(lambda: other.leads_to() == "gemma:2")


async def test_without_a_listener_changes_are_read_by_and_by(servers: Servers, tmp_path: Path) -> None:
    one = await servers.start("one")
    polling = CachedRoutes(one.store, tmp_path / "polling.json", 0.05)
    await polling.start()
    await one.routes.set(route_to("gemma:1", revision=0), "ops")
    await until(lambda: [route.alias for route in polling.all()] == ["default"])
    await polling.close()


async def test_a_database_that_is_down_is_told_in_our_words() -> None:
    with pytest.raises(StoreUnavailable, match="does not answer"):
        async for _ in postgres_changes.changes("postgresql://postgres@127.0.0.1:9/agentloop"):
            raise AssertionError("nothing is told by a database that is down")
