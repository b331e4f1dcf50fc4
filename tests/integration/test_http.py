"""Health, readiness and metrics over HTTP, on a real port."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from grpc_server.domain.errors import Precondition
from grpc_server.domain.ports import SpoolState
from grpc_server.domain.types import Status
from tests.fakes import FakeEngine, FakeLogStore, FakeRoutes, FakeRouteStore, FakeSpool
from tests.integration.grpc_bench import Bench, bearer, hello, rest_of, status_of


async def get(bench: Bench, path: str) -> httpx.Response:
    assert bench.running is not None
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.get(f"http://{bench.running.http_address}{path}")


async def test_a_server_with_all_its_parts_is_alive_and_ready(tmp_path: Path) -> None:
    async with Bench().run(tmp_path) as bench:
        assert (await get(bench, "/healthz")).json() == {"status": "alive"}
        ready = await get(bench, "/readyz")
    assert ready.status_code == 200
    state = ready.json()
    assert state["ready"] is True
    assert {name: state[name]["ok"] for name in ("engine", "spool", "store", "route")} == {
        "engine": True,
        "spool": True,
        "store": True,
        "route": True,
    }
    assert state["route"]["detail"] == "default: gemma-3-270m:base 100 %"


async def test_without_postgres_it_stays_ready_while_the_spool_has_room_and_says_so(tmp_path: Path) -> None:
    async with Bench(store=FakeLogStore(down=True)).run(tmp_path) as bench:
        await bench.chat()
        ready = await get(bench, "/readyz")
        metrics = (await get(bench, "/metrics")).text
    assert ready.status_code == 200
    assert ready.json()["store"] == {
        "ok": False,
        "detail": "Postgres is down; 2 records wait in the spool",
    }
    assert "agentloop_store_up 0.0" in metrics
    assert "agentloop_spool_records 2.0" in metrics


@pytest.mark.parametrize("part", ["engine", "spool", "route"])
async def test_without_engine_room_or_route_it_is_not_ready_and_health_says_so(
    tmp_path: Path, part: str
) -> None:
    bench = Bench()
    if part == "engine":
        bench.engine.down = True
    if part == "spool":
        bench.spool = FakeSpool(full=True)
    if part == "route":
        bench.routes = FakeRoutes(FakeRouteStore())
    async with bench.run(tmp_path):
        ready = await get(bench, "/readyz")
        assert ready.status_code == 503
        state = ready.json()
        assert (state["ready"], state[part]["ok"]) == (False, False)
        stub = health_pb2_grpc.HealthStub(bench.channel)
        response = await stub.Check(health_pb2.HealthCheckRequest())
        assert response.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_health_follows_an_engine_that_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpc_server.transports.WATCH_SECONDS", 0.01)
    bench = Bench()
    bench.engine.down = True
    async with bench.run(tmp_path):
        stub = health_pb2_grpc.HealthStub(bench.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        bench.engine.down = False
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


async def test_a_part_that_does_not_answer_or_fails_oddly_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpc_server.readiness.CHECK_SECONDS", 0.02)

    async def hangs() -> None:
        await asyncio.sleep(60)

    async def breaks() -> None:
        raise KeyError("secret")

    bench = Bench()
    bench.engine.check = hangs  # type: ignore[method-assign]
    bench.store.check = breaks  # type: ignore[method-assign]
    async with bench.run(tmp_path):
        state = (await get(bench, "/readyz")).json()
    assert state["engine"] == {"ok": False, "detail": "no answer within 0.02 s"}
    assert state["store"]["detail"].startswith("unexpected KeyError;")


async def test_metrics_are_prometheus_text_and_count_what_was_asked(tmp_path: Path) -> None:
    async with Bench().run(tmp_path) as bench:
        await bench.chat()
        response = await get(bench, "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'status="ok"' in response.text
    assert "_created" not in response.text


async def test_there_are_no_pages_that_load_scripts_from_elsewhere(tmp_path: Path) -> None:
    async with Bench().run(tmp_path) as bench:
        for path in ("/docs", "/redoc", "/openapi.json"):
            assert (await get(bench, path)).status_code == 404


@pytest.mark.parametrize("name", ["grpc_address", "http_address"])
async def test_an_address_that_others_reach_is_refused_without_encryption(tmp_path: Path, name: str) -> None:
    with pytest.raises(Precondition, match=rf"{name} is 0\.0\.0\.0:0, which other machines reach"):
        async with Bench(settings={name: "0.0.0.0:0"}).run(tmp_path):
            pass
    async with Bench(settings={name: "0.0.0.0:0", "allow_plaintext": True}).run(tmp_path) as bench:
        assert bench.running is not None


async def test_a_port_that_is_taken_is_an_error_and_leaves_nothing_open(tmp_path: Path) -> None:
    async with Bench().run(tmp_path) as bench:
        assert bench.running is not None
        taken = bench.running.grpc_address
        with pytest.raises(OSError, match=f"grpc_address {taken} cannot be had"):
            async with Bench(settings={"grpc_address": taken}).run(tmp_path):
                pass
        with pytest.raises(OSError, match="in use"):
            async with Bench(settings={"http_address": bench.running.http_address}).run(tmp_path):
                pass


async def test_while_it_shuts_down_it_is_not_ready_and_streams_finish(tmp_path: Path) -> None:
    hold = asyncio.Event()
    async with Bench(FakeEngine(hold=hold, hold_at=1), settings={"grace_seconds": 5}).run(tmp_path) as bench:
        call = bench.chat_stub.Chat(hello(), metadata=bearer("al_infer"))
        await call.read()
        watch = health_pb2_grpc.HealthStub(bench.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        closing = asyncio.create_task(bench.close_listeners())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await get(bench, "/readyz")).status_code == 503
        refused = await status_of(bench.chat_stub.Chat(hello(), metadata=bearer("al_infer")))
        assert refused.code() is grpc.StatusCode.UNAVAILABLE
        hold.set()
        assert (await rest_of(call))[-1].WhichOneof("event") == "completed"
        await closing
    assert bench.spool.ends[0].status is Status.OK


async def test_streams_that_outlast_the_grace_period_end_with_unavailable(tmp_path: Path) -> None:
    engine = FakeEngine(hold=asyncio.Event(), hold_at=1)
    async with Bench(engine, settings={"grace_seconds": 0.1}).run(tmp_path) as bench:
        call = bench.chat_stub.Chat(hello(), metadata=bearer("al_infer"))
        await call.read()
        closing = asyncio.create_task(bench.close_listeners())
        error = await status_of(call)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert error.details() == "this server shut down before the answer was complete; ask again"
        await closing
    assert bench.spool.ends[0].status is Status.ERROR


def test_a_spool_is_full_at_its_limit() -> None:
    assert SpoolState(1, 10, 0.0, 10).full
    assert not SpoolState(1, 9, 0.0, 10).full
