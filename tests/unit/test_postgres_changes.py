# ruff: noqa: ASYNC110 - states that no event tells of
"""Listening for changes: each is read once more, whatever fails meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from grpc_server.adapters import postgres_changes
from grpc_server.adapters.postgres_changes import Watch
from grpc_server.domain.errors import StoreUnavailable


class Database:
    """Tells what is put into `notices`; an exception among them ends the connection."""

    def __init__(self) -> None:
        self.notices: asyncio.Queue[str | Exception] = asyncio.Queue()
        self.connections = 0
        self.closed = 0

    async def changes(self) -> AsyncGenerator[str, None]:
        self.connections += 1
        try:
            while True:
                notice = await self.notices.get()
                if isinstance(notice, Exception):
                    raise notice
                yield notice
        finally:
            self.closed += 1


class Reader:
    """Counts its reads; `hold` keeps each waiting, and `fail` is raised by the next."""

    def __init__(self) -> None:
        self.reads = 0
        self.hold = asyncio.Event()
        self.hold.set()
        self.fail: Exception | None = None

    async def read(self) -> None:
        self.reads += 1
        await self.hold.wait()
        failure, self.fail = self.fail, None
        if failure is not None:
            raise failure


@asynccontextmanager
async def watching(database: Database, **readers: Reader) -> AsyncIterator[None]:
    watch = Watch(database.changes, {name: reader.read for name, reader in readers.items()})
    task = asyncio.create_task(watch.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert database.connections == database.closed


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_changes, "FIRST_PAUSE", 0.0)


async def test_the_table_that_changed_is_read() -> None:
    database, routes, tokens = Database(), Reader(), Reader()
    async with watching(database, route=routes, api_token=tokens):
        database.notices.put_nowait("route")
        await until(lambda: routes.reads == 1)
        database.notices.put_nowait("another table, of a later version")
        database.notices.put_nowait("api_token")
        await until(lambda: tokens.reads == 1)
    assert routes.reads == 1


async def test_notices_that_come_during_a_read_cost_one_more_however_many_they_are() -> None:
    database, routes = Database(), Reader()
    routes.hold.clear()
    async with watching(database, route=routes):
        database.notices.put_nowait("route")
        await until(lambda: routes.reads == 1)
        for _ in range(1000):
            database.notices.put_nowait("route")
        await until(database.notices.empty)
        routes.hold.set()
        await until(lambda: routes.reads == 2)
        for _ in range(20):
            await asyncio.sleep(0)
    assert routes.reads == 2


@pytest.mark.parametrize("loss", [StoreUnavailable("the server went away"), RuntimeError("a bug")])
async def test_a_lost_connection_is_made_anew(loss: Exception) -> None:
    database, routes = Database(), Reader()
    async with watching(database, route=routes):
        for _ in range(5):
            database.notices.put_nowait(loss)
        database.notices.put_nowait("route")
        await until(lambda: routes.reads == 1)
    assert database.connections == 6


async def test_attempts_to_listen_become_rare_while_they_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 12:
            await asyncio.Event().wait()

    async def down() -> AsyncGenerator[str, None]:
        raise StoreUnavailable("down")
        yield ""

    monkeypatch.setattr(postgres_changes, "FIRST_PAUSE", 0.25)
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    task = asyncio.create_task(Watch(down, {}).run())
    with monkeypatch.context() as patched:
        patched.setattr("asyncio.sleep", sleep)
        for _ in range(100):
            if len(pauses) == 12:
                break
            await asyncio.wait({task}, timeout=0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert pauses[:4] == [0.25, 0.5, 1.0, 2.0]
    assert max(pauses) == pauses[-1] == postgres_changes.LONGEST_PAUSE


async def test_a_read_that_fails_is_not_the_last() -> None:
    database, routes = Database(), Reader()
    routes.fail = RuntimeError("a bug")
    async with watching(database, route=routes):
        database.notices.put_nowait("route")
        await until(lambda: routes.reads == 1)
        database.notices.put_nowait("route")
        await until(lambda: routes.reads == 2)
