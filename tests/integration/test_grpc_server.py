"""A real gRPC server on a free port: what callers get, and what the log gets."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from agentloop.v1 import inference_pb2 as pb
from agentloop.v1 import inference_pb2_grpc
from grpc_server.domain.errors import EngineFailed, EngineUnavailable
from grpc_server.domain.types import Status
from tests.fakes import BASE, FakeEngine
from tests.integration.grpc_bench import Bench, bearer, hello, status_of, until


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with Bench().run(tmp_path) as running:
        yield running


async def test_a_chat_streams_started_text_and_completed(bench: Bench) -> None:
    events = await bench.chat()
    assert [event.WhichOneof("event") for event in events] == [
        "started",
        *["text_delta"] * 4,
        "completed",
    ]
    assert events[0].started.model_version == BASE
    assert "".join(event.text_delta.text for event in events) == "Hello, world!"
    completed = events[-1].completed
    assert completed.finish_reason == pb.FINISH_REASON_STOP
    assert (completed.usage.input_tokens, completed.usage.output_tokens) == (3, 4)
    assert str(bench.spool.ends[0].id) == events[0].started.inference_id
    assert bench.spool.starts[0].caller == "billing"


async def test_a_tool_call_arrives_as_one(tmp_path: Path) -> None:
    text = '{"name": "weather.get", "arguments": {"city": "Ålesund", "days": 2}}'
    async with Bench(FakeEngine([text[:9], text[9:]])).run(tmp_path) as bench:
        schema = json.dumps({"type": "object", "properties": {"city": {"type": "string"}}})
        tool = pb.ToolDefinition(name="weather.get", parameters_json_schema=schema)
        events = await bench.chat(hello(tools=[tool]))
    call = events[1].tool_call
    assert (call.name, json.loads(call.arguments_json)) == ("weather.get", {"city": "Ålesund", "days": 2})
    assert events[-1].completed.finish_reason == pb.FINISH_REASON_TOOL_CALLS


@pytest.mark.parametrize(
    ("fail", "code", "text"),
    [
        (EngineUnavailable("the engine is down"), grpc.StatusCode.UNAVAILABLE, "the engine is down"),
        (EngineFailed("nonsense"), grpc.StatusCode.INTERNAL, "nonsense"),
        (RuntimeError("a secret"), grpc.StatusCode.INTERNAL, "internal error; the server's log has it as"),
        (asyncio.CancelledError("a secret"), grpc.StatusCode.UNAVAILABLE, "the engine's stream broke off"),
    ],
)
async def test_an_engine_that_fails_ends_the_stream_with_its_status_and_no_secret(
    tmp_path: Path, fail: BaseException, code: grpc.StatusCode, text: str
) -> None:
    async with Bench(FakeEngine(fail=fail, hold_at=2)).run(tmp_path) as bench:
        error = await status_of(bench.chat_stub.Chat(hello(), metadata=bearer("al_infer")))
        assert error.code() is code
        assert (error.details() or "").startswith(text)
        assert "secret" not in repr(error)
        await bench.until_ended()
        assert bench.spool.ends[0].status is Status.ERROR


async def test_a_caller_is_not_told_to_have_cancelled_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cancelled(model_version: str, prompt: str) -> int:
        raise asyncio.CancelledError

    async with Bench().run(tmp_path) as bench:
        monkeypatch.setattr(bench.engine, "count_tokens", cancelled)
        request = pb.CountTokensRequest(chat=hello())
        error = await status_of(bench.chat_stub.CountTokens(request, metadata=bearer("al_infer")))
        assert error.code() is grpc.StatusCode.INTERNAL


async def test_a_caller_who_cancels_stops_the_engine_at_once(tmp_path: Path) -> None:
    async with Bench(FakeEngine(hold=asyncio.Event(), hold_at=1)).run(tmp_path) as bench:
        call = bench.chat_stub.Chat(hello(), metadata=bearer("al_infer"))
        await call.read()
        call.cancel()
        await until(lambda: not bench.engine.running and bool(bench.spool.ends), 5)
        assert bench.spool.ends[0].status is Status.CANCELLED


async def test_a_caller_who_vanishes_with_its_connection_is_logged_as_cancelled(tmp_path: Path) -> None:
    async with Bench(FakeEngine(hold=asyncio.Event(), hold_at=1)).run(tmp_path) as bench:
        call = bench.chat_stub.Chat(hello(), metadata=bearer("al_infer"))
        await call.read()
        await bench.channel.close()
        await bench.until_ended()
        assert bench.spool.ends[0].status is Status.CANCELLED


@pytest.mark.parametrize("seconds", [0.5, 1.0])
async def test_a_callers_deadline_is_logged_as_deadline(tmp_path: Path, seconds: float) -> None:
    async with Bench().run(tmp_path) as bench:
        await bench.chat()  # connected, so that the deadline is all for the call
        bench.engine.hold, bench.engine.hold_at = asyncio.Event(), 1
        error = await status_of(bench.chat_stub.Chat(hello(), metadata=bearer("al_infer"), timeout=seconds))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await bench.until_ended(2)
        assert bench.spool.ends[1].status is Status.DEADLINE
        assert bench.engine.running == 0


async def test_a_caller_without_a_deadline_gets_the_default_one(tmp_path: Path) -> None:
    engine = FakeEngine(hold=asyncio.Event(), hold_at=1)
    async with Bench(engine, settings={"default_deadline_seconds": 0.1}).run(tmp_path) as bench:
        error = await status_of(bench.chat_stub.Chat(hello(), metadata=bearer("al_infer")))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "no complete answer within 0.1 s" in (error.details() or "")
        await bench.until_ended()
        assert bench.spool.ends[0].status is Status.DEADLINE


@pytest.mark.soak
async def test_calls_that_a_stuck_server_takes_late_are_answered_not_cancelled(bench: Bench) -> None:
    assert bench.running is not None
    address, begun = bench.running.grpc_address, threading.Barrier(4)

    def ask() -> int:
        with grpc.insecure_channel(address) as channel:
            call = inference_pb2_grpc.InferenceServiceStub(channel).Chat(hello(), metadata=bearer("al_infer"))
            begun.wait(30)
            return len(list(call))

    asked = [asyncio.create_task(asyncio.to_thread(ask)) for _ in range(3)]
    await asyncio.to_thread(begun.wait, 30)
    time.sleep(32)  # noqa: ASYNC251 - the server's event loop stands still: gRPC's core gives up after 30 s
    assert await asyncio.gather(*asked) == [6, 6, 6]


async def test_health_is_open_and_serving(bench: Bench) -> None:
    stub = health_pb2_grpc.HealthStub(bench.channel)
    for service in ("", "agentloop.v1.InferenceService", "agentloop.v1.ModelService"):
        response = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert response.status == health_pb2.HealthCheckResponse.SERVING
    error = await status_of(stub.Check(health_pb2.HealthCheckRequest(service="nobody")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    error = await status_of(stub.List(health_pb2.HealthListRequest()))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
