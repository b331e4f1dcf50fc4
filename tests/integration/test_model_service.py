"""Operators' calls on models over real gRPC: shown, loaded, unloaded, and installed within the quota."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from agentloop.v1 import model_pb2 as pb
from grpc_server.domain.types import Route, Target, TargetRole
from grpc_server.servicers import models
from tests.fakes import BASE, FakeEngine, FakeRoutes, FakeRouteStore, route_to
from tests.integration.grpc_bench import Bench, bearer, rest_of, status_of, until

NEW = "gemma-3-270m:20260102T030000Z"
READ, WRITE = bearer("al_read"), bearer("al_write")
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    canary = (Target(BASE, TargetRole.STABLE, 90), Target(NEW, TargetRole.CANARY, 10))
    routes = FakeRoutes(FakeRouteStore([route_to(), Route("agent", 1, canary)]))
    async with Bench(FakeEngine(models=(BASE, NEW, "m:idle")), routes=routes).run(tmp_path) as running:
        yield running


def gguf(path: Path, content: bytes = b"GGUF and so on", name: str = "m:new") -> pb.InstallModelRequest:
    path.write_bytes(content)
    return pb.InstallModelRequest(name=name, path=str(path), sha256=hashlib.sha256(content).hexdigest())


def streamed(request: pb.InstallModelRequest) -> pb.InstallModelStreamRequest:
    return pb.InstallModelStreamRequest(install=request)


async def test_a_version_is_shown_with_where_it_comes_from_and_who_leads_to_it(bench: Bench) -> None:
    shown = await bench.model_stub.GetModel(pb.GetModelRequest(name=NEW), metadata=READ)
    assert (shown.model.name, shown.model.loaded) == (NEW, True)
    assert (shown.details.architecture, shown.details.quantization) == ("gemma3", "Q4_K_M")
    assert (shown.details.parameters, shown.details.context_tokens) == (268_098_176, 32_768)
    assert (shown.cycle_id, shown.base, list(shown.aliases)) == ("20260102T030000Z", BASE, ["agent"])


async def test_a_base_comes_from_nothing(bench: Bench) -> None:
    shown = await bench.model_stub.GetModel(pb.GetModelRequest(name=BASE), metadata=READ)
    assert (shown.cycle_id, shown.base, list(shown.aliases)) == ("", "", ["agent", "default"])


async def test_a_version_is_loaded_and_unloaded(bench: Bench) -> None:
    load, unload = pb.LoadModelRequest(name="m:idle"), pb.UnloadModelRequest(name="m:idle")
    first = await bench.model_stub.UnloadModel(unload, metadata=WRITE)
    again = await bench.model_stub.UnloadModel(unload, metadata=WRITE)
    assert (first.changed, first.model.loaded, again.changed) == (True, False, False)
    loaded = await bench.model_stub.LoadModel(load, metadata=WRITE)
    assert (loaded.changed, loaded.model.loaded) == (True, True)
    assert not (await bench.model_stub.LoadModel(load, metadata=WRITE)).changed


async def test_a_version_that_serves_is_only_unloaded_by_force(bench: Bench) -> None:
    error = await status_of(bench.model_stub.UnloadModel(pb.UnloadModelRequest(name=NEW), metadata=WRITE))
    assert error.code() is PRECONDITION
    assert error.details() == f"route agent leads to {NEW}; set the route first, or force it"
    assert bench.engine.models[NEW].loaded
    forced = await bench.model_stub.UnloadModel(pb.UnloadModelRequest(name=NEW, force=True), metadata=WRITE)
    assert (forced.changed, forced.model.loaded) == (True, False)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("m:gone", grpc.StatusCode.NOT_FOUND),
        ("", grpc.StatusCode.INVALID_ARGUMENT),
        ("a/b:c", grpc.StatusCode.INVALID_ARGUMENT),
        ("a\0:c", grpc.StatusCode.INVALID_ARGUMENT),
        ("a" * 128 + ":c", grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_a_name_that_is_none_is_refused(bench: Bench, name: str, code: grpc.StatusCode) -> None:
    stub = bench.model_stub
    for call in (
        stub.GetModel(pb.GetModelRequest(name=name), metadata=READ),
        stub.LoadModel(pb.LoadModelRequest(name=name), metadata=WRITE),
        stub.UnloadModel(pb.UnloadModelRequest(name=name), metadata=WRITE),
    ):
        assert (await status_of(call)).code() is code


async def test_an_installation_tells_how_far_it_is_and_then_its_result(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "PROGRESS_SECONDS", 0.01)
    bench.engine.hold_install = asyncio.Event()
    call = bench.model_stub.InstallModelStream(streamed(gguf(tmp_path / "a")), metadata=WRITE)
    while (progress := (await call.read()).progress).phase == pb.INSTALL_PHASE_WAITING:
        pass
    assert progress == pb.InstallProgress(
        phase=pb.INSTALL_PHASE_COPYING, done_bytes=50, total_bytes=100, host=1, hosts=1
    )
    bench.engine.hold_install.set()
    last = (await rest_of(call))[-1]
    assert (last.installed.changed, last.installed.model.loaded) == (True, True)
    again = bench.model_stub.InstallModelStream(streamed(gguf(tmp_path / "a")), metadata=WRITE)
    assert not [response async for response in again][-1].installed.changed


async def test_whoever_cancels_an_installation_holds_up_no_other(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "PROGRESS_SECONDS", 0.01)
    bench.engine.hold_install = asyncio.Event()
    call = bench.model_stub.InstallModelStream(streamed(gguf(tmp_path / "a")), metadata=WRITE)
    await call.read()
    call.cancel()
    bench.engine.hold_install = None
    other = gguf(tmp_path / "b", name="m:other")
    assert (await bench.model_stub.InstallModel(other, metadata=WRITE, timeout=20)).changed
    assert "m:new" not in bench.engine.models


async def test_a_wrong_installation_ends_the_stream_with_its_status(bench: Bench, tmp_path: Path) -> None:
    request = gguf(tmp_path / "a")
    request.sha256 = "0" * 64
    error = await status_of(bench.model_stub.InstallModelStream(streamed(request), metadata=WRITE))
    assert error.code() is PRECONDITION
    empty = bench.model_stub.InstallModelStream(pb.InstallModelStreamRequest(), metadata=WRITE)
    assert (await status_of(empty)).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_more_bytes_than_all_versions_may_take_are_refused_with_the_numbers(tmp_path: Path) -> None:
    quota = Bench(FakeEngine(models=(BASE,)), settings={"models_max_bytes": 20})
    async with quota.run(tmp_path / "state") as bench:
        first = gguf(tmp_path / "a")
        assert (await bench.model_stub.InstallModel(first, metadata=WRITE)).changed
        error = await status_of(
            bench.model_stub.InstallModel(gguf(tmp_path / "b", name="m:more"), metadata=WRITE)
        )
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for part in ("take 15 bytes", "m:more would take 14 more", "may take 20", "remove a version"):
            assert part in (error.details() or "")
        assert not (await bench.model_stub.InstallModel(first, metadata=WRITE)).changed, "it is there already"
        missing = pb.InstallModelRequest(name="m:x", path="/not/here", sha256="0" * 64)
        assert (
            await status_of(bench.model_stub.InstallModel(missing, metadata=WRITE))
        ).code() is PRECONDITION
        await bench.model_stub.RemoveModel(pb.RemoveModelRequest(name="m:new"), metadata=WRITE)
        assert (
            await bench.model_stub.InstallModel(gguf(tmp_path / "b", name="m:more"), metadata=WRITE)
        ).changed
        await until(lambda: "m:more" in bench.engine.models)
