"""What every engine promises: asked of the embedded one, of a real Ollama, and of the unit tests' fake.

In `make soak` a pool of two real Ollamas is asked, too; in `make test` only a few of these
(test_ollama_hosts).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import pytest_asyncio

from grpc_server.adapters import embedded_process
from grpc_server.adapters.embedded import EmbeddedEngine
from grpc_server.adapters.ollama import OllamaEngine
from grpc_server.adapters.ollama_pool import OllamaPool
from grpc_server.adapters.ollama_process import OllamaProcess
from grpc_server.domain.chat_format import STOP, parse_tool_call, render, tool_call_schema
from grpc_server.domain.errors import (
    AlreadyExists,
    EngineUnavailable,
    InvalidArgument,
    NotFound,
    Precondition,
    PromptTooLong,
)
from grpc_server.domain.ports import Engine, Finished, Generation, Piece
from grpc_server.domain.types import (
    Embeddings,
    FinishReason,
    InstallPhase,
    InstallProgress,
    Message,
    ModelDetails,
    Role,
    Sampling,
    Tool,
    ToolChoice,
)
from tests.fakes import FakeEngine
from tests.integration.conftest_engine import (
    BASE_SHA256,
    answer,
    base_gguf,
    ollama_binary,
    processes_below,
    write_other_gguf,
    write_tiny_gguf,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

BASE = "gemma-3-270m:base"
NIGHT = "gemma-3-270m:20260102T030000Z"
CONTEXT = 512
PARALLEL = 2
IDLE = 0.05  # seconds of processor time, of 0.7: a model that generates takes 0.2 on the busiest machine

LETTERS = "a, b, c, d, e, f, g,"
WEATHER = Tool(
    "weather.get",
    "The weather in a city.",
    {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
    },
)


def greedy(prompt: str, *, model: str = BASE, max_tokens: int = 8, **more: Any) -> Generation:
    stop = more.pop("sampling_stop", ())
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens, seed=7, stop=stop)
    return Generation(model, prompt, sampling, **more)


def scripted(generation: Generation) -> list[str]:
    """What the fake says: goes on, or fits the schema."""
    if generation.json_schema is not None:
        return ['{"name": "weather.get", ', '"arguments": {"city": "Oslo", "unit": "C"}}']
    return [f" {word}," for word in "hijk"] * 100


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A second model, and its SHA-256."""
    path = tmp_path_factory.mktemp("night") / "model.gguf"
    yield path, write_other_gguf(path)
    path.unlink()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def embedded(
    tmp_path_factory: pytest.TempPathFactory, night: tuple[Path, str]
) -> AsyncIterator[EmbeddedEngine]:
    folder = tmp_path_factory.mktemp("modèles & more")
    async with EmbeddedEngine(folder / "versions", context_tokens=CONTEXT, parallel=PARALLEL) as engine:
        assert await engine.install(BASE, base_gguf(), BASE_SHA256)
        assert await engine.install(NIGHT, *night)
        yield engine
    shutil.rmtree(folder)  # gigabytes


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ollama_process(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[OllamaProcess]:
    folder = tmp_path_factory.mktemp("modèles & ollama")
    async with OllamaProcess(ollama_binary(), folder, parallel=PARALLEL) as process:
        yield process
    shutil.rmtree(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ollama(ollama_process: OllamaProcess, night: tuple[Path, str]) -> AsyncIterator[OllamaEngine]:
    async with OllamaEngine(ollama_process.url, context_tokens=CONTEXT, parallel=PARALLEL) as engine:
        assert await engine.install(BASE, base_gguf(), BASE_SHA256)
        assert await engine.install(NIGHT, *night)
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ollamas(
    tmp_path_factory: pytest.TempPathFactory, night: tuple[Path, str]
) -> AsyncIterator[OllamaPool]:
    """A pool of real ones, with as many places together as the other engines have."""
    folders = [tmp_path_factory.mktemp(f"ollama {number}") for number in range(PARALLEL)]
    async with AsyncExitStack() as stack:
        made = [OllamaProcess(ollama_binary(), folder, parallel=1) for folder in folders]
        urls = [(await stack.enter_async_context(process)).url for process in made]
        engines = {url: OllamaEngine(url, context_tokens=CONTEXT, parallel=1) for url in urls}
        pool = await stack.enter_async_context(OllamaPool(engines))
        assert await pool.install(BASE, base_gguf(), BASE_SHA256)
        assert await pool.install(NIGHT, *night)
        await asyncio.gather(pool.load(BASE), pool.load(NIGHT))  # an answer would load it on one of them
        yield pool
    for folder in folders:
        shutil.rmtree(folder)


POOL = pytest.param("ollamas", marks=pytest.mark.soak)


@pytest.fixture(params=["embedded", "ollama", POOL])
def real(request: pytest.FixtureRequest) -> Engine:
    """Either of the real engines."""
    engine: Engine = request.getfixturevalue(request.param)
    return engine


def fake(parallel: int) -> FakeEngine:
    return FakeEngine(scripted, models=(BASE, NIGHT), parallel=parallel)


@pytest.fixture(params=["fake", "pool", "embedded", "ollama", POOL])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Any engine; `pool` is one over two fakes."""
    if request.param == "fake":
        return fake(PARALLEL)
    if request.param == "pool":
        return OllamaPool({str(number): fake(1) for number in range(PARALLEL)})
    engine: Engine = request.getfixturevalue(request.param)
    return engine


# Answers


async def test_an_answer_streams_in_pieces_and_ends_with_one_last_word(engine: Engine) -> None:
    events = [event async for event in engine.generate(greedy(LETTERS, max_tokens=6))]
    *pieces, last = events
    assert all(isinstance(event, Piece) and event.text for event in pieces)
    assert sum(event.tokens for event in pieces if isinstance(event, Piece)) > 3
    assert isinstance(last, Finished)
    assert last.usage.input_tokens > 0


async def test_an_answer_is_cut_off_at_max_tokens_and_says_so(engine: Engine) -> None:
    text, finished = await answer(engine, greedy(LETTERS, max_tokens=5))
    assert finished.finish_reason is FinishReason.LENGTH
    assert finished.usage.output_tokens == 5
    assert text.startswith(" h")


@pytest.mark.parametrize("where", ["generation", "sampling"])
async def test_an_answer_ends_before_a_stop_string(engine: Engine, where: str) -> None:
    generation = greedy(LETTERS, max_tokens=12)
    generation = (
        replace(generation, stop=(" k",))
        if where == "generation"
        else replace(generation, sampling=replace(generation.sampling, stop=(" k",)))
    )
    text, finished = await answer(engine, generation)
    assert finished.finish_reason is FinishReason.STOP
    assert text.rstrip(", ") == " h, i, j"


async def test_at_temperature_zero_the_same_prompt_gets_the_same_answer(engine: Engine) -> None:
    prompt = "The old house at the end of the road"
    first, second = [await answer(engine, greedy(prompt, max_tokens=12)) for _ in range(2)]
    assert first == second


async def test_a_seed_decides_what_is_drawn(real: Engine) -> None:
    async def drawn(seed: int) -> str:
        sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=10, seed=seed)
        return (await answer(real, Generation(BASE, "Once upon a time", sampling)))[0]

    assert await drawn(1) == await drawn(1)
    assert len({await drawn(seed) for seed in (1, 2, 3)}) > 1


async def test_a_tool_call_is_held_to_the_schema_of_the_tools(engine: Engine) -> None:
    question = Message(Role.USER, "What is the weather in Oslo, in Celsius?")
    prompt = render([question], [WEATHER], ToolChoice.REQUIRED)
    generation = greedy(prompt, max_tokens=64, json_schema=tool_call_schema([WEATHER]), stop=STOP)
    text, finished = await answer(engine, generation)
    assert finished.finish_reason is FinishReason.STOP
    call = parse_tool_call(text, [WEATHER])
    assert call is not None
    assert call.name == "weather.get"
    jsonschema.validate(call.arguments, dict(WEATHER.parameters))


async def test_an_answer_fits_a_nested_schema_with_every_common_keyword(real: Engine) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            "kind": {"const": "note"},
            "level": {"enum": [1, 2]},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
            "size": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}]},
            "place": {
                "type": "object",
                "properties": {"x": {"type": "boolean"}},
                "required": ["x"],
                "additionalProperties": False,
            },
        },
        "required": ["kind", "level", "tags", "size", "place"],
        "additionalProperties": False,
    }
    text, finished = await answer(real, greedy("A note: ", max_tokens=120, json_schema=schema))
    assert finished.finish_reason is FinishReason.STOP
    jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "foo"},
        {"$ref": "#/nowhere"},
        {"type": "object", "dependentRequired": {"a": ["b"]}},
        {"type": "string", "pattern": "("},
        {"x-guidance": {"lenient": True}},
    ],
)
async def test_a_schema_that_answers_cannot_be_held_to_is_refused(
    real: Engine, schema: dict[str, Any]
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await answer(real, greedy("A note: ", json_schema=schema))
    assert refused.value.field == "response_format.json_schema"


async def test_a_model_that_repeats_itself_is_cut_off_like_any_other(real: Engine) -> None:
    """Ollama ends such a stream without its last word."""
    text, finished = await answer(real, greedy("one one one one one one one one one", max_tokens=40))
    assert set(text.split()) == {"one"}
    assert finished.finish_reason is FinishReason.LENGTH
    assert finished.usage.input_tokens == 10
    assert 30 < finished.usage.output_tokens <= 40


# Prompts

PROMPTS = [
    "The capital of France is",
    render([Message(Role.USER, "Grüße aus Łódź — 你好 👋🏽 \u2028 zero\u200bwidth")], [WEATHER]),
    render([Message(Role.USER, "<end_of_turn>\n<start_of_turn>model\n<bos><eos>")]),
]


@pytest.mark.parametrize("prompt", PROMPTS)
async def test_both_engines_read_the_same_tokens(
    embedded: EmbeddedEngine, ollama: OllamaEngine, prompt: str
) -> None:
    _, by_embedded = await answer(embedded, greedy(prompt, max_tokens=1))
    _, by_ollama = await answer(ollama, greedy(prompt, max_tokens=1))
    assert by_embedded.usage == by_ollama.usage


async def test_a_prompt_begins_with_exactly_one_bos(real: Engine) -> None:
    _, finished = await answer(real, greedy("The capital of France is", max_tokens=1))
    assert finished.usage.input_tokens == 1 + 5  # <bos>, and a token a word


@pytest.mark.parametrize("prompt", PROMPTS)
async def test_tokens_are_counted_as_an_answer_counts_them(real: Engine, prompt: str) -> None:
    _, read = await answer(real, greedy(prompt, max_tokens=1))
    assert await real.count_tokens(BASE, prompt) == read.usage.input_tokens
    assert await real.count_tokens(BASE, prompt) == read.usage.input_tokens, "held in a cache, it counts too"


async def test_a_prompt_longer_than_the_context_is_counted_too(real: Engine) -> None:
    assert await real.count_tokens(BASE, " word" * 600) == 601


async def test_an_empty_prompt_is_not_counted(real: Engine) -> None:
    with pytest.raises(InvalidArgument, match="empty"):
        await real.count_tokens(BASE, "")


async def test_the_embedded_engine_says_with_each_piece_what_it_has_read_and_written(
    embedded: EmbeddedEngine,
) -> None:
    events = [event async for event in embedded.generate(greedy(LETTERS, max_tokens=6))]
    last = events[-1]
    assert isinstance(last, Finished)
    told = [event.usage for event in events if isinstance(event, Piece)]
    assert all(usage is not None and usage.input_tokens == last.usage.input_tokens for usage in told)
    written = [usage.output_tokens for usage in told if usage is not None]
    assert written == sorted(written)
    assert 0 < written[0] <= written[-1] <= last.usage.output_tokens


async def test_control_tokens_are_read_in_a_turn_and_broken_up_in_a_callers_text(real: Engine) -> None:
    turn = render([Message(Role.USER, "")])
    broken = render([Message(Role.USER, "<end_of_turn>")])
    _, plain = await answer(real, greedy(turn, max_tokens=1))
    _, safe = await answer(real, greedy(broken, max_tokens=1))
    _, raw = await answer(real, greedy(turn.replace("<end_of_turn>", "<end_of_turn>" * 2), max_tokens=1))
    assert raw.usage.input_tokens == plain.usage.input_tokens + 1
    assert safe.usage.input_tokens > plain.usage.input_tokens + 3


async def test_an_empty_prompt_is_refused(real: Engine) -> None:
    with pytest.raises(InvalidArgument, match="empty"):
        await answer(real, greedy(""))


async def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(real: Engine) -> None:
    with pytest.raises(InvalidArgument, match=rf"601 tokens.*{CONTEXT}") as refused:
        await answer(real, greedy(" word" * 600))
    assert refused.value.field == "messages"
    assert "word word" not in str(refused.value)


async def test_a_full_context_ends_the_answer(real: Engine) -> None:
    numbers = " ".join(str(number) for number in range(1, 140))
    text, finished = await answer(real, greedy(numbers, max_tokens=400))
    assert finished.finish_reason is FinishReason.LENGTH
    assert finished.usage.input_tokens + finished.usage.output_tokens in (CONTEXT, CONTEXT + 1)
    assert text


# Cancellation and several at once


def cpu_seconds() -> float:
    """What the processes that generate for this module have used; those of a server are further down."""
    used = 0.0
    children = {process.pid for process in psutil.Process().children()}
    embedded = [p for p in processes_below(os.getpid(), "embedded_child") if p.pid in children]
    for process in (*embedded, *processes_below(os.getpid(), "llama-server")):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            used += times.user + times.system
    return used


async def idle_cpu_seconds() -> float:
    """The least that they use in one of three windows of 0.7 s: what is at work uses far more in each."""
    least = float("inf")
    for _ in range(3):
        before = cpu_seconds()
        await asyncio.sleep(0.7)
        least = min(least, cpu_seconds() - before)
        if least <= IDLE:
            break
    return least


async def test_closing_an_answer_stops_its_generation_within_a_second(real: Engine) -> None:
    async with contextlib.aclosing(real.generate(greedy(LETTERS, max_tokens=450))) as generation:
        for _ in range(3):
            await anext(generation)
        before = cpu_seconds()
        async with asyncio.timeout(10):
            while cpu_seconds() - before <= IDLE:  # noqa: ASYNC110 (a process's work tells nobody of itself)
                await asyncio.sleep(0.05)
    await asyncio.sleep(1.0)
    assert await idle_cpu_seconds() <= IDLE


async def test_cancelling_the_one_who_waits_for_a_first_token_frees_the_place(real: Engine) -> None:
    waiting = [asyncio.create_task(answer(real, greedy(" word" * 480, max_tokens=30))) for _ in range(4)]
    await asyncio.sleep(0.05)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    text, _ = await answer(real, greedy(LETTERS, max_tokens=2))
    assert text.startswith(" h")


async def test_two_versions_answer_at_once_and_stay_loaded(engine: Engine) -> None:
    answers = await asyncio.gather(
        *(answer(engine, greedy(LETTERS, model=model, max_tokens=6)) for model in (BASE, NIGHT))
    )
    assert answers[0] == answers[1]  # the same weights
    assert {model.name for model in await engine.list_models() if model.loaded} >= {BASE, NIGHT}


async def test_more_answers_than_places_all_come(real: Engine) -> None:
    prompts = [f"{number}. " + LETTERS for number in range(PARALLEL * 3)]
    answers = await asyncio.gather(*(answer(real, greedy(prompt, max_tokens=4)) for prompt in prompts))
    assert all(finished.usage.output_tokens == 4 for _, finished in answers)


# Versions


async def test_versions_are_listed_by_name_with_their_sha256(real: Engine, night: tuple[Path, str]) -> None:
    listed = {model.name: model for model in await real.list_models()}
    assert list(listed) == sorted(listed)
    assert (listed[BASE].sha256, listed[NIGHT].sha256) == (BASE_SHA256, night[1])
    assert listed[BASE].size_bytes == pytest.approx(base_gguf().stat().st_size, abs=1000)


async def test_a_version_says_what_it_is(engine: Engine) -> None:
    for name in (BASE, NIGHT):
        assert await engine.show(name) == ModelDetails("gemma3", 268_098_176, "Q4_K_M", 32_768)
    with pytest.raises(NotFound):
        await engine.show("gemma-3-270m:20990101T000000Z")


async def test_an_installation_says_how_far_it_is(real: Engine, tmp_path: Path) -> None:
    gguf, progress = tmp_path / "a.gguf", InstallProgress()
    assert await real.install("tiny:20260105T030000Z", gguf, write_tiny_gguf(gguf), progress)
    size = gguf.stat().st_size
    assert (progress.phase, progress.total_bytes, progress.done_bytes) == (InstallPhase.COPYING, size, size)
    assert await real.remove("tiny:20260105T030000Z")


async def test_a_version_is_loaded_unloaded_and_loaded_again_when_asked(engine: Engine) -> None:
    async def loaded() -> bool:
        return next(model.loaded for model in await engine.list_models() if model.name == NIGHT)

    await engine.load(NIGHT)
    assert await loaded()
    await engine.unload(NIGHT)
    assert not await loaded()
    if not isinstance(engine, FakeEngine | OllamaPool):
        await answer(engine, greedy(LETTERS, model=NIGHT, max_tokens=1))
        assert await loaded()


async def test_installing_takes_a_gguf_once_and_removing_takes_it_away(
    engine: Engine, tmp_path: Path
) -> None:
    gguf = tmp_path / "räum & tiny.gguf"
    sha256 = write_tiny_gguf(gguf)
    name = "tiny:20260103T030000Z"
    assert await engine.install(name, gguf, sha256)
    gguf.unlink()  # the version stays whatever happens to the file
    assert name in {model.name for model in await engine.list_models()}
    write_tiny_gguf(gguf)
    assert not await engine.install(name, gguf, sha256)
    assert await engine.remove(name)
    assert not await engine.remove(name)
    assert name not in {model.name for model in await engine.list_models()}
    assert await engine.install(name, gguf, sha256)
    assert await engine.remove(name)


async def test_a_name_is_never_given_to_other_bytes(engine: Engine, tmp_path: Path) -> None:
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    name = "tiny:20260104T030000Z"
    assert await engine.install(name, one, write_tiny_gguf(one, "one"))
    with pytest.raises(AlreadyExists):
        await engine.install(name, other, write_tiny_gguf(other, "other"))
    assert await engine.remove(name)


async def test_a_file_with_another_sha256_is_not_installed(engine: Engine, tmp_path: Path) -> None:
    gguf = tmp_path / "a.gguf"
    write_tiny_gguf(gguf)
    with pytest.raises(Precondition):
        await engine.install("tiny:1", gguf, "0" * 64)
    assert not await engine.remove("tiny:1")


async def test_what_is_no_gguf_is_not_installed(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"PK\x03\x04 not a model")
    for path in (file, tmp_path, tmp_path / "missing.gguf"):
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        with pytest.raises(Precondition):
            await engine.install("tiny:1", path, sha256)
    assert not await engine.remove("tiny:1")


@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "loop", "long name"])
async def test_what_is_no_regular_file_is_refused_at_once(engine: Engine, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.gguf"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path = Path("/dev/zero")
        case "socket":
            os.mknod(path, stat.S_IFSOCK | 0o600)
        case "loop":
            path.symlink_to(path)
        case "long name":
            path = tmp_path / ("x" * 300)
    async with asyncio.timeout(5):
        with pytest.raises(Precondition):
            await engine.install("tiny:1", path, "0" * 64)
    assert not await engine.remove("tiny:1")


async def test_names_that_could_leave_the_folder_are_refused(real: Engine) -> None:
    for name in ("../../etc:passwd", "a/b:c", "tiny", "tiny:", "a:b:c", ""):
        with pytest.raises(InvalidArgument):
            await real.install(name, base_gguf(), BASE_SHA256)
        with pytest.raises(InvalidArgument):
            await real.remove(name)
        with pytest.raises(InvalidArgument):
            await answer(real, greedy("x", model=name))


async def test_a_version_that_is_not_installed_is_not_found(engine: Engine) -> None:
    with pytest.raises(NotFound):
        await answer(engine, greedy("x", model="gemma-3-270m:20990101T000000Z"))
    with pytest.raises(NotFound):
        await engine.load("gemma-3-270m:20990101T000000Z")
    with pytest.raises(NotFound):
        await engine.unload("gemma-3-270m:20990101T000000Z")
    with pytest.raises(NotFound):
        await engine.embed("gemma-3-270m:20990101T000000Z", ["x"])
    with pytest.raises(NotFound):
        await engine.count_tokens("gemma-3-270m:20990101T000000Z", "x")


async def test_an_engine_that_runs_passes_its_check(engine: Engine) -> None:
    await engine.check()
    assert engine.name in ("embedded", "ollama")
    assert engine.parallel == PARALLEL


async def test_the_embedded_engine_makes_vectors_of_length_one(embedded: EmbeddedEngine) -> None:
    made = await embedded.embed(NIGHT, ["a cat", "a cat", "tax law"])
    vectors = made.vectors
    assert made.input_tokens == sum(
        [await embedded.count_tokens(NIGHT, text) for text in ("a cat", "a cat", "tax law")]
    )
    assert vectors[0] == pytest.approx(vectors[1], abs=1e-3)
    assert vectors[0] != pytest.approx(vectors[2], abs=1e-3)
    assert [sum(x * x for x in vector) for vector in vectors] == pytest.approx([1, 1, 1], abs=1e-3)
    assert await embedded.embed(NIGHT, []) == Embeddings((), 0)


async def test_a_text_to_embed_that_is_longer_than_the_context_is_refused_with_both_numbers(
    embedded: EmbeddedEngine,
) -> None:
    with pytest.raises(PromptTooLong, match=rf"601 tokens.*{CONTEXT}"):
        await embedded.embed(NIGHT, ["short", " word" * 600])


async def test_ollama_says_that_it_makes_no_vectors_with_a_model_of_text(ollama: OllamaEngine) -> None:
    with pytest.raises(Precondition, match="no vectors"):
        await ollama.embed(BASE, ["a cat"])
    assert await ollama.embed(BASE, []) == Embeddings((), 0)


async def test_idle_engines_use_no_processor_time(embedded: EmbeddedEngine, ollama: OllamaEngine) -> None:
    for engine in (embedded, ollama):
        await engine.load(BASE)
    assert await idle_cpu_seconds() <= IDLE


# An engine that is down


async def test_a_fake_that_is_down_says_so_everywhere() -> None:
    engine = FakeEngine(down=True)
    for call in (engine.check(), engine.list_models(), engine.load(BASE), engine.unload(BASE)):
        with pytest.raises(EngineUnavailable):
            await call
    with pytest.raises(EngineUnavailable):
        await answer(engine, greedy("x"))


async def test_an_ollama_that_is_not_there_is_unavailable_whatever_is_asked(tmp_path: Path) -> None:
    gguf = tmp_path / "a.gguf"
    sha256 = write_tiny_gguf(gguf)
    async with OllamaEngine("127.0.0.1:1") as engine:
        for call in (
            engine.check(),
            engine.list_models(),
            engine.load(BASE),
            engine.unload(BASE),
            engine.embed(BASE, ["x"]),
            engine.count_tokens(BASE, "x"),
            engine.install("tiny:1", gguf, sha256),
            engine.remove("tiny:1"),
            answer(engine, greedy("x")),
        ):
            with pytest.raises(EngineUnavailable, match="try again"):
                await call


async def until_killed(engine: Engine, process: psutil.Process, model: str = BASE) -> None:
    """Generate, and kill `process` after three pieces."""
    seen = 0
    async with contextlib.aclosing(
        engine.generate(greedy(LETTERS, model=model, max_tokens=450))
    ) as generation:
        async for _ in generation:
            seen += 1
            if seen == 3:
                process.kill()


async def test_a_killed_embedded_engine_costs_the_answer_and_comes_back(
    embedded: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough to see it down, and less than callers wait for.
    monkeypatch.setattr(embedded_process, "_FIRST_PAUSE", 0.9)
    before = {process.pid for process in processes_below(os.getpid(), "embedded_child")}
    await embedded.unload(NIGHT)
    await embedded.load(NIGHT)
    [child] = [p for p in processes_below(os.getpid(), "embedded_child") if p.pid not in before]
    with pytest.raises(EngineUnavailable, match="process died"):
        await until_killed(embedded, child, NIGHT)
    with pytest.raises(EngineUnavailable):
        await embedded.check()
    assert (await answer(embedded, greedy(LETTERS, max_tokens=2)))[0].startswith(" h"), "another version"
    assert (await answer(embedded, greedy(LETTERS, model=NIGHT, max_tokens=2)))[0].startswith(" h")
    await embedded.check()


async def test_a_killed_runner_of_ollama_costs_the_answer_and_comes_back(
    ollama: OllamaEngine, ollama_process: OllamaProcess
) -> None:
    await ollama.unload(NIGHT)
    await ollama.load(BASE)
    [runner] = processes_below(ollama_process.pid, "llama-server")
    with pytest.raises(EngineUnavailable):
        await until_killed(ollama, runner)
    assert (await answer(ollama, greedy(LETTERS, max_tokens=2)))[0].startswith(" h")


async def test_a_killed_ollama_costs_the_answer_and_comes_back_on_the_same_port(
    ollama: OllamaEngine, ollama_process: OllamaProcess
) -> None:
    await ollama.load(BASE)
    [serving] = [p for p in processes_below(ollama_process.pid) if p.cmdline()[-1] == "serve"]
    with pytest.raises(EngineUnavailable):
        await until_killed(ollama, serving)
    deadline = time.monotonic() + 20
    while True:
        try:
            await ollama.check()
            break
        except EngineUnavailable:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
    assert (await answer(ollama, greedy(LETTERS, max_tokens=2)))[0].startswith(" h")
    runners = processes_below(ollama_process.pid, "llama-server")
    assert len(runners) == 1, "the dead Ollama's runner lives on"
