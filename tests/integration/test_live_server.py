"""`python -m grpc_server serve` in a process of its own: the embedded engine, Postgres, signals, tokens."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from agentloop.v1 import feedback_pb2, feedback_pb2_grpc, inference_pb2_grpc, model_pb2, model_pb2_grpc
from agentloop.v1 import inference_pb2 as pb
from grpc_server.adapters.local_postgres import LocalPostgres
from tests.integration.conftest_engine import processes_below
from tests.integration.grpc_bench import bearer, hello, rest_of, status_of
from tests.live_server import ROOT, LiveServer

WEATHER = pb.ToolDefinition(
    name="weather.get",
    description="The weather",
    parameters_json_schema=json.dumps(
        {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    ),
)


@pytest.fixture
async def channel(live_server: LiveServer) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(live_server.grpc_address) as opened:
        yield opened


@pytest.fixture(scope="session")
def token(live_server: LiveServer) -> str:
    return live_server.token("admin")


@pytest.fixture
def state(places: Callable[[str], Path], cluster: Callable[[Path], Path]) -> Path:
    """A state folder in which a server has run."""
    place = places("a place & ünïcode")
    cluster(place / "postgres")
    return place


@pytest.fixture
def own_server(state: Path, base_gguf: Path) -> Iterator[LiveServer]:
    """A server that the test may stop."""
    with LiveServer(state, base_gguf=base_gguf, grace_seconds=4) as server:
        yield server


def rows(server: LiveServer, query: str) -> list[tuple[Any, ...]]:
    with (
        LocalPostgres(server.state_dir / "postgres") as postgres,
        psycopg.connect(postgres.dsn()) as connection,
    ):
        return connection.execute(query).fetchall()


def options(**fields: Any) -> pb.SamplingOptions:
    return pb.SamplingOptions(temperature=0, **fields)


async def test_the_base_model_answers_and_the_log_has_the_row(
    live_server: LiveServer, channel: grpc.aio.Channel, token: str
) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    call = stub.Chat(hello("Name a colour.", sampling=options(max_tokens=8)), metadata=bearer(token))
    events = await rest_of(call)
    assert events[0].started.model_version == "gemma-3-270m:base"
    completed = events[-1].completed
    assert 1 <= completed.usage.output_tokens <= 8
    assert completed.usage.input_tokens > 4
    assert 0 < completed.timings.time_to_first_token_ms <= completed.timings.total_ms
    feedback = feedback_pb2_grpc.FeedbackServiceStub(channel)
    inference_id = events[0].started.inference_id
    await feedback.Submit(
        feedback_pb2.SubmitRequest(inference_id=inference_id, score=0.5), metadata=bearer(token)
    )
    until = time.monotonic() + 10
    query = f"SELECT status, caller, answer, feedback FROM learning_log WHERE inference_id = '{inference_id}'"
    while not (found := rows(live_server, query)) or not found[0][3]:
        assert time.monotonic() < until
        await asyncio.sleep(0.1)
    status, caller, answer, given = found[0]
    assert (status, caller, given[0]["score"]) == ("ok", "test", 0.5)
    assert answer["content"] == "".join(event.text_delta.text for event in events)


async def test_a_required_tool_call_is_one_even_from_an_untrained_model(
    channel: grpc.aio.Channel, token: str
) -> None:
    request = hello(
        "Weather in Oslo?",
        tools=[WEATHER],
        tool_choice=pb.TOOL_CHOICE_REQUIRED,
        sampling=options(max_tokens=64, seed=1),
    )
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    events = await rest_of(stub.Chat(request, metadata=bearer(token)))
    assert events[-1].completed.finish_reason == pb.FINISH_REASON_TOOL_CALLS
    call = events[1].tool_call
    assert call.name == "weather.get"
    assert set(json.loads(call.arguments_json)) == {"city"}


async def test_a_response_format_holds_the_answer(channel: grpc.aio.Channel, token: str) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    request = hello(
        "Is water wet?",
        response_format=pb.ResponseFormat(json_schema=json.dumps({**schema, "additionalProperties": False})),
        sampling=options(max_tokens=32),
    )
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    events = await rest_of(stub.Chat(request, metadata=bearer(token)))
    answer = json.loads("".join(event.text_delta.text for event in events))
    assert isinstance(answer["ok"], bool)


async def test_a_prompt_that_the_context_cannot_hold_is_refused_with_a_reason(
    channel: grpc.aio.Channel, token: str
) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    error = await status_of(stub.Chat(hello("word " * 5000), metadata=bearer(token)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "the context holds 1024" in (error.details() or "")


async def test_a_candidate_is_installed_routed_to_and_removed_again(
    live_server: LiveServer, channel: grpc.aio.Channel, token: str, base_gguf: Path
) -> None:
    stub = model_pb2_grpc.ModelServiceStub(channel)
    listed = await stub.ListModels(model_pb2.ListModelsRequest(), metadata=bearer(token))
    sha256 = listed.models[0].sha256
    install = model_pb2.InstallModelRequest(name="gemma-3-270m:two", path=str(base_gguf), sha256=sha256)
    first = await stub.InstallModel(install, metadata=bearer(token), timeout=60)
    again = await stub.InstallModel(install, metadata=bearer(token), timeout=60)
    assert (first.changed, again.changed, again.model.loaded) == (True, False, True)
    before = (await stub.GetRoute(model_pb2.GetRouteRequest(alias="agent"), metadata=bearer(token))).route
    canary = model_pb2.Route(
        alias="agent",
        revision=before.revision,
        targets=[
            model_pb2.Target(model_version="gemma-3-270m:base", role=model_pb2.TARGET_ROLE_STABLE, weight=0),
            model_pb2.Target(model_version="gemma-3-270m:two", role=model_pb2.TARGET_ROLE_CANARY, weight=100),
        ],
    )
    set_request = model_pb2.SetRouteRequest(route=canary)
    after = (await stub.SetRoute(set_request, metadata=bearer(token))).route
    assert after.revision == before.revision + 1
    error = await status_of(stub.SetRoute(set_request, metadata=bearer(token)))
    assert error.code() is grpc.StatusCode.ABORTED
    chat = inference_pb2_grpc.InferenceServiceStub(channel)
    request = hello("Hi", alias="agent", sampling=options(max_tokens=2))
    events = await rest_of(chat.Chat(request, metadata=bearer(token)))
    assert events[0].started.model_version == "gemma-3-270m:two"
    remove = model_pb2.RemoveModelRequest(name="gemma-3-270m:two")
    error = await status_of(stub.RemoveModel(remove, metadata=bearer(token)))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    back = model_pb2.Route(alias="agent", revision=after.revision, targets=before.targets)
    await stub.SetRoute(model_pb2.SetRouteRequest(route=back), metadata=bearer(token))
    assert (await stub.RemoveModel(remove, metadata=bearer(token))).changed
    assert not (await stub.RemoveModel(remove, metadata=bearer(token))).changed
    changes = rows(live_server, "SELECT actor, subject FROM event WHERE kind = 'route_set' ORDER BY at")
    assert changes[-2:] == [("test", "agent"), ("test", "agent")]


async def test_of_two_who_set_a_route_at_once_one_wins(channel: grpc.aio.Channel, token: str) -> None:
    stub = model_pb2_grpc.ModelServiceStub(channel)
    before = (await stub.GetRoute(model_pb2.GetRouteRequest(), metadata=bearer(token))).route
    calls = [stub.SetRoute(model_pb2.SetRouteRequest(route=before), metadata=bearer(token)) for _ in range(4)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    lost = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert len(lost) == 3
    assert {error.code() for error in lost} == {grpc.StatusCode.ABORTED}


async def test_a_revoked_token_is_refused_within_five_seconds(
    live_server: LiveServer, channel: grpc.aio.Channel
) -> None:
    arguments = ("tokens", "create", "--name", "test", "--scopes", "models:read", "--json")
    text = json.loads(live_server.run(*arguments))["token"]
    stub = model_pb2_grpc.ModelServiceStub(channel)
    await stub.ListModels(model_pb2.ListModelsRequest(), metadata=bearer(text))
    live_server.run("tokens", "revoke", text.split("_")[1])
    until = time.monotonic() + 5
    while True:
        try:
            await stub.ListModels(model_pb2.ListModelsRequest(), metadata=bearer(text))
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            return
        assert time.monotonic() < until
        await asyncio.sleep(0.2)


async def test_a_chat_with_a_revoked_token_is_refused_within_five_seconds_before_anything_is_generated(
    live_server: LiveServer, channel: grpc.aio.Channel
) -> None:
    text = live_server.token("infer", name="leaver")
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    request = hello("Hi", sampling=options(max_tokens=1))
    answered = await rest_of(stub.Chat(request, metadata=bearer(text)))
    live_server.run("tokens", "revoke", text.split("_")[1])
    until = time.monotonic() + 5
    while True:
        call: Any = stub.Chat(request, metadata=bearer(text))
        event = await read_or_none(call)
        if event is None:
            break
        answered += [event, *await rest_of(call)]
        assert time.monotonic() < until
        await asyncio.sleep(0.2)
    assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
    accepted = [event.started.inference_id for event in answered if event.HasField("started")]
    await asyncio.sleep(0.5)
    query = "SELECT inference_id::text FROM learning_log WHERE caller = 'leaver'"
    assert {one for (one,) in rows(live_server, query)} <= set(accepted)


async def read_or_none(call: Any) -> Any:
    """The first event of a stream; None where it is refused."""
    try:
        return await call.read()
    except grpc.aio.AioRpcError:
        return None


async def test_an_engine_that_dies_in_mid_answer_is_unavailable_and_has_a_row_and_comes_back(
    live_server: LiveServer, channel: grpc.aio.Channel, token: str
) -> None:
    assert live_server.process is not None
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    request = hello("Count to a million.", sampling=options(max_tokens=900))
    call: Any = stub.Chat(request, metadata=bearer(token))
    started = (await call.read()).started
    assert (await call.read()).HasField("text_delta")
    for child in processes_below(live_server.process.pid, "embedded_child"):
        child.kill()
    error = await status_of(call)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "its process died" in (error.details() or "")
    query = f"SELECT status, error FROM learning_log WHERE inference_id = '{started.inference_id}'"
    until = time.monotonic() + 10
    while not (found := rows(live_server, query)):
        assert time.monotonic() < until
        await asyncio.sleep(0.1)
    assert found == [("error", error.details())]
    again = stub.Chat(hello("Hi", sampling=options(max_tokens=2)), metadata=bearer(token))
    assert (await rest_of(again))[-1].HasField("completed")
    async with httpx.AsyncClient(base_url=f"http://{live_server.http_address}", trust_env=False) as http:
        assert (await http.get("/readyz")).status_code == 200
        assert 'error_type="EngineUnavailable"' in (await http.get("/metrics")).text


async def test_an_embedded_child_that_hangs_costs_the_deadline_and_answers_when_it_goes_on(
    live_server: LiveServer, channel: grpc.aio.Channel, token: str
) -> None:
    assert live_server.process is not None
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    call: Any = stub.Chat(
        hello("Count to a million.", sampling=options(max_tokens=2048)), metadata=bearer(token), timeout=30
    )
    await call.read()
    await call.read()
    stopped = processes_below(live_server.process.pid, "embedded_child")
    for child in stopped:
        child.send_signal(signal.SIGSTOP)
    try:
        hung: Any = stub.Chat(hello("Hi", sampling=options(max_tokens=2)), metadata=bearer(token), timeout=1)
        assert (await status_of(hung)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        call.cancel()
    finally:
        for child in stopped:
            child.send_signal(signal.SIGCONT)
    assert all(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in stopped)
    events = await rest_of(
        stub.Chat(hello("Hi", sampling=options(max_tokens=2)), metadata=bearer(token), timeout=60)
    )
    assert events[-1].HasField("completed")


def test_it_tells_its_addresses_and_is_ready(live_server: LiveServer) -> None:
    assert live_server.process is not None
    announced = json.loads(live_server.announcement.read_text())
    assert announced == {
        "grpc_address": live_server.grpc_address,
        "http_address": live_server.http_address,
        "grpc_url": f"grpc://{live_server.grpc_address}",
        "http_url": f"http://{live_server.http_address}",
        "pid": live_server.process.pid,
    }
    ready = httpx.get(f"http://{live_server.http_address}/readyz", trust_env=False)
    assert (ready.status_code, ready.json()["ready"]) == (200, True)


def test_a_second_server_on_the_same_folder_is_refused(live_server: LiveServer) -> None:
    second = LiveServer(live_server.state_dir)
    second.environment = live_server.environment
    second.log_path = live_server.state_dir / "second.log"
    announced = live_server.announcement.read_text()
    try:
        with pytest.raises(AssertionError, match="the server did not start"):
            second.start()
        assert "error:" in second.log()
        assert "Traceback" not in second.log()
    finally:
        live_server.announcement.write_text(announced)


async def test_a_signal_while_it_loads_its_model_ends_it_at_once_and_leaves_nothing(
    state: Path, base_gguf: Path
) -> None:
    server = LiveServer(state, base_gguf=base_gguf)
    command = [sys.executable, "-m", "grpc_server", "serve"]
    with server.log_path.open("ab") as log_file:
        process = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, env=server.environment, stdout=log_file, stderr=log_file
        )
    until = time.monotonic() + 60
    while not processes_below(process.pid, "embedded_child"):
        assert process.returncode is None, server.log()
        assert time.monotonic() < until
        await asyncio.sleep(0.01)
    started = processes_below(process.pid)
    process.terminate()
    assert await asyncio.wait_for(process.wait(), 30) == 0
    lines = [json.loads(line)["message"] for line in server.log().splitlines()]
    assert "ready" not in lines
    assert lines[-1] == "stopped"
    assert not server.announcement.exists()
    assert [one for one in started if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []
    assert LocalPostgres(state / "postgres").pid is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_streams_at_the_grace_period_flushes_the_spool_and_exits_with_0(
    own_server: LiveServer, number: int
) -> None:
    text = own_server.token("infer")
    async with grpc.aio.insecure_channel(own_server.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        long = hello("Count to a million.", sampling=options(max_tokens=8192, top_k=1, stop=[]))
        short = hello("Hi", sampling=options(max_tokens=1))
        call: Any = stub.Chat(long, metadata=bearer(text))
        assert (await call.read()).HasField("started")
        assert (await call.read()).HasField("text_delta")
        quick: Any = stub.Chat(short, metadata=bearer(text))
        assert (await quick.read()).HasField("started")
        watch: Any = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        own_server.signal(number)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        error = await status_of(stub.Chat(short, metadata=bearer(text)))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert (await rest_of(quick))[-1].HasField("completed")
        ending = await status_of(call)
        assert ending.code() is grpc.StatusCode.UNAVAILABLE
    assert await asyncio.to_thread(own_server.wait, 30) == 0
    assert not own_server.announcement.exists()
    statuses = rows(own_server, "SELECT status, count(*)::int FROM inference GROUP BY status ORDER BY status")
    assert statuses == [("error", 1), ("ok", 1)]
    lines = [json.loads(line) for line in own_server.log().splitlines()]
    assert lines[-1]["message"] == "stopped"
    assert "Count to a million" not in own_server.log()
    assert text not in own_server.log()


async def test_a_killed_server_starts_again_on_what_it_left_and_its_stream_is_stored_as_aborted(
    state: Path, base_gguf: Path
) -> None:
    with LiveServer(state, base_gguf=base_gguf) as server:
        text = server.token("infer")
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            whole = stub.Chat(hello("Hi", sampling=options(max_tokens=2)), metadata=bearer(text))
            await rest_of(whole)
            cut: Any = stub.Chat(hello("Count.", sampling=options(max_tokens=8192)), metadata=bearer(text))
            started = (await cut.read()).started
            await cut.read()
            server.kill()
            assert (await status_of(cut)).code() is grpc.StatusCode.UNAVAILABLE
        await asyncio.to_thread(server.start)
        query = "SELECT inference_id::text, status FROM learning_log ORDER BY started_at"
        until = time.monotonic() + 10
        while len(found := rows(server, query)) < 2:
            assert time.monotonic() < until
            await asyncio.sleep(0.1)
        assert [status for _, status in found] == ["ok", "aborted"]
        assert found[1][0] == started.inference_id
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            again = stub.Chat(hello("Hi", sampling=options(max_tokens=2)), metadata=bearer(text))
            assert (await rest_of(again))[-1].HasField("completed")


async def test_a_second_signal_does_not_wait_for_the_grace_period(state: Path, base_gguf: Path) -> None:
    with LiveServer(state, base_gguf=base_gguf, grace_seconds=600) as server:
        text = server.token("infer")
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            call = stub.Chat(
                hello("Count to a million.", sampling=options(max_tokens=8192)), metadata=bearer(text)
            )
            await call.read()
            server.signal()
            await asyncio.sleep(0.5)
            server.signal()
            assert await asyncio.to_thread(server.wait, 30) == 1
    assert "stopped by force" in server.log()
