"""The whole server from its settings, with fakes where a test needs one to misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import grpc
import httpx
import pytest

from agentloop.v1 import inference_pb2_grpc
from grpc_server import bootstrap, first_route
from grpc_server.adapters.local_postgres import LocalPostgres
from grpc_server.adapters.ollama import OllamaEngine
from grpc_server.adapters.postgres import PostgresStore
from grpc_server.adapters.spool import FileSpool
from grpc_server.domain.errors import Precondition, StoreUnavailable
from grpc_server.domain.types import Route, TargetRole
from grpc_server.settings import Settings
from grpc_server.transports import Running
from tests import records as make
from tests.fakes import (
    BASE,
    FakeAuthenticator,
    FakeEngine,
    FakeLogReader,
    FakeLogStore,
    FakeRoutes,
    FakeRouteStore,
    FakeSpool,
    route_to,
)
from tests.integration.grpc_bench import bearer, hello, rest_of, until


def settings(state_dir: Path, **changes: Any) -> Settings:
    return Settings(
        **{
            "state_dir": state_dir,
            "grpc_address": "127.0.0.1:0",
            "http_address": "127.0.0.1:0",
            "grace_seconds": 0.2,
            "cache_seconds": 0.01,
            **changes,
        }
    )


def fakes(**changes: Any) -> dict[str, Any]:
    return {
        "store": FakeLogStore(),
        "engine": FakeEngine(),
        "spool": FakeSpool(),
        "authenticator": FakeAuthenticator(),
        "routes": FakeRoutes(),
        "reader": FakeLogReader(),
        **changes,
    }


async def get(running: Running, path: str) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.get(f"http://{running.http_address}{path}")


async def ask(address: str) -> list[Any]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        return await rest_of(stub.Chat(hello(), metadata=bearer("al_admin_token")))


async def test_what_is_answered_is_stored_and_its_addresses_are_told_while_it_runs(tmp_path: Path) -> None:
    parts = fakes()
    async with bootstrap.service(settings(tmp_path), **parts) as running:
        announced = json.loads((tmp_path / "server.json").read_text())
        assert announced == {
            "grpc_address": running.grpc_address,
            "http_address": running.http_address,
            "grpc_url": f"grpc://{running.grpc_address}",
            "http_url": f"http://{running.http_address}",
            "pid": os.getpid(),
        }
        await ask(running.grpc_address)
        await until(lambda: len(parts["store"].rows) == 2)
        text = (await get(running, "/metrics")).text
        assert 'agentloop_log_records_total{state="accepted"} 2.0' in text
        await until(lambda: parts["spool"].state().records == 0)
    assert not (tmp_path / "server.json").exists()


async def test_what_is_left_in_the_spool_is_stored_before_it_ends(tmp_path: Path) -> None:
    parts = fakes(store=FakeLogStore(down=True))
    async with bootstrap.service(settings(tmp_path), **parts) as running:
        await ask(running.grpc_address)
        assert parts["store"].rows == {}
        parts["store"].down = False
    assert len(parts["store"].rows) == 2


async def test_a_database_that_stays_down_does_not_keep_it_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bootstrap, "FLUSH_SECONDS", 0.05)
    parts = fakes(store=FakeLogStore(down=True))
    async with bootstrap.service(settings(tmp_path), **parts) as running:
        await ask(running.grpc_address)
    assert "the database did not take all records" in caplog.text


async def test_without_a_route_the_base_model_is_installed_and_both_aliases_lead_to_it(
    tmp_path: Path,
) -> None:
    base = tmp_path / "base.gguf"
    base.write_bytes(b"GGUF base")
    routes = FakeRoutes(FakeRouteStore())
    parts = fakes(engine=FakeEngine(models=()), routes=routes)
    async with bootstrap.service(settings(tmp_path / "s", base_gguf=base), **parts) as running:
        assert [route.alias for route in routes.all()] == ["agent", "default"]
        assert parts["engine"].models[BASE].loaded
        assert {by for _, by in routes.store.changes} == {"bootstrap"}
        events = await ask(running.grpc_address)
    assert events[0].started.model_version == BASE


async def test_with_a_route_the_base_model_is_left_alone(tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    base.write_bytes(b"GGUF base")
    parts = fakes(
        engine=FakeEngine(models=("m:champion",)),
        routes=FakeRoutes(FakeRouteStore([route_to("m:champion")])),
    )
    async with bootstrap.service(settings(tmp_path / "s", base_gguf=base), **parts):
        assert list(parts["engine"].models) == ["m:champion"]
    assert parts["routes"].store.changes == []


async def test_an_engine_that_lacks_the_routed_base_model_gets_it(tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    base.write_bytes(b"GGUF base")
    parts = fakes(engine=FakeEngine(name="ollama", models=()))
    async with bootstrap.service(settings(tmp_path / "s", base_gguf=base), **parts):
        assert parts["engine"].models[BASE].loaded
    assert parts["routes"].store.changes == []


async def test_the_first_route_is_set_once_the_database_is_back(tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    base.write_bytes(b"GGUF base")
    routes = FakeRoutes(FakeRouteStore(down=True))
    parts = fakes(engine=FakeEngine(models=()), routes=routes)
    async with bootstrap.service(settings(tmp_path / "s", base_gguf=base), **parts):
        assert routes.all() == []
        routes.store.down = False
        await until(lambda: len(routes.all()) == 2)


async def test_a_base_model_that_the_engine_does_not_take_is_told_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tmp_path / "base.gguf"
    base.write_bytes(b"not yet whole")
    routes = FakeRoutes(FakeRouteStore())
    parts = fakes(engine=FakeEngine(models=()), routes=routes)
    async with bootstrap.service(settings(tmp_path / "s", base_gguf=base), **parts):
        assert "the base model was not installed" in caplog.text
        base.write_bytes(b"GGUF whole")
        await until(lambda: len(routes.all()) == 2)


async def test_a_route_that_another_server_set_first_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    base = tmp_path / "base.gguf"
    base.write_bytes(b"GGUF base")

    class Hidden(FakeRoutes):
        """Another server's route, which this one has not read yet."""

        def all(self) -> list[Route]:
            return []

    routes = Hidden(FakeRouteStore([route_to("m:champion")]))
    await first_route.route_to_base(settings(tmp_path / "s", base_gguf=base), FakeEngine(models=()), routes)
    assert routes.get("default").targets[0].model_version == "m:champion"
    assert routes.get("agent").targets[0].role is TargetRole.STABLE
    assert "another server has set the route" in caplog.text


async def test_without_a_base_model_it_starts_says_so_and_is_not_ready(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = fakes(routes=FakeRoutes(FakeRouteStore()))
    async with bootstrap.service(settings(tmp_path), **parts) as running:
        response = await get(running, "/readyz")
    assert response.status_code == 503
    assert "there is no route, and no base model" in caplog.text


async def test_a_routed_version_that_does_not_load_does_not_keep_it_from_starting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = fakes(routes=FakeRoutes(FakeRouteStore([route_to("m:gone")])))
    async with bootstrap.service(settings(tmp_path), **parts):
        pass
    assert "a model version was not loaded" in caplog.text


async def test_plaintext_beyond_this_machine_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(Precondition, match="grpc_address"):
        async with bootstrap.service(settings(tmp_path / "s", grpc_address="0.0.0.0:0")):
            pass
    assert not (tmp_path / "s").exists()


async def test_with_a_database_of_its_own_it_needs_migrate_and_keeps_tokens_and_routes_in_it(
    tmp_path: Path, local_postgres: LocalPostgres
) -> None:
    dsn = local_postgres.dsn("bootstrap")
    base = tmp_path / "base.gguf"
    base.write_bytes(b"GGUF base")
    wanted = settings(tmp_path / "s", database_url=dsn, base_gguf=base)
    async with bootstrap.service(wanted, migrate=True, engine=FakeEngine(models=())) as running:
        state = (await get(running, "/readyz")).json()
        assert state["ready"] is True
        assert state["store"]["ok"] is True
    store = PostgresStore(dsn)
    await store.open()
    assert [route.alias for route in await store.all_routes()] == ["agent", "default"]
    await store.close()


async def test_a_database_that_cannot_be_migrated_is_an_error_without_the_dsn(tmp_path: Path) -> None:
    dsn = f"postgresql://u:hush@/nowhere?host={tmp_path}"
    with pytest.raises(StoreUnavailable, match="could not be brought up to date") as caught:
        async with bootstrap.service(settings(tmp_path / "s", database_url=dsn), migrate=True):
            pass
    assert "hush" not in str(caught.value)


async def test_with_a_url_of_ollama_the_engine_is_ollama(tmp_path: Path) -> None:
    wanted = settings(tmp_path, engine="ollama", ollama_url="http://127.0.0.1:9")
    async with bootstrap.engine_of(wanted) as engine:
        assert isinstance(engine, OllamaEngine)
    parts = fakes()
    del parts["engine"]
    async with bootstrap.service(wanted, **parts) as running:
        state = (await get(running, "/readyz")).json()
    assert state["engine"]["ok"] is False
    assert state["ready"] is False


async def test_serve_runs_until_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    whole = bootstrap.service
    monkeypatch.setattr(bootstrap, "service", lambda wanted, **options: whole(wanted, **fakes(), **options))
    task = asyncio.create_task(bootstrap.serve(settings(tmp_path)))
    await until(lambda: (tmp_path / "server.json").exists())
    os.kill(os.getpid(), signal.SIGTERM)
    await task
    assert "stopped" in caplog.text


async def test_a_second_signal_cuts_the_shutdown_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bootstrap.service
    parts = fakes(engine=FakeEngine(hold=asyncio.Event(), hold_at=1))
    monkeypatch.setattr(bootstrap, "service", lambda wanted, **options: whole(wanted, **parts, **options))
    task = asyncio.create_task(bootstrap.serve(settings(tmp_path, grace_seconds=600)))
    await until(lambda: (tmp_path / "server.json").exists())
    address = json.loads((tmp_path / "server.json").read_text())["grpc_address"]
    asking = asyncio.create_task(ask(address))
    await until(parts["engine"].streaming.is_set)
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(grpc.aio.AioRpcError):
        await asking
    assert len(parts["store"].rows) == 2  # what was cut off is recorded, and stored


class Loading(FakeEngine):
    """It never ends to load what is routed to; `streaming` says that it has begun."""

    async def load(self, model_version: str) -> None:
        self.streaming.set()
        await asyncio.Event().wait()


async def test_a_signal_before_it_is_ready_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    whole = bootstrap.service
    parts = fakes(engine=Loading(), store=FakeLogStore())
    parts["spool"].records.append(make.started())
    monkeypatch.setattr(bootstrap, "service", lambda wanted, **options: whole(wanted, **parts, **options))
    task = asyncio.create_task(bootstrap.serve(settings(tmp_path)))
    await until(parts["engine"].streaming.is_set)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(task, 10)
    assert "stopped" in caplog.messages
    assert "ready" not in caplog.messages
    assert len(parts["store"].rows) == 1  # what it had opened by then it closed, as after any run


async def test_a_second_signal_before_it_is_ready_forces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "FLUSH_SECONDS", 600)
    whole = bootstrap.service
    parts = fakes(engine=Loading(), store=FakeLogStore(down=True))
    parts["spool"].records.append(make.started())
    monkeypatch.setattr(bootstrap, "service", lambda wanted, **options: whole(wanted, **parts, **options))
    task = asyncio.create_task(bootstrap.serve(settings(tmp_path)))
    await until(parts["engine"].streaming.is_set)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
        await asyncio.sleep(0.05)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)


async def test_a_local_postgres_whose_start_is_cancelled_is_stopped_once_it_has_started() -> None:
    said: list[str] = []
    starting, go_on = threading.Event(), threading.Event()

    class Slow(LocalPostgres):
        def __enter__(self) -> Self:
            starting.set()
            go_on.wait(10)
            said.append("started")
            return self

        def __exit__(self, *_: object) -> None:
            said.append("stopped")

    stack = contextlib.AsyncExitStack()
    task = asyncio.create_task(stack.enter_async_context(bootstrap._started(Slow(Path("nowhere")))))
    await asyncio.to_thread(starting.wait)
    task.cancel()
    await asyncio.sleep(0.01)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert said == ["started", "stopped"]


async def test_a_second_server_is_refused_before_it_touches_the_models_of_the_first(tmp_path: Path) -> None:
    first = FileSpool(tmp_path / "spool", "one", 1 << 20)
    await first.open()
    installing = tmp_path / "models" / "versions" / "0123.gguf.partial"
    installing.parent.mkdir(parents=True)
    installing.touch()
    with pytest.raises(Precondition):
        async with bootstrap.service(settings(tmp_path), store=FakeLogStore()):
            pass
    assert installing.exists()
    await first.close()


def test_migrate_brings_the_local_database_up_to_date(places: Callable[[str], Path]) -> None:
    place = places("state")
    assert "is up to date" in bootstrap.migrate(settings(place))
    assert bootstrap.migrate(settings(place)).startswith("the local database in")


def test_migrate_brings_a_given_database_up_to_date(tmp_path: Path, local_postgres: LocalPostgres) -> None:
    dsn = local_postgres.dsn("migrated")
    assert bootstrap.migrate(settings(tmp_path, database_url=dsn)) == "the database is up to date"
