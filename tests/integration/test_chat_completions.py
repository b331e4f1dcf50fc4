"""OpenAI's own client against this server over HTTP, on fakes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionToolParam

from grpc_server.domain.errors import EngineFailed, EngineUnavailable, Exhausted
from grpc_server.domain.types import (
    Caller,
    FinishReason,
    Limits,
    Priority,
    Route,
    Scope,
    Status,
    Target,
    TargetRole,
)
from tests.fakes import BASE, FakeEngine, FakeRoutes, FakeRouteStore, FakeSpool, route_to
from tests.integration.grpc_bench import Bench, until
from tests.integration.openai_bench import HELLO, calling, posting

WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = '{"name": "weather", "arguments": {"city": "Bodø"}}'


async def test_a_whole_answer_carries_the_inferences_id_its_version_and_its_tokens(tmp_path: Path) -> None:
    async with Bench().run(tmp_path) as bench, calling(bench) as client:
        answer = await client.chat.completions.create(model="default", messages=HELLO, user="s-1")
    start = bench.spool.starts[0]
    assert answer.id == answer._request_id == str(start.id)
    assert answer.model == BASE
    assert answer.choices[0].message.content == "Hello, world!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    assert abs(answer.created - start.started_at.timestamp()) < 60
    assert (start.caller, start.alias, start.session_id) == ("billing", "default", "s-1")
    assert bench.spool.ends[0].status is Status.OK


async def test_a_stream_brings_pieces_then_the_reason_then_the_usage(tmp_path: Path) -> None:
    async with Bench().run(tmp_path) as bench, calling(bench) as client:
        stream = await client.chat.completions.create(
            model="default", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert {chunk.id for chunk in chunks} == {str(bench.spool.starts[0].id)}
    assert stream.response.headers["x-request-id"] == chunks[0].id
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert pieces == ["", "Hello", ", ", "world", "!", None]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 4)


async def test_without_the_wish_a_stream_has_no_usage_and_ends_with_done(tmp_path: Path) -> None:
    body = {"model": "default", "messages": HELLO, "stream": True}
    async with Bench().run(tmp_path) as bench, posting(bench) as client:
        response = await client.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(event[6:]) for event in events[:-2])


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_tool_call_comes_as_one_and_its_answer_goes_back(tmp_path: Path, streamed: bool) -> None:
    async with Bench(FakeEngine([CALL])).run(tmp_path) as bench, calling(bench) as client:
        if streamed:
            async with client.chat.completions.stream(
                model="default", messages=HELLO, tools=[WEATHER]
            ) as stream:
                answer: Any = await stream.get_final_completion()
        else:
            answer = await client.chat.completions.create(model="default", messages=HELLO, tools=[WEATHER])
        message = answer.choices[0].message
        call = message.tool_calls[0]
        assert answer.choices[0].finish_reason == "tool_calls"
        assert not message.content
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Bodø"})
        bench.engine.reply = ["4 degrees"]
        told = {"role": "tool", "tool_call_id": call.id, "content": "4"}
        history = [*HELLO, message.model_dump(exclude={"parsed"}, exclude_none=True), told]
        for each in history[1].get("tool_calls", []):
            each["function"].pop("parsed_arguments", None)
        again = await client.chat.completions.create(model="default", messages=history, tools=[WEATHER])
    assert again.choices[0].message.content == "4 degrees"
    assert "weather returned: 4" in bench.engine.asked[-1].prompt


async def test_a_schema_reaches_the_engine_and_a_limit_is_told(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    engine = FakeEngine(['{"a":', " 1}"], finish_reason=FinishReason.LENGTH)
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    async with Bench(engine).run(tmp_path) as bench, calling(bench) as client:
        answer = await client.chat.completions.create(
            model="default",
            messages=HELLO,
            response_format=form,
            max_completion_tokens=2,
            seed=7,
            stop=["}}"],
            temperature=0,
        )
    asked = bench.engine.asked[0]
    assert (asked.json_schema, asked.sampling.max_tokens, asked.sampling.seed) == (schema, 2, 7)
    assert "}}" in asked.stop
    assert answer.choices[0].finish_reason == "length"


async def test_models_are_the_aliases_and_with_the_scope_the_versions(tmp_path: Path) -> None:
    async with Bench().run(tmp_path) as bench:
        async with calling(bench) as client:
            assert [model.id async for model in client.models.list()] == ["default"]
            assert (await client.models.retrieve("default")).owned_by == "agent-loop"
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve(BASE)
        async with calling(bench, "al_read") as client:
            assert [model.id async for model in client.models.list()] == ["default", BASE]
            assert (await client.models.retrieve(BASE)).id == BASE
            bench.engine.down = True
            with pytest.raises(openai.InternalServerError):
                await client.models.list()
        async with calling(bench, "al_feedback") as client:
            with pytest.raises(openai.PermissionDeniedError):
                await client.models.list()


async def test_a_caller_sees_the_aliases_that_it_may_name_and_its_quota_is_a_429(tmp_path: Path) -> None:
    limits = Limits(requests_per_minute=1, aliases=frozenset({"agent"}))
    bench = Bench(routes=FakeRoutes(FakeRouteStore([route_to(), route_to(alias="agent")])))
    bench.authenticator.callers["al_few"] = Caller("k", "few", frozenset({Scope.INFER}), limits=limits)
    async with bench.run(tmp_path), calling(bench, "al_few") as client:
        assert [model.id async for model in client.models.list()] == ["agent"]
        with pytest.raises(openai.PermissionDeniedError, match="only: agent"):
            await client.chat.completions.create(model="default", messages=HELLO)
        await client.chat.completions.create(model="agent", messages=HELLO)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model="agent", messages=HELLO)
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 61  # whole seconds, rounded up


async def test_a_version_is_for_administrators(tmp_path: Path) -> None:
    async with Bench().run(tmp_path) as bench:
        async with calling(bench) as client:
            with pytest.raises(openai.PermissionDeniedError, match="model_version needs the scope admin"):
                await client.chat.completions.create(model=BASE, messages=HELLO)
        async with calling(bench, "al_admin") as client:
            assert (await client.chat.completions.create(model=BASE, messages=HELLO)).model == BASE


async def test_a_request_that_is_wrong_names_its_field(tmp_path: Path) -> None:
    async with Bench().run(tmp_path) as bench, calling(bench) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="default", messages=HELLO, n=2)
        assert (caught.value.param, caught.value.type) == ("n", "invalid_request_error")
        with pytest.raises(openai.BadRequestError, match="top_p is 0; it must be above 0") as caught:
            await client.chat.completions.create(model="default", messages=HELLO, top_p=0)
        assert caught.value.param == "top_p"
        with pytest.raises(openai.NotFoundError, match="there is no alias gpt-4o") as missing:
            await client.chat.completions.create(model="gpt-4o", messages=HELLO)
        assert missing.value.code == "model_not_found"
    assert bench.spool.records == []


@pytest.mark.parametrize(
    ("bench", "error", "wait"),
    [
        (Bench(spool=FakeSpool(full=True)), openai.RateLimitError, True),
        (Bench(FakeEngine(fail=Exhausted("the engine is full"))), openai.RateLimitError, False),
        (Bench(FakeEngine(fail=EngineUnavailable("the engine is down"))), openai.InternalServerError, False),
        (Bench(FakeEngine(fail=EngineFailed("nonsense"))), openai.InternalServerError, False),
        (Bench(FakeEngine(fail=KeyError("secret"))), openai.InternalServerError, False),
    ],
    ids=["spool full", "engine full", "engine down", "engine broken", "unexpected"],
)
async def test_a_failure_before_the_answer_is_a_status(
    tmp_path: Path, bench: Bench, error: type[openai.APIStatusError], wait: bool
) -> None:
    async with bench.run(tmp_path), calling(bench) as client:
        with pytest.raises(error) as caught:
            await client.chat.completions.create(model="default", messages=HELLO)
        assert "secret" not in str(caught.value)
        begun = bench.spool.starts
        assert caught.value.request_id == (str(begun[0].id) if begun else None)


@pytest.mark.parametrize("fail", [EngineUnavailable("the engine's stream broke off"), KeyError("secret")])
async def test_a_failure_in_a_stream_is_its_last_event(tmp_path: Path, fail: Exception) -> None:
    async with Bench(FakeEngine(fail=fail, hold_at=2)).run(tmp_path) as bench, calling(bench) as client:
        stream = await client.chat.completions.create(model="default", messages=HELLO, stream=True)
        pieces = []
        with pytest.raises(openai.APIError) as caught:
            async for chunk in stream:
                pieces.append(chunk.choices[0].delta.content)
    assert pieces == ["", "Hello", ", "]
    assert "secret" not in caught.value.message
    assert bench.spool.ends[0].status is Status.ERROR


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_caller_who_goes_away_stops_the_engine_and_is_logged_as_cancelled(
    tmp_path: Path, streamed: bool
) -> None:
    engine = FakeEngine(hold=asyncio.Event(), hold_at=2)
    body = {"model": "default", "messages": HELLO, "stream": streamed}
    async with Bench(engine).run(tmp_path) as bench, posting(bench) as client:
        call = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        await asyncio.wait_for(engine.streaming.wait(), 10)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await bench.until_ended()
        assert engine.running == 0
    assert bench.spool.ends[0].status is Status.CANCELLED
    assert bench.spool.ends[0].answer["content"] == "Hello, "


async def test_a_caller_who_goes_away_while_it_waits_leaves_the_queue(tmp_path: Path) -> None:
    engine = FakeEngine(parallel=1, hold=asyncio.Event())
    body = {"model": "default", "messages": HELLO}
    async with Bench(engine).run(tmp_path) as bench, posting(bench) as client:
        calls = [asyncio.create_task(client.post("/v1/chat/completions", json=body)) for _ in range(2)]
        await asyncio.wait_for(engine.streaming.wait(), 10)
        await until(lambda: 'agentloop_queued{priority="interactive"} 1.0' in bench.metrics.text().decode())
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await until(lambda: 'agentloop_queued{priority="interactive"} 0.0' in bench.metrics.text().decode())
        await bench.until_ended()
        await until(lambda: engine.running == 0)


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_answer_that_takes_longer_than_its_deadline_is_ended(tmp_path: Path, streamed: bool) -> None:
    engine = FakeEngine(hold=asyncio.Event(), hold_at=1)
    body = {"model": "default", "messages": HELLO, "stream": streamed}
    async with Bench(engine).run(tmp_path) as bench, posting(bench) as client:
        headers = {"x-deadline-seconds": "0.2"}
        response = await client.post("/v1/chat/completions", json=body, headers=headers)
    assert response.status_code == (200 if streamed else 504)
    error = json.loads(response.text.split("data: ")[-1])["error"]
    assert error["message"] == "no complete answer within 0.2 s"
    assert bench.spool.ends[0].status is Status.DEADLINE


async def test_a_priority_is_a_header_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    hold = asyncio.Event()
    async with Bench(FakeEngine(hold=hold, parallel=1)).run(tmp_path) as bench, calling(bench) as client:

        async def ask(priority: str) -> None:
            headers = {"x-agentloop-priority": priority}
            await client.chat.completions.create(model="default", messages=HELLO, extra_headers=headers)

        waiting = [asyncio.create_task(ask("interactive")), asyncio.create_task(ask("batch"))]
        await until(lambda: bench.inference.admission.queued_of(Priority.BATCH) == 1)
        with pytest.raises(openai.BadRequestError, match="must be one of interactive, batch"):
            await ask("urgent")
        hold.set()
        await asyncio.gather(*waiting)


async def test_a_shutdown_lets_a_stream_know_why_it_ends(tmp_path: Path) -> None:
    engine = FakeEngine(hold=asyncio.Event(), hold_at=1)
    async with (
        Bench(engine, settings={"grace_seconds": 0.1}).run(tmp_path) as bench,
        calling(bench) as client,
    ):
        stream = await client.chat.completions.create(model="default", messages=HELLO, stream=True)
        closing = asyncio.create_task(bench.close_listeners())
        with pytest.raises(openai.APIError, match="this server shut down before the answer was complete"):
            async for _ in stream:
                pass
        await closing


async def test_a_session_stays_with_its_version(tmp_path: Path) -> None:
    versions = [f"m:{number}" for number in (1, 2)]
    targets = (Target("m:1", TargetRole.STABLE, 50), Target("m:2", TargetRole.CANARY, 50))
    routes = FakeRoutes(FakeRouteStore([Route("default", 1, targets)]))
    made = Bench(FakeEngine(models=versions), routes=routes)
    async with made.run(tmp_path) as bench, calling(bench) as client:
        for session in ("a", "b", "c"):
            named = {"session_id": session}
            answers = [
                await client.chat.completions.create(model="default", messages=HELLO, metadata=named)
                for _ in range(3)
            ]
            assert len({answer.model for answer in answers}) == 1
