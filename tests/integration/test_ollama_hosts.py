"""Two real Ollamas behind one engine: both answer, and while one is dead the other does.

They answer some of what every engine is asked (test_engine_conformance); all of it in `make soak`.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from grpc_server.adapters.ollama_pool import OllamaPool
from grpc_server.adapters.ollama_process import OllamaProcess
from grpc_server.adapters.pool_host import Standing
from grpc_server.bootstrap import engine_of
from grpc_server.domain.errors import NotFound
from grpc_server.domain.ports import Generation
from grpc_server.domain.types import Sampling
from grpc_server.settings import Settings
from tests.integration import test_engine_conformance as conformance
from tests.integration.conftest_engine import (
    BASE_SHA256,
    answer,
    base_gguf,
    ollama_binary,
    processes_below,
    write_tiny_gguf,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

BASE = "gemma-3-270m:base"
LETTERS = "a, b, c, d, e, f, g,"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def processes(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[list[OllamaProcess]]:
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    async with AsyncExitStack() as stack:
        made = [OllamaProcess(ollama_binary(), folder, parallel=1) for folder in folders]
        yield [await stack.enter_async_context(process) for process in made]
    for folder in folders:
        shutil.rmtree(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool(
    processes: list[OllamaProcess], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[OllamaPool]:
    settings = Settings(
        state_dir=tmp_path_factory.mktemp("state"),
        engine="ollama",
        ollama_url=", ".join(process.url for process in processes),
        parallel=1,
        context_tokens=512,
    )
    async with engine_of(settings) as engine:
        assert isinstance(engine, OllamaPool)
        assert await engine.install(BASE, base_gguf(), BASE_SHA256)
        await engine.load(BASE)
        yield engine


@pytest.fixture
def engine(pool: OllamaPool) -> OllamaPool:
    """What the cases of the conformance suite ask."""
    return pool


test_streams = conformance.test_an_answer_streams_in_pieces_and_ends_with_one_last_word
test_stops = conformance.test_an_answer_ends_before_a_stop_string
test_calls_tools = conformance.test_a_tool_call_is_held_to_the_schema_of_the_tools
test_keeps_names = conformance.test_a_name_is_never_given_to_other_bytes
test_knows_what_it_lacks = conformance.test_a_version_that_is_not_installed_is_not_found


async def say(pool: OllamaPool, tokens: int = 3) -> str:
    sampling = Sampling(temperature=0.0, max_tokens=tokens, seed=7)
    return (await answer(pool, Generation(BASE, LETTERS, sampling)))[0]


async def test_both_answer_the_same_at_once(pool: OllamaPool) -> None:
    assert pool.parallel == 2
    answers = await asyncio.gather(*(say(pool) for _ in range(6)))
    assert set(answers) == {answers[0]}
    assert answers[0].startswith(" h")
    assert all(host.asked_last for host in pool.hosts)
    assert [(model.name, model.loaded) for model in await pool.list_models()] == [(BASE, True)]


async def test_a_version_is_on_both_and_goes_from_both(pool: OllamaPool, tmp_path: Path) -> None:
    sha256, name = write_tiny_gguf(tmp_path / "tiny"), "tiny:1"
    assert await pool.install(name, tmp_path / "tiny", sha256)
    assert not await pool.install(name, tmp_path / "tiny", sha256)
    for host in pool.hosts:
        assert name in {model.name for model in await host.engine.list_models()}
    assert await pool.remove(name)
    for host in pool.hosts:
        assert name not in {model.name for model in await host.engine.list_models()}
    with pytest.raises(NotFound):
        await pool.load(name)


async def test_a_killed_ollama_is_passed_over_and_comes_back(
    pool: OllamaPool, processes: list[OllamaProcess]
) -> None:
    [serving] = [p for p in processes_below(processes[0].pid) if p.cmdline()[-1] == "serve"]
    serving.kill()
    answers = [await say(pool) for _ in range(6)]
    assert all(text.startswith(" h") for text in answers), "nobody notices"
    async with asyncio.timeout(60):
        while [host.standing for host in pool.hosts] != [Standing.WELL, Standing.WELL]:
            await pool._look()
            await asyncio.sleep(0.1)
    await pool.load(BASE)
    assert [(model.name, model.loaded) for model in await pool.list_models()] == [(BASE, True)]
