"""Generate, CountTokens, Embed and CancelInference over the wire, by both clients where they differ."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from agentloop import AsyncClient, Client, Message, errors
from agentloop.types import Completed, Sampling, Started, TextDelta
from agentloop.v1 import inference_pb2 as pb
from grpc_server.domain.types import Status
from tests.fakes import BASE, FakeEngine
from tests.integration.grpc_bench import Bench, bearer, hello, rest_of, status_of


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with Bench().run(tmp_path) as running:
        yield running


def client(bench: Bench, token: str = "al_infer") -> AsyncClient:
    assert bench.running is not None
    return AsyncClient(bench.running.grpc_address, token)


async def test_a_continuation_streams_and_is_logged(bench: Bench) -> None:
    async with client(bench) as caller:
        events = [
            event async for event in caller.generate("Once upon", sampling=Sampling(max_tokens=3, seed=1))
        ]
    assert isinstance(events[0], Started)
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == "Hello, world"
    assert isinstance(events[-1], Completed)
    [start] = bench.spool.starts
    assert (str(start.id), start.caller) == (events[0].inference_id, "billing")
    assert start.request["prompt"] == "Once upon"


async def test_the_plain_client_does_the_same(bench: Bench) -> None:
    def use() -> tuple[list[str], int, int, tuple[int, ...], str]:
        assert bench.running is not None
        with Client(bench.running.grpc_address, "al_infer") as plain:
            text = [event.text for event in plain.generate("Once") if isinstance(event, TextDelta)]
            made = plain.embed(["a b", "c"])
            chat = plain.count_tokens([Message("user", "one two")])
            raw = plain.count_prompt_tokens("one two three")
            with pytest.raises(errors.NotFound):
                plain.cancel("018f0000-0000-7000-8000-000000000000")
            lengths = tuple(len(vector) for vector in made.vectors)
            return text, chat.input_tokens, raw.input_tokens, lengths, made.model_version

    text, chat, raw, lengths, version = await asyncio.to_thread(use)
    assert "".join(text) == "Hello, world!"
    assert (raw, lengths, version) == (3, (8, 8), BASE)
    assert chat > 2


async def test_tokens_are_counted_as_the_answer_then_counts_them(bench: Bench) -> None:
    async with client(bench) as caller:
        counted = await caller.count_tokens("one two three")
        answer = await caller.ask("one two three")
        raw = await caller.count_prompt_tokens("one two three")
    assert counted.input_tokens == answer.completed.input_tokens
    assert (counted.model_version, raw.input_tokens) == (BASE, 3)
    assert len(bench.spool.starts) == 1, "only the answer is in the log"


async def test_what_is_wrong_with_a_request_to_be_counted_is_told_by_its_whole_path(bench: Bench) -> None:
    stub, metadata = bench.chat_stub, bearer("al_infer")
    wrong = {
        "chat.messages": pb.CountTokensRequest(chat=pb.ChatRequest()),
        "chat.messages[0].role": pb.CountTokensRequest(chat=pb.ChatRequest(messages=[pb.Message()])),
        "generate.prompt": pb.CountTokensRequest(generate=pb.GenerateRequest()),
        "request": pb.CountTokensRequest(),
    }
    for field, request in wrong.items():
        error = errors.from_grpc(await status_of(stub.CountTokens(request, metadata=metadata)))
        assert [violation.field for violation in error.field_violations] == [field]


async def test_vectors_come_with_their_tokens_and_their_version(bench: Bench) -> None:
    async with client(bench) as caller:
        made = await caller.embed(["a b", "a b", "c"])
        with pytest.raises(errors.ConfigurationError, match="list"):
            await caller.embed("a b")
    assert made.vectors[0] == made.vectors[1] != made.vectors[2]
    assert (made.input_tokens, made.model_version) == (5, BASE)
    assert bench.spool.records == []
    text = bench.metrics.text().decode()
    assert f'agentloop_embedded_texts_total{{model_version="{BASE}"}} 3.0' in text


async def test_a_cancelled_inference_ends_its_stream_with_cancelled_and_its_tokens(tmp_path: Path) -> None:
    async with Bench(FakeEngine(hold=asyncio.Event(), hold_at=2)).run(tmp_path) as bench:
        call = bench.chat_stub.Chat(hello(), metadata=bearer("al_infer"))
        identity = (await call.read()).started.inference_id
        await bench.engine.streaming.wait()
        async with client(bench, "al_admin") as admin:
            await admin.cancel(identity)
        error = await status_of(call)
        assert error.code() is grpc.StatusCode.CANCELLED
        told = errors.from_grpc(error)
        assert isinstance(told, errors.Cancelled)
        assert (told.reason, told.inference_id) == ("CANCELLED", identity)
        assert (told.input_tokens, told.output_tokens) == (3, 2)
        assert bench.spool.ends[0].status is Status.CANCELLED
        async with client(bench) as caller:
            with pytest.raises(errors.NotFound):
                await caller.cancel(identity)


async def test_a_callers_own_cancelled_call_is_logged_with_its_tokens(tmp_path: Path) -> None:
    async with Bench(FakeEngine(hold=asyncio.Event(), hold_at=2)).run(tmp_path) as bench:
        call = bench.chat_stub.Generate(
            pb.GenerateRequest(prompt="one two three four"), metadata=bearer("al_infer")
        )
        await call.read()
        await bench.engine.streaming.wait()
        call.cancel()
        await bench.until_ended()
        [end] = bench.spool.ends
        assert (end.usage.input_tokens, end.usage.output_tokens) == (4, 2)


async def test_an_answer_that_failed_half_way_tells_its_tokens_in_the_status(tmp_path: Path) -> None:
    from grpc_server.domain.errors import EngineUnavailable

    engine = FakeEngine(fail=EngineUnavailable("the engine is down"), hold_at=3, tells=True)
    async with Bench(engine).run(tmp_path) as bench, client(bench) as caller:
        with pytest.raises(errors.Unavailable) as failed:
            await caller.ask("Hi")
        assert (failed.value.input_tokens, failed.value.output_tokens) == (3, 3)
        assert failed.value.inference_id == str(bench.spool.ends[0].id)


async def test_an_id_that_is_none_is_a_wrong_field(bench: Bench) -> None:
    async with client(bench) as caller:
        for wrong in ("", "abc", "{018f0000-0000-7000-8000-000000000000}", "x" * 10_000):
            with pytest.raises(errors.InvalidArgument) as refused:
                await caller.cancel(wrong)
            assert refused.value.field_violations[0].field == "inference_id"


async def test_a_raw_prompt_of_a_mebibyte_is_taken_and_one_byte_more_is_not(bench: Bench) -> None:
    stub, metadata = bench.chat_stub, bearer("al_infer")
    most = pb.GenerateRequest(prompt="x" * 2**20)
    assert await rest_of(stub.Generate(most, metadata=metadata))
    most.prompt += "x"
    error = await status_of(stub.Generate(most, metadata=metadata))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
