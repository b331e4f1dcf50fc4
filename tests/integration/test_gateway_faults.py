"""Whatever an engine does, each accepted inference has one row, each caller a status, and the next is served.

Ollama is played by a process that does by script what the real one does seldom. The embedded engine's own
child is killed (which is what the kernel does when memory runs out), and hangs, in test_live_server.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import psycopg
import pytest

from agentloop.v1 import inference_pb2_grpc
from grpc_server.adapters.local_postgres import LocalPostgres
from tests.integration.conftest_gateway import (
    SECRET,
    STORED_SECONDS,
    Gateway,
    asked,
    database,
    served,
    server_before,
    started,
)
from tests.integration.grpc_bench import bearer, rest_of, status_of
from tests.scripted_ollama import Script, ScriptedOllama

UNAVAILABLE, INTERNAL = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL

FAULTS = {
    # name -> what the caller is told
    "reset": UNAVAILABLE,
    "cut": UNAVAILABLE,
    "close": UNAVAILABLE,
    "runner out of memory": UNAVAILABLE,
    "out of memory": UNAVAILABLE,
    "busy": UNAVAILABLE,
    "bad gateway": UNAVAILABLE,
    "teapot": INTERNAL,
    "endless line": INTERNAL,
    "endless answer": INTERNAL,
    "no JSON": INTERNAL,
    "no object": INTERNAL,
    "too deep": INTERNAL,
    "no UTF-8": INTERNAL,
    "no text": INTERNAL,
    "half a surrogate": INTERNAL,
    "no reason": INTERNAL,
    "no counts": INTERNAL,
    "negative counts": INTERNAL,
    "huge counts": INTERNAL,
    "infinite counts": INTERNAL,
}


@pytest.mark.parametrize("after", [0, 3], ids=["before the first token", "in mid-stream"])
@pytest.mark.parametrize("fault", list(FAULTS))
async def test_an_engine_that_fails_ends_its_stream_with_a_status_and_a_row_and_the_next_is_served(
    fault: str, after: int, gateway: Gateway, stub: inference_pb2_grpc.InferenceServiceStub
) -> None:
    gateway.ollama.play(Script(fault=fault, after=after))
    call = stub.Chat(asked(), metadata=bearer(gateway.token), timeout=30)
    inference_id = await started(call)
    error = await status_of(call)
    assert error.code() is FAULTS[fault], error.details()
    assert SECRET not in (error.details() or "")
    assert "internal error" not in (error.details() or ""), "an error that nobody expected"
    assert await gateway.statuses([inference_id]) == ["error"]
    [(text,)] = gateway.rows(f"SELECT error FROM inference WHERE id = '{inference_id}'")
    assert text == error.details()
    await served(gateway, stub)


@pytest.mark.parametrize("after", [0, 3], ids=["before the first token", "in mid-stream"])
async def test_an_engine_that_stalls_costs_its_caller_the_deadline_and_is_told_that_nobody_listens(
    after: int, gateway: Gateway, stub: inference_pb2_grpc.InferenceServiceStub
) -> None:
    before = gateway.ollama.seen()["left"]
    gateway.ollama.play(Script(fault="stall", after=after))
    call = stub.Chat(asked(), metadata=bearer(gateway.token), timeout=1)
    inference_id = await started(call)
    assert (await status_of(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await gateway.statuses([inference_id]) == ["deadline"]
    until = time.monotonic() + 10
    while gateway.ollama.seen()["left"] == before:
        assert time.monotonic() < until
        await asyncio.sleep(0.05)
    await served(gateway, stub)


async def test_an_engine_that_dies_under_many_streams_fails_each_of_them_once_and_serves_when_it_is_back(
    gateway: Gateway, stub: inference_pb2_grpc.InferenceServiceStub
) -> None:
    gateway.ollama.play(Script(token_ms=20))
    calls: list[Any] = [stub.Chat(asked(4096), metadata=bearer(gateway.token), timeout=60) for _ in range(16)]
    ids = [await started(call) for call in calls]
    for call in calls:
        await call.read()
    gateway.ollama.process.kill()  # type: ignore[union-attr]
    errors = [await status_of(call) for call in calls]
    assert {error.code() for error in errors} == {UNAVAILABLE}
    assert set(await gateway.statuses(ids)) == {"error"}
    down = stub.Chat(asked(), metadata=bearer(gateway.token), timeout=30)
    inference_id = await started(down)
    assert (await status_of(down)).code() is UNAVAILABLE
    assert await gateway.statuses([inference_id]) == ["error"]
    gateway.ollama.stop()
    gateway.ollama.start()
    await served(gateway, stub)


async def test_what_was_accepted_is_what_is_stored(gateway: Gateway) -> None:
    """Everything that was asked before, here and in other files."""
    url = f"http://{gateway.server.http_address}/metrics"
    until = time.monotonic() + STORED_SECONDS
    async with httpx.AsyncClient(trust_env=False) as client:
        while True:
            lines = (await client.get(url)).text.splitlines()
            counts = dict(line.rsplit(" ", 1) for line in lines if line.startswith("agentloop_log_records"))
            accepted, stored, dead = (
                float(counts[f'agentloop_log_records_total{{state="{state}"}}'])
                for state in ("accepted", "stored", "dead_lettered")
            )
            if accepted == stored:
                break
            assert time.monotonic() < until, counts
            await asyncio.sleep(0.1)
    assert dead == 0
    [(rows, ended)] = gateway.rows("SELECT count(*), count(ended_at) FROM inference")
    assert rows == ended


async def test_twenty_streams_at_a_signal_end_with_a_status_and_a_row_each(
    local_postgres: LocalPostgres, places: Callable[[str], Path]
) -> None:
    """Half of them can end within the grace period, half cannot."""
    dsn = database(local_postgres)
    with ScriptedOllama() as ollama:
        with server_before(ollama, dsn, places("signal"), grace_seconds=1.5) as server:
            token = server.token("infer", name="faults")
            ollama.play(Script(token_ms=50))
            async with grpc.aio.insecure_channel(server.grpc_address) as channel:
                stub = inference_pb2_grpc.InferenceServiceStub(channel)
                calls = [
                    stub.Chat(asked(10 if index % 2 else 4096), metadata=bearer(token), timeout=60)
                    for index in range(20)
                ]
                ids = [await started(call) for call in calls]
                server.signal(signal.SIGTERM)
                events = [await rest_of(call) for call in calls[1::2]]
                errors = [await status_of(call) for call in calls[::2]]
                assert await asyncio.to_thread(server.wait) == 0
        assert all(answer[-1].HasField("completed") for answer in events)
        assert {error.code() for error in errors} == {UNAVAILABLE}
        with psycopg.connect(dsn) as connection:
            rows = connection.execute("SELECT id::text, status FROM inference").fetchall()
        assert dict(rows) == {one: "ok" if index % 2 else "error" for index, one in enumerate(ids)}
