"""What the Ollama adapter makes of odd answers, and what it asks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from grpc_server.adapters.json_schema import Schemas
from grpc_server.adapters.ollama import OllamaEngine
from grpc_server.adapters.ollama_process import environment
from grpc_server.domain.errors import (
    AgentLoopError,
    EngineFailed,
    EngineUnavailable,
    Exhausted,
    InvalidArgument,
    NotFound,
    Precondition,
    PromptTooLong,
)
from grpc_server.domain.ports import Finished, Generation, Piece
from grpc_server.domain.types import Embeddings, FinishReason, Sampling, Usage
from tests.fakes import FakeSchemaProcess

MODEL = "gemma:base"
DONE = {"done": True, "done_reason": "stop", "prompt_eval_count": 3, "eval_count": 2}

Handler = Callable[[httpx.Request], httpx.Response]


def ndjson(*events: Any) -> httpx.Response:
    return httpx.Response(200, content=b"".join(json.dumps(event).encode() + b"\n" for event in events))


def engine_that(handler: Handler | httpx.Response) -> OllamaEngine:
    answers = (lambda _: handler) if isinstance(handler, httpx.Response) else handler
    transport = httpx.MockTransport(answers)
    return OllamaEngine("ollama:11434", transport=transport, schemas=Schemas(FakeSchemaProcess()))


def asked(prompt: str = "x", **more: Any) -> Generation:
    return Generation(MODEL, prompt, more.pop("sampling", Sampling()), **more)


async def events(engine: OllamaEngine, generation: Generation | None = None) -> list[Piece | Finished]:
    return [event async for event in engine.generate(generation or asked())]


async def test_what_is_pinned_stands_in_every_request_whatever_the_caller_sets() -> None:
    bodies: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return ndjson(DONE)

    engine = engine_that(handler)
    sampling = Sampling(temperature=0.5, top_p=0.9, top_k=3, max_tokens=7, seed=2**40 + 5, stop=("b", "c"))
    await events(engine, asked("hello", sampling=sampling, stop=("a", "b")))
    await engine.load(MODEL)
    generate, load = bodies
    for body in bodies:
        assert body["raw"] is True
        assert body["keep_alive"] == -1
        assert body["shift"] is False
        assert body["truncate"] is False
        assert {name: body["options"][name] for name in ("num_ctx", "num_batch")} == load["options"]
    assert generate["options"] | load["options"] == {
        "num_ctx": 4096,
        "num_batch": 512,
        "num_predict": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.0,
        "repeat_penalty": 1.0,
        "seed": 5,
        "stop": ["a", "b", "c"],
    }
    assert "format" not in generate


async def test_line_separators_inside_a_text_do_not_break_its_line() -> None:
    text = "a\u2028b\u0085c\x0bd\u2029"
    body = (json.dumps({"response": text}, ensure_ascii=False) + "\r\n" + json.dumps(DONE)).encode()
    chunks = [body[start : start + 3] for start in range(0, len(body), 3)]

    async def stream() -> Any:
        for chunk in chunks:
            yield chunk

    assert await events(engine_that(httpx.Response(200, content=stream()))) == [
        Piece(text),
        Finished(FinishReason.STOP, Usage(3, 2)),
    ]


async def test_a_stream_that_ends_without_its_last_word_is_unavailable() -> None:
    engine = engine_that(ndjson({"response": "a"}, {"response": "b"}))
    seen = []
    with pytest.raises(EngineUnavailable, match="ended before"):
        async for event in engine.generate(asked()):
            seen.append(event)
    assert seen == [Piece("ab", tokens=2)]


async def test_tokens_that_are_there_at_once_are_one_piece_and_none_waits_for_another() -> None:
    async def stream() -> Any:
        for texts in (["a"], ["b", "", "c"]):
            yield b"".join(json.dumps({"response": text}).encode() + b"\n" for text in texts)
        yield json.dumps({"response": "d"}).encode() + b"\n" + json.dumps(DONE).encode()

    assert await events(engine_that(httpx.Response(200, content=stream()))) == [
        Piece("a"),
        Piece("bc", tokens=2),
        Piece("d"),
        Finished(FinishReason.STOP, Usage(3, 2)),
    ]


async def test_what_is_wrong_comes_after_the_tokens_before_it_and_so_does_the_limit() -> None:
    broken = engine_that(ndjson({"response": "a"}, {"response": "b"}, {"response": "\ud800"}))
    endless = engine_that(ndjson(*[{"response": "a"}] * 9))
    for engine, text, tokens, fault in ((broken, "ab", 2, "not JSON"), (endless, "aaa", 3, "more tokens")):
        seen = []
        with pytest.raises(EngineFailed, match=fault):
            async for event in engine.generate(asked(sampling=Sampling(max_tokens=3))):
                seen.append(event)
        assert seen == [Piece(text, tokens=tokens)]


async def test_a_stream_that_ollama_ends_because_of_repetition_ends_by_length() -> None:
    bodies: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        if bodies[-1]["stream"]:
            return ndjson(*[{"response": " la"}] * 31)
        return httpx.Response(200, json={**DONE, "prompt_eval_count": 9})

    piece, last = await events(engine_that(handler))
    assert piece == Piece(" la" * 31, tokens=31)
    assert last == Finished(FinishReason.LENGTH, Usage(9, 32))
    assert bodies[1]["options"] == {**bodies[0]["options"], "num_predict": 1}


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (ndjson({"response": "a"}, {"error": "llama runner process has terminated"}), EngineUnavailable),
        (ndjson({"error": "an error was encountered while running the model: EOF"}), EngineUnavailable),
        (ndjson({"error": "something odd"}), EngineFailed),
        (ndjson({"error": "bad schema", "status": 400}), InvalidArgument),
        (httpx.Response(200, content=b'{"response": "a"\n'), EngineFailed),
        (httpx.Response(200, content=b"[1]\n"), EngineFailed),
        (httpx.Response(200, content=b"\xff\xfe\n"), EngineFailed),
        (ndjson({"done": True}), EngineFailed),
        (ndjson({**DONE, "eval_count": "many"}), EngineFailed),
        (ndjson({**DONE, "done_reason": "load"}), EngineFailed),
        (httpx.Response(200, content=b""), EngineUnavailable),
        (httpx.Response(404, json={"error": "model 'x' not found"}), NotFound),
        (httpx.Response(400, json={"error": "no"}), InvalidArgument),
        (httpx.Response(503, json={"error": "server busy, please try again"}), EngineUnavailable),
        (httpx.Response(500, json={"error": "model runner has unexpectedly stopped"}), EngineUnavailable),
        (httpx.Response(500, json={"error": "write /m/blobs/x: no space left on device"}), Exhausted),
        (httpx.Response(500, json={"error": "who knows"}), EngineFailed),
        (httpx.Response(500, content=b"<html>"), EngineFailed),
        (httpx.Response(302, headers={"location": "http://elsewhere"}), EngineFailed),
    ],
)
async def test_each_bad_answer_is_an_error_of_ours(
    answer: httpx.Response, error: type[AgentLoopError]
) -> None:
    with pytest.raises(error):
        await events(engine_that(answer))


@pytest.mark.parametrize("raised", [httpx.ConnectError, httpx.ReadTimeout, httpx.RemoteProtocolError])
async def test_a_broken_connection_is_unavailable(raised: type[httpx.TransportError]) -> None:
    def handler(_: httpx.Request) -> httpx.Response:
        raise raised("the text may hold a prompt")

    with pytest.raises(EngineUnavailable, match=raised.__name__) as unavailable:
        await events(engine_that(handler))
    assert "prompt" not in str(unavailable.value)


async def test_a_connection_that_breaks_in_mid_stream_is_unavailable_after_its_pieces() -> None:
    async def stream() -> Any:
        yield b'{"response": "a"}\n'
        raise httpx.ReadError("reset")

    seen = []
    with pytest.raises(EngineUnavailable):
        async for event in engine_that(httpx.Response(200, content=stream())).generate(asked()):
            seen.append(event)
    assert seen == [Piece("a")]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            json.dumps(
                {
                    "error": {
                        "type": "exceed_context_size_error",
                        "n_prompt_tokens": 9,
                        "n_ctx": 4,
                        "code": 400,
                    }
                }
            ),
            "9 tokens.* holds 4",
        ),
        ("exceed_context_size_error", "too many tokens"),
        ("the prompt is longer than the context length currently available", "too many tokens"),
    ],
)
async def test_a_prompt_too_long_is_the_callers_mistake(error: str, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text) as refused:
        await events(engine_that(ndjson({"error": error, "status": 400})))
    assert refused.value.field == "messages"


async def test_an_answer_that_does_not_fit_its_schema_is_the_engines_failure() -> None:
    schema = {"type": "object", "patternProperties": {"^a$": {"type": "integer"}}}
    for text in ('{"a": "b"}', '{"a":'):
        with pytest.raises(EngineFailed, match="did not hold"):
            await events(engine_that(ndjson({"response": text}, DONE)), asked(json_schema=schema))
    fits = engine_that(ndjson({"response": '{"a": 1}'}, DONE))
    assert len(await events(fits, asked(json_schema=schema))) == 2
    cut_off = engine_that(ndjson({"response": '{"a":'}, {**DONE, "done_reason": "length"}))
    assert len(await events(cut_off, asked(json_schema=schema))) == 2


@pytest.mark.parametrize(
    ("refused", "status", "reason"),
    [("/api/create", 500, "cannot make"), ("/api/blobs", 400, "changed while")],
)
async def test_a_file_that_ollama_refuses_is_a_precondition_not_its_failure(
    tmp_path: Path, refused: str, status: int, reason: str
) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if request.method == "HEAD" or request.url.path == "/api/show":
            return httpx.Response(404, json={"error": "not found"})
        if request.url.path.startswith(refused):
            return httpx.Response(status, json={"error": "no"})
        return httpx.Response(201)

    gguf = tmp_path / "a.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(Precondition, match=reason):
        await engine_that(handler).install("a:b", gguf, hashlib.sha256(b"GGUF").hexdigest())


async def test_models_that_others_put_into_the_same_ollama_are_listed_if_they_are_ggufs() -> None:
    digest = "ab" * 32
    models = [
        {"name": "theirs:latest", "size": 5, "digest": "d1", "details": {"format": "gguf"}},
        {"name": "far:cloud", "size": 0, "digest": "d2", "details": {"format": ""}},
        {"name": "gone:1", "size": 5, "digest": "d3", "details": {"format": "gguf"}},
    ]
    shown = 0

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal shown
        if request.url.path == "/api/tags":
            return httpx.Response(200, json={"models": models})
        if request.url.path == "/api/ps":
            return httpx.Response(200, json={"models": [{"name": "theirs:latest"}]})
        shown += 1
        if json.loads(request.content)["model"] == "gone:1":
            return httpx.Response(404, json={"error": "not found"})
        return httpx.Response(200, json={"modelfile": f"# x\nFROM /m/blobs/sha256-{digest}\nTEMPLATE y"})

    engine = engine_that(handler)
    for _ in range(2):
        [version] = await engine.list_models()
        assert (version.name, version.sha256, version.loaded) == ("theirs:latest", digest, True)
    assert shown == 3, "a version's SHA-256 is asked once"


async def test_a_version_without_a_sha256_is_an_engines_failure() -> None:
    with pytest.raises(EngineFailed, match="SHA-256"):
        await engine_that(httpx.Response(200, json={"modelfile": "FROM other"})).install(
            "a:b", Path("a.gguf"), "0" * 64
        )


async def test_unloading_waits_until_ollama_has_let_go() -> None:
    left = [[{"name": MODEL}], []]

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/api/ps":
            return httpx.Response(200, json={"models": left.pop(0)})
        assert json.loads(request.content) == {"model": MODEL, "keep_alive": 0, "stream": False}
        return httpx.Response(200, json={"done": True, "done_reason": "unload"})

    await engine_that(handler).unload(MODEL)
    assert left == []


async def test_vectors_come_only_from_a_model_that_makes_them() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/api/show":
            return httpx.Response(200, json={"capabilities": ["embedding"]})
        return httpx.Response(200, json={"embeddings": [[1, 0.5], [0, 1]], "prompt_eval_count": 4})

    assert await engine_that(handler).embed(MODEL, ["a", "b"]) == Embeddings(((1.0, 0.5), (0.0, 1.0)), 4)


async def test_a_text_to_embed_that_is_longer_than_the_context_is_too_long() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/api/show":
            return httpx.Response(200, json={"capabilities": ["embedding"]})
        return httpx.Response(400, json={"error": "the input length exceeds the context length"})

    with pytest.raises(PromptTooLong):
        await engine_that(handler).embed(MODEL, ["a"])


async def test_a_prompt_that_is_too_long_for_ollama_to_say_how_long_is_not_counted() -> None:
    refusal = httpx.Response(400, json={"error": "exceed_context_size_error"})
    with pytest.raises(PromptTooLong, match="too many tokens"):
        await engine_that(lambda _: refusal).count_tokens(MODEL, "a")


def test_an_ollama_of_ours_inherits_no_secret_no_proxy_and_no_setting_of_another() -> None:
    inherited = {
        "PATH": "/bin",
        "AGENTLOOP_DATABASE_URL": "secret",
        "OLLAMA_HOST": "0.0.0.0",
        "OLLAMA_DEBUG": "1",
        "https_proxy": "http://proxy",
        "HTTP_PROXY": "http://proxy",
    }
    told = environment(inherited, Path("/m & é"), 3)
    assert told["PATH"] == "/bin"
    assert told["OLLAMA_NO_CLOUD"] == "1"
    assert told["OLLAMA_MODELS"] == told["HOME"] == "/m & é"
    assert told["OLLAMA_NUM_PARALLEL"] == "3"
    assert not {name for name in told if "proxy" in name.lower() or name.startswith("AGENTLOOP_")}
    assert "OLLAMA_DEBUG" not in told


async def test_an_ollama_below_a_path_is_asked_there_with_json_and_its_limits() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return ndjson(DONE)

    transport = httpx.MockTransport(handler)
    await events(OllamaEngine("https://hosts/ollama/", transport=transport))
    await events(OllamaEngine("127.0.0.1:1", transport=transport))
    assert [str(request.url) for request in seen] == [
        "https://hosts/ollama/api/generate",
        "http://127.0.0.1:1/api/generate",
    ]
    assert seen[0].headers["content-type"] == "application/json"
    assert int(seen[0].headers["content-length"]) == len(seen[0].content)
    assert seen[0].extensions["timeout"]["read"] == 600


async def test_while_its_gpu_is_lent_every_request_keeps_to_the_processor_and_a_small_context() -> None:
    seen: list[tuple[str, dict[str, Any]]] = []
    running = [{"name": MODEL}]

    def handler(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content or b"{}")
        seen.append((request.url.path, body))
        if request.url.path == "/api/ps":
            answer = httpx.Response(200, json={"models": list(running)})
            running.clear()
            return answer
        return ndjson(DONE)

    engine = engine_that(handler)
    await engine.shrink(512)
    assert [body.get("keep_alive") for path, body in seen if path == "/api/generate"] == [0]
    await engine.load(MODEL)
    assert seen[-1][1]["options"] == {"num_ctx": 512, "num_batch": 512, "num_gpu": 0}
    await engine.grow()
    await engine.load(MODEL)
    assert seen[-1][1]["options"] == {"num_ctx": 4096, "num_batch": 512}
    await engine.shrink(10**6)  # small is never more than whole
    await engine.load(MODEL)
    assert seen[-1][1]["options"]["num_ctx"] == 4096
