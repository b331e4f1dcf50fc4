"""OpenAI's client asks for vectors over HTTP, on fakes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from grpc_server.domain.errors import InvalidArgument, Precondition
from grpc_server.domain.types import EmbedRequest
from grpc_server.http.embeddings import embeddings_request
from tests.fakes import BASE, FakeEngine
from tests.integration.grpc_bench import Bench, until
from tests.integration.openai_bench import calling, posting


async def test_each_text_has_its_vector_in_either_encoding(tmp_path: Path) -> None:
    texts = ["one", "two", "one"]
    async with Bench().run(tmp_path) as bench, calling(bench) as client:
        floats = await client.embeddings.create(model="default", input=texts, encoding_format="float")
        encoded = await client.embeddings.create(model="default", input=texts, user="somebody")
        alone = await client.embeddings.create(model="default", input="one")
    assert (floats.model, floats.usage.prompt_tokens) == (BASE, floats.usage.total_tokens)
    assert [each.index for each in floats.data] == [0, 1, 2]
    assert floats.data[0].embedding == floats.data[2].embedding != floats.data[1].embedding
    for one, other in zip(floats.data, encoded.data, strict=True):
        assert other.embedding == pytest.approx(one.embedding, rel=1e-6)
    assert alone.data[0].embedding == encoded.data[0].embedding
    assert bench.spool.records == [], "there is no answer to learn from"


async def test_what_is_wrong_is_a_status(tmp_path: Path) -> None:
    async with Bench().run(tmp_path) as bench:
        async with calling(bench) as client:
            with pytest.raises(openai.BadRequestError) as caught:
                await client.embeddings.create(model="default", input=[])
            assert caught.value.param == "input"
            with pytest.raises(openai.BadRequestError, match="dimensions is not offered here"):
                await client.embeddings.create(model="default", input="x", dimensions=3)
            with pytest.raises(openai.NotFoundError):
                await client.embeddings.create(model="text-embedding-3-small", input="x")
            with pytest.raises(openai.PermissionDeniedError):
                await client.embeddings.create(model=BASE, input="x")
            bench.engine.down = True
            with pytest.raises(openai.InternalServerError):
                await client.embeddings.create(model="default", input="x")
        async with calling(bench, "al_feedback") as client:
            with pytest.raises(openai.PermissionDeniedError):
                await client.embeddings.create(model="default", input="x")


async def test_a_caller_who_goes_away_gives_its_place_back(tmp_path: Path) -> None:
    never, asked = asyncio.Event(), asyncio.Event()

    class Slow(FakeEngine):
        async def embed(self, *arguments: Any) -> Any:
            asked.set()
            await never.wait()

    async with Bench(Slow(parallel=1)).run(tmp_path) as bench, posting(bench) as client:
        call = asyncio.create_task(client.post("/v1/embeddings", json={"model": "default", "input": "x"}))
        await asyncio.wait_for(asked.wait(), 10)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await until(lambda: bench.inference.admission.in_flight == 0)


async def test_an_engine_that_makes_none_says_so(tmp_path: Path) -> None:
    class Without(FakeEngine):
        async def embed(self, *arguments: Any) -> Any:
            raise Precondition("this engine makes no vectors with this model version")

    async with Bench(Without()).run(tmp_path) as bench, calling(bench) as client:
        with pytest.raises(openai.ConflictError, match="makes no vectors"):
            await client.embeddings.create(model="default", input="x")


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({}, "model is missing"),
        ({"model": "default"}, "input is missing"),
        ({"model": "default", "input": 1}, "input is a number|input is a whole number"),
        ({"model": "default", "input": [[1, 2]]}, r"input\[0\] is a list; it must be text"),
        ({"model": "default", "input": ["x"] * 129}, "input has 129 texts; at most 128 are taken"),
        ({"model": "default", "input": "x", "encoding_format": "int8"}, "encoding_format is 'int8'"),
    ],
)
def test_a_request_that_is_none_is_refused(body: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidArgument, match=complaint):
        embeddings_request(body)


def test_a_request_is_ours_in_other_words() -> None:
    assert embeddings_request({"model": "agent", "input": "x"}).request == EmbedRequest(("x",), "agent")
