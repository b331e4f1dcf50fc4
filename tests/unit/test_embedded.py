"""What the embedded adapter makes of odd answers, what it asks, and what its child is told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from grpc_server.adapters import embedded_child
from grpc_server.adapters.embedded import EmbeddedEngine
from grpc_server.adapters.embedded_child import ChildOptions, server_parameters
from grpc_server.adapters.http_client import http_client
from grpc_server.adapters.json_schema import Schemas
from grpc_server.domain.errors import (
    AgentLoopError,
    EngineFailed,
    EngineUnavailable,
    InvalidArgument,
)
from grpc_server.domain.ports import Finished, Generation, Piece
from grpc_server.domain.types import Embeddings, FinishReason, Sampling, Usage
from tests.fakes import FakeSchemaProcess

LAST = {"content": "", "stop": True, "stop_type": "eos", "tokens_evaluated": 3, "tokens_predicted": 2}


class StubChild:
    """A child that a MockTransport plays."""

    alive = True

    def __init__(self, handler: Callable[[httpx.Request], httpx.Response]) -> None:
        self.client = http_client("http://child", httpx.Timeout(5), transport=httpx.MockTransport(handler))

    async def settle(self) -> None:
        self.alive = False


class StubbedEngine(EmbeddedEngine):
    """The engine, with one child for every version."""

    child: StubChild

    async def _child(self, model_version: str, *, embedding: bool = False) -> Any:
        return self.child


def engine_that(answer: httpx.Response | Callable[[httpx.Request], httpx.Response]) -> StubbedEngine:
    engine = StubbedEngine(Path("nowhere"), schemas=Schemas(FakeSchemaProcess()))
    engine.child = StubChild((lambda _: answer) if isinstance(answer, httpx.Response) else answer)
    return engine


def sse(*events: Any) -> httpx.Response:
    return httpx.Response(200, content=b"".join(b"data: " + json.dumps(e).encode() + b"\n\n" for e in events))


def asked(prompt: str = "x", **more: Any) -> Generation:
    return Generation("a:b", prompt, more.pop("sampling", Sampling()), **more)


async def events(engine: EmbeddedEngine, generation: Generation | None = None) -> list[Piece | Finished]:
    return [event async for event in engine.generate(generation or asked())]


async def test_what_is_asked_is_what_the_caller_set_and_what_is_pinned() -> None:
    bodies: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return sse(LAST)

    sampling = Sampling(temperature=0.5, top_p=0.9, top_k=3, max_tokens=7, seed=2**40 + 5, stop=("b", "c"))
    await events(engine_that(handler), asked("hello", sampling=sampling, stop=("a", "b")))
    assert bodies == [
        {
            "prompt": "hello",
            "stream": True,
            "cache_prompt": True,
            "n_predict": 7,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 3,
            "min_p": 0.0,
            "repeat_penalty": 1.0,
            "seed": 5,
            "stop": ["a", "b", "c"],
        }
    ]


async def test_json_is_laid_out_as_it_was_taught() -> None:
    bodies: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return sse(LAST)

    await events(engine_that(handler), asked(json_schema={"type": "object"}))
    assert bodies[0]["json_schema"] == {
        "type": "object",
        "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    }


@pytest.mark.parametrize("schema", [{"type": "object", "a": float("nan")}, {"type": {1, 2}}])
async def test_a_schema_that_is_no_json_is_the_callers_mistake(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="not JSON"):
        await events(engine_that(sse(LAST)), asked(json_schema=schema))


async def test_pings_and_line_separators_do_not_disturb_a_stream() -> None:
    text = "a\u2028b\u0085"
    body = f": ping\n\ndata: {json.dumps({'content': text}, ensure_ascii=False)}\n\ndata: {json.dumps(LAST)}"
    assert await events(engine_that(httpx.Response(200, content=body.encode()))) == [
        Piece(text),
        Finished(FinishReason.STOP, Usage(3, 2)),
    ]


async def test_tokens_that_are_there_at_once_are_one_piece_with_the_last_ones_count() -> None:
    counts = [{"tokens_evaluated": 3, "tokens_predicted": number} for number in (1, 2)]
    answer = sse({"content": "a", **counts[0]}, {"content": "b", **counts[1]}, LAST)
    assert await events(engine_that(answer)) == [
        Piece("ab", Usage(3, 2), 2),
        Finished(FinishReason.STOP, Usage(3, 2)),
    ]
    seen = []
    with pytest.raises(EngineFailed):
        async for event in engine_that(sse({"content": "a"}, {"error": "odd"})).generate(asked()):
            seen.append(event)
    assert seen == [Piece("a")]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (sse({"content": "a"}), EngineUnavailable),
        (sse({"content": ["a"]}), EngineFailed),
        (httpx.Response(200, content=b""), EngineUnavailable),
        (httpx.Response(200, content=b"data: {broken\n\n"), EngineFailed),
        (httpx.Response(200, content=b"data: [1]\n\n"), EngineFailed),
        (httpx.Response(200, content=b'data: {"error": "odd"}\n\n'), EngineFailed),
        (sse({**LAST, "stop_type": "none"}), EngineFailed),
        (sse({"stop": True}), EngineFailed),
        (sse({"error": {"code": 500, "type": "server_error", "message": "?"}}), EngineFailed),
        (
            httpx.Response(200, content=b'error: {"error": {"code": 503, "type": "unavailable_error"}}\n\n'),
            EngineUnavailable,
        ),
        (httpx.Response(400, json={"error": {"type": "invalid_request_error"}}), InvalidArgument),
        (httpx.Response(400, json={"error": {"type": "exceed_context_size_error"}}), InvalidArgument),
        (httpx.Response(401, json={"error": {"type": "authentication_error"}}), EngineFailed),
        (httpx.Response(503, json={"error": {"type": "unavailable_error"}}), EngineUnavailable),
        (httpx.Response(500, content=b"<html>"), EngineFailed),
    ],
)
async def test_each_bad_answer_is_an_error_of_ours(
    answer: httpx.Response, error: type[AgentLoopError]
) -> None:
    with pytest.raises(error):
        await events(engine_that(answer))


async def test_a_broken_connection_to_a_dead_child_says_that_it_died() -> None:
    def handler(_: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("a prompt")

    engine = engine_that(handler)
    with pytest.raises(EngineUnavailable, match="process died") as unavailable:
        await events(engine)
    assert "prompt" not in str(unavailable.value)
    with pytest.raises(EngineUnavailable):
        await engine.embed("a:b", ["x"])


async def test_vectors_keep_the_order_of_their_texts() -> None:
    data = [{"index": 1, "embedding": [1.0]}, {"index": 0, "embedding": [0.0]}]
    answer = httpx.Response(200, json={"data": data, "usage": {"prompt_tokens": 5}})
    assert await engine_that(answer).embed("a:b", ["x", "y"]) == Embeddings(((0.0,), (1.0,)), 5)
    with pytest.raises(InvalidArgument):
        await engine_that(httpx.Response(400, json={})).embed("a:b", ["x"])


async def test_an_answer_that_is_no_json_is_nonsense() -> None:
    for content in (b"<html>", b"[]", b"{}", b'{"tokens": 3}', b'{"data": [{}]}'):
        with pytest.raises(EngineFailed):
            await engine_that(httpx.Response(200, content=content)).count_tokens("a:b", "x")
        with pytest.raises(EngineFailed):
            await engine_that(httpx.Response(200, content=content)).embed("a:b", ["x"])


def test_a_childs_options_survive_the_pipe() -> None:
    options = ChildOptions("/m/é & b.gguf", "key", 512, 2, 1, embedding=True)
    line = options.to_line()
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert ChildOptions.from_line(line) == options
    with pytest.raises((ValueError, TypeError)):
        ChildOptions.from_line(b"{}")


def library() -> Any:
    return SimpleNamespace(
        CommonParams=lambda: SimpleNamespace(
            model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace()
        ),
        llama_pooling_type=SimpleNamespace(LLAMA_POOLING_TYPE_MEAN="mean"),
    )


def test_a_child_serves_loopback_only_to_holders_of_its_key_with_a_whole_context_a_slot() -> None:
    parameters = server_parameters(ChildOptions("/m.gguf", "key", 512, 4, 3), library())
    assert (parameters.hostnames, parameters.port, parameters.api_keys) == (["127.0.0.1"], 0, ["key"])
    assert (parameters.n_ctx, parameters.n_parallel) == (2048, 4)
    assert parameters.cpuparams.n_threads == parameters.cpuparams_batch.n_threads == 3
    assert not parameters.ctx_shift
    assert not parameters.endpoint_slots
    assert not hasattr(parameters, "embedding")
    vectors = server_parameters(ChildOptions("/m.gguf", "key", 512, 1, 3, embedding=True), library())
    assert (vectors.embedding, vectors.pooling_type, vectors.n_ubatch) == (True, "mean", 512)
    assert not hasattr(parameters, "n_gpu_layers")  # the library's own choice
    lent = server_parameters(ChildOptions("/m.gguf", "key", 512, 1, 3, on_gpu=False), library())
    assert lent.n_gpu_layers == 0


def test_a_child_ends_when_its_pipe_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    reading, writing = os.pipe()
    os.write(writing, b"ignored")
    os.close(writing)
    embedded_child.exit_when_closed(reading)
    os.close(reading)
    assert ended == [0]
