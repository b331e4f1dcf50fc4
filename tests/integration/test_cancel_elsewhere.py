# ruff: noqa: ASYNC110 - states that no event tells of
"""Several servers on one Postgres: a cancellation reaches the one that runs it, whichever is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import grpc
import psycopg
import pytest
import pytest_asyncio
from pydantic import SecretStr

from agentloop.v1 import inference_pb2 as pb
from agentloop.v1 import inference_pb2_grpc
from grpc_server import bootstrap
from grpc_server.adapters import postgres as postgres_module
from grpc_server.adapters import postgres_cancellations
from grpc_server.adapters.local_postgres import LocalPostgres
from grpc_server.adapters.postgres import PostgresStore
from grpc_server.adapters.postgres_cancellations import PostgresCancellations
from grpc_server.adapters.postgres_changes import APPLICATION
from grpc_server.domain.errors import Exhausted, StoreUnavailable
from grpc_server.settings import Settings
from tests import records as make
from tests.fakes import FakeAuthenticator, FakeEngine, FakeRoutes
from tests.integration.conftest_gateway import database
from tests.integration.grpc_bench import TOKENS, bearer, hello, rest_of, status_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

LONG, SHORT = 30.0, 0.1
"""What others get to answer in: where they will, and where they will not."""
_LISTENING = (
    "SELECT FROM pg_stat_activity WHERE application_name = %s AND state = 'idle' "
    "AND datname = current_database()"
)


@dataclass
class Server:
    """A whole server, with an engine that holds each answer after its first piece."""

    name: str
    engine: FakeEngine
    stub: Any

    async def begin(self, token: str = "al_infer") -> tuple[Any, str]:
        """A stream that has begun, and its inference id."""
        call = self.stub.Chat(hello(), metadata=bearer(token))
        identity = (await call.read()).started.inference_id
        await call.read()
        return call, identity

    async def cancel(self, identity: str, token: str = "al_infer") -> grpc.StatusCode:
        request = pb.CancelInferenceRequest(inference_id=identity)
        try:
            await self.stub.CancelInference(request, metadata=bearer(token))
        except grpc.aio.AioRpcError as error:
            self.said = error.details() or ""
            return error.code()
        return grpc.StatusCode.OK


@dataclass
class Servers:
    dsn: str
    one: Server
    other: Server

    def query(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            cursor = connection.execute(query, values)
            return [] if cursor.description is None else cursor.fetchall()

    async def until_stored(self, identity: str, status: str) -> None:
        async with asyncio.timeout(20):
            while self.query("SELECT status FROM inference WHERE id = %s", identity) != [(status,)]:
                await asyncio.sleep(0.01)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def servers(
    local_postgres: LocalPostgres, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Servers]:
    dsn = database(local_postgres)
    async with AsyncExitStack() as stack:
        made = [await _serve(stack, dsn, name, tmp_path_factory.mktemp(name)) for name in ("one", "other")]
        servers = Servers(dsn, *made)
        async with asyncio.timeout(20):
            while len(servers.query(_LISTENING, APPLICATION)) < 2:
                await asyncio.sleep(0.01)
        yield servers


async def _serve(stack: AsyncExitStack, dsn: str, name: str, folder: Path) -> Server:
    engine = FakeEngine(hold=asyncio.Event(), hold_at=1)
    settings = Settings(
        state_dir=folder,
        grpc_address="127.0.0.1:0",
        http_address="127.0.0.1:0",
        grace_seconds=0.2,
        server_id=name,
        database_url=SecretStr(dsn),
        redaction="off",
    )
    parts: dict[str, Any] = {
        "engine": engine,
        "authenticator": FakeAuthenticator(dict(TOKENS)),
        "routes": FakeRoutes(),
    }
    running = await stack.enter_async_context(bootstrap.service(settings, **parts))
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(running.grpc_address))
    return Server(name, engine, inference_pb2_grpc.InferenceServiceStub(channel))


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_cancellations, "WAIT_SECONDS", LONG)


@pytest.mark.parametrize("token", ["al_infer", "al_admin"])
async def test_whichever_server_is_asked_the_one_that_runs_it_ends_it(servers: Servers, token: str) -> None:
    for asked, runs in ((servers.one, servers.other), (servers.other, servers.one)):
        call, identity = await runs.begin()
        assert await asked.cancel(identity, token) is grpc.StatusCode.OK
        assert (await status_of(call)).code() is grpc.StatusCode.CANCELLED
        await servers.until_stored(identity, "cancelled")
        assert servers.query("SELECT ended_by FROM cancellation WHERE inference_id = %s", identity) == [
            (runs.name,)
        ]


async def test_what_is_another_callers_or_has_ended_is_not_found_and_nobody_is_asked(
    servers: Servers,
) -> None:
    call, identity = await servers.other.begin("al_admin")
    await servers.until_stored(identity, "started")
    assert await servers.one.cancel(identity) is grpc.StatusCode.NOT_FOUND
    assert servers.other.engine.hold is not None
    servers.other.engine.hold.set()
    assert [event.WhichOneof("event") for event in await rest_of(call)][-1] == "completed"
    servers.other.engine.hold.clear()
    await servers.until_stored(identity, "ok")
    assert await servers.one.cancel(identity, "al_admin") is grpc.StatusCode.NOT_FOUND
    assert servers.query("SELECT FROM cancellation WHERE inference_id = %s", identity) == []


async def test_an_id_that_nobody_runs_is_not_found_within_the_wait(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_cancellations, "WAIT_SECONDS", SHORT)
    assert await servers.one.cancel(str(uuid4())) is grpc.StatusCode.NOT_FOUND


async def test_who_does_not_answer_is_named(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_cancellations, "WAIT_SECONDS", SHORT)
    silent = make.started(server_id="upstairs", caller="billing")
    store = PostgresStore(servers.dsn)
    await store.open()
    await store.store([silent])
    assert await servers.one.cancel(str(silent.id)) is grpc.StatusCode.UNAVAILABLE
    assert "server upstairs, by the log, which did not answer" in servers.one.said
    assert await servers.one.cancel(str(silent.id), "al_admin") is grpc.StatusCode.UNAVAILABLE
    await store.close()


async def test_a_notice_alone_ends_nothing_and_who_freezes_the_log_may_ask_for_nothing(
    servers: Servers,
) -> None:
    call, identity = await servers.one.begin()
    with psycopg.connect(servers.dsn, autocommit=True) as connection:
        connection.execute("SET ROLE agentloop_freeze")
        connection.execute("NOTIFY agentloop_changed, 'cancellation'")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(
                "INSERT INTO cancellation (id, inference_id) VALUES (%s, %s)", (uuid4(), identity)
            )
    assert await servers.other.cancel(identity) is grpc.StatusCode.OK, "it ran all the while"
    assert (await status_of(call)).code() is grpc.StatusCode.CANCELLED


async def test_what_has_begun_just_now_and_is_in_no_log_yet_is_ended_too(servers: Servers) -> None:
    store = PostgresStore(servers.dsn)
    await store.open()
    asking, running = PostgresCancellations(store, "asking"), PostgresCancellations(store, "running")
    wanted = uuid4()
    ended: list[tuple[UUID, str | None]] = []

    def end_here(inference_id: UUID, caller: str | None) -> bool:
        ended.append((inference_id, caller))
        return inference_id == wanted

    running.end_here = end_here
    task = asyncio.create_task(asking.cancel(wanted, "a\0b"))
    async with asyncio.timeout(20):
        while (wanted, "a\0b") not in ended:
            await running.look()
        await asking.look()
        assert await task
    ended.clear()
    await running.look()
    assert (wanted, "a\0b") not in ended, "once"
    await store.close()


async def test_an_answer_is_found_even_where_no_notice_came(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_cancellations, "WAIT_SECONDS", 1.0)
    call, identity = await servers.other.begin()
    store = PostgresStore(servers.dsn)
    await store.open()
    deaf = PostgresCancellations(store, "deaf")
    assert await deaf.cancel(UUID(identity), None)
    assert (await status_of(call)).code() is grpc.StatusCode.CANCELLED
    await store.close()


async def test_so_many_wait_and_no_more_and_old_ones_are_forgotten(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_cancellations, "MOST_WAITING", 2)
    monkeypatch.setattr(postgres_cancellations, "MOST_OF_A_CALLER", 1)
    servers.query(
        "INSERT INTO cancellation (id, inference_id, asked_at) VALUES (%s, %s, now() - interval '1 hour')",
        uuid4(),
        uuid4(),
    )
    store = PostgresStore(servers.dsn)
    await store.open()
    busy = PostgresCancellations(store, "busy")
    waits = [asyncio.create_task(busy.cancel(uuid4(), caller)) for caller in ("billing", None)]
    await asyncio.sleep(0)
    with pytest.raises(Exhausted, match="1 of your cancellations wait") as refused:
        await busy.cancel(uuid4(), "billing")
    assert refused.value.subject == "caller:billing"
    with pytest.raises(Exhausted, match="2 cancellations wait"):
        await busy.cancel(uuid4(), "travel-desk")
    async with asyncio.timeout(20):
        while servers.query("SELECT FROM cancellation WHERE asked_at < now() - interval '30 minutes'"):
            await asyncio.sleep(0.01)
    for task in waits:
        task.cancel()
    await asyncio.gather(*waits, return_exceptions=True)
    assert (busy._waiting, dict(busy._whose)) == ({}, {})
    await store.close()


async def test_without_a_database_who_asks_is_told_that_the_others_were_not_reached(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_module, "READ_SECONDS", 0.2)
    store = PostgresStore("postgresql://postgres@127.0.0.1:9/agentloop")
    await store.open()
    alone = PostgresCancellations(store, "alone")
    with pytest.raises(
        StoreUnavailable, match="does not run on this server, and the others could not be asked"
    ):
        await alone.cancel(uuid4(), "billing")
    await alone.look()
    assert "could not be read" in caplog.text
    await store.close()
