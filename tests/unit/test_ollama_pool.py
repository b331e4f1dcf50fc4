"""Several Ollamas as one: who is asked, who is passed over and for how long, and what all of them do."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from grpc_server.adapters import ollama_pool
from grpc_server.adapters.ollama_pool import OllamaPool
from grpc_server.adapters.pool_host import (
    CALM_SECONDS,
    EJECTION_SECONDS,
    FAILURES_TO_EJECT,
    LONGEST_EJECTION_SECONDS,
    SLOW_START_SECONDS,
    Standing,
)
from grpc_server.domain.errors import (
    AlreadyExists,
    EngineFailed,
    EngineUnavailable,
    InvalidArgument,
    NotFound,
)
from grpc_server.domain.ports import Finished, Generation, Piece
from grpc_server.domain.types import Sampling
from tests.fakes import BASE, FakeClock, FakeEngine

NEW = "gemma-3-270m:new"
NEVER = 3600.0


@pytest.fixture(autouse=True)
def checks_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama_pool, "CHECK_SECONDS", NEVER)


@asynccontextmanager
async def pool_of(*engines: FakeEngine, clock: FakeClock | None = None) -> AsyncIterator[OllamaPool]:
    named = {f"http://{index}": engine for index, engine in enumerate(engines)}
    async with OllamaPool(named, monotonic=(clock or FakeClock()).monotonic) as pool:
        yield pool
    assert all(engine.closed for engine in engines)


def generation(model: str = BASE) -> Generation:
    return Generation(model, "hello", Sampling())


async def answer(pool: OllamaPool, model: str = BASE) -> str:
    async with aclosing(pool.generate(generation(model))) as events:
        return "".join([event.text async for event in events if isinstance(event, Piece)])


async def fail(pool: OllamaPool, times: int = FAILURES_TO_EJECT) -> None:
    for _ in range(times):
        with pytest.raises((EngineUnavailable, EngineFailed)):
            await answer(pool)


def standings(pool: OllamaPool) -> list[Standing]:
    return [host.standing for host in pool.hosts]


# Who is asked


async def test_idle_hosts_take_turns() -> None:
    one, two = FakeEngine(), FakeEngine()
    async with pool_of(one, two) as pool:
        for _ in range(6):
            assert await answer(pool) == "Hello, world!"
    assert (len(one.asked), len(two.asked)) == (3, 3)


async def test_a_request_goes_to_the_host_with_the_most_room() -> None:
    small, large = FakeEngine(parallel=1), FakeEngine(parallel=3)
    small.hold = large.hold = asyncio.Event()
    async with pool_of(small, large) as pool:
        assert pool.parallel == 4
        tasks = [asyncio.create_task(answer(pool)) for _ in range(4)]
        while small.running + large.running < 4:  # noqa: ASYNC110 - no sleep, only a turn of the loop
            await asyncio.sleep(0)
        assert (small.running, large.running) == (1, 3)
        small.hold.set()
        await asyncio.gather(*tasks)
        assert [host.in_flight for host in pool.hosts] == [0, 0]


async def test_only_a_host_that_has_the_version_is_asked() -> None:
    one, two = FakeEngine(), FakeEngine(models=(BASE, NEW))
    async with pool_of(one, two) as pool:
        for _ in range(3):
            await answer(pool, NEW)
        with pytest.raises(NotFound, match="nobody:1"):
            await answer(pool, "nobody:1")
    assert (len(one.asked), len(two.asked)) == (0, 3)


async def test_a_name_that_no_version_can_have_is_the_callers_mistake_before_any_host_is_asked() -> None:
    async with pool_of(FakeEngine(), FakeEngine()) as pool:
        for call in (answer(pool, "../../etc:passwd"), pool.load("tiny"), pool.count_tokens("", "x")):
            with pytest.raises(InvalidArgument):
                await call


async def test_what_was_installed_on_a_host_since_its_check_is_found() -> None:
    one, two = FakeEngine(), FakeEngine()
    async with pool_of(one, two) as pool:
        two.models[NEW] = replace(two.models[BASE], name=NEW)
        assert await answer(pool, NEW) == "Hello, world!"


async def test_the_same_name_with_other_bytes_is_another_version() -> None:
    one, two = FakeEngine(), FakeEngine()
    two.models[BASE] = replace(two.models[BASE], sha256="f" * 64)
    async with pool_of(one, two) as pool:
        for _ in range(4):
            await answer(pool)
        assert [model.sha256 for model in await pool.list_models()] == ["0" * 64]
    assert two.asked == []


async def test_closing_an_answer_frees_the_place_and_blames_nobody() -> None:
    engine = FakeEngine()
    async with pool_of(engine) as pool:
        for _ in range(FAILURES_TO_EJECT * 2):
            async with aclosing(pool.generate(generation())) as events:
                await anext(events)
        assert (pool.hosts[0].in_flight, engine.running) == (0, 0)
        assert standings(pool) == [Standing.WELL]


# Who fails


@pytest.mark.parametrize("error", [EngineUnavailable("reset"), EngineFailed("nonsense")])
async def test_where_a_host_fails_before_its_first_token_another_answers(error: Exception) -> None:
    bad, good = FakeEngine(fail=error), FakeEngine()
    async with pool_of(bad, good) as pool:
        for _ in range(4):
            assert await answer(pool) == "Hello, world!"


async def test_after_the_first_token_no_other_host_is_asked() -> None:
    bad, good = FakeEngine(fail=EngineUnavailable("reset"), hold_at=1), FakeEngine()
    async with pool_of(bad, good) as pool:
        with pytest.raises(EngineUnavailable):
            await answer(pool)
    assert good.asked == []


async def test_a_version_that_a_host_no_longer_has_is_asked_of_another() -> None:
    one, two = FakeEngine(), FakeEngine()
    async with pool_of(one, two) as pool:
        one.models.clear()
        assert [await answer(pool) for _ in range(3)] == ["Hello, world!"] * 3
    assert len(one.asked) == 1


async def test_the_callers_mistake_is_nobodys_failure() -> None:
    one, two = FakeEngine(fail=InvalidArgument("too long")), FakeEngine(fail=InvalidArgument("too long"))
    async with pool_of(one, two) as pool:
        for _ in range(FAILURES_TO_EJECT * 2):
            with pytest.raises(InvalidArgument):
                await answer(pool)
        assert standings(pool) == [Standing.WELL, Standing.WELL]
    assert len(one.asked) + len(two.asked) == FAILURES_TO_EJECT * 2, "each was asked of one host"


async def test_answers_that_do_not_fit_their_schema_eject_nobody() -> None:
    wrong = FakeEngine(fail=EngineFailed("it does not fit"), hold_at=4)
    async with pool_of(wrong, FakeEngine(down=True)) as pool:
        await fail(pool, FAILURES_TO_EJECT * 2)
        assert pool.hosts[0].standing is Standing.WELL


async def test_a_host_that_fails_again_and_again_is_ejected_for_longer_each_time() -> None:
    clock, bad, good = FakeClock(), FakeEngine(fail=EngineUnavailable("reset")), FakeEngine()
    async with pool_of(bad, good, clock=clock) as pool:
        seconds, has = EJECTION_SECONDS, dict(pool.hosts[1].models)
        for _ in range(7):
            pool.hosts[1].models.clear()  # so that the bad one is asked
            await fail(pool)
            pool.hosts[1].models |= has
            before = len(bad.asked)
            clock.advance(seconds - 0.1)
            assert standings(pool) == [Standing.EJECTED, Standing.WELL]
            await answer(pool)
            assert len(bad.asked) == before
            clock.advance(0.2)
            assert standings(pool) == [Standing.WELL, Standing.WELL]
            seconds = min(seconds * 2, LONGEST_EJECTION_SECONDS)
        clock.advance(CALM_SECONDS + 1)
        pool.hosts[1].models.clear()
        await fail(pool)
        clock.advance(EJECTION_SECONDS + 0.1)
        assert standings(pool)[0] is Standing.WELL, "after long calm it begins anew"


async def test_an_answer_in_between_forgives_failures() -> None:
    flaky, other = FakeEngine(), FakeEngine(down=True)
    async with pool_of(flaky, other) as pool:
        for _ in range(FAILURES_TO_EJECT):
            flaky.fail = EngineUnavailable("reset")
            await fail(pool, FAILURES_TO_EJECT - 1)
            flaky.fail = None
            await answer(pool)
        assert pool.hosts[0].standing is Standing.WELL


async def test_never_more_than_half_of_the_hosts_are_ejected() -> None:
    engines = [FakeEngine(fail=EngineUnavailable("reset")) for _ in range(5)]
    async with pool_of(*engines) as pool:
        await fail(pool, 50)
        assert Counter(standings(pool)) == {Standing.EJECTED: 2, Standing.WELL: 3}
        assert pool.standings() == {"well": 3, "ejected": 2, "down": 0}


async def test_an_ejected_host_is_asked_rather_than_nobody() -> None:
    bad, down = FakeEngine(fail=EngineUnavailable("reset")), FakeEngine()
    async with pool_of(bad, down) as pool:
        down.down = True
        await fail(pool)
        assert standings(pool)[0] is Standing.EJECTED
        bad.fail = None
        assert await answer(pool) == "Hello, world!"


async def test_a_host_that_is_back_is_given_little_at_first() -> None:
    clock, one, two = FakeClock(), FakeEngine(), FakeEngine()
    async with pool_of(one, two, clock=clock) as pool:
        two.down = True
        for _ in range(2):
            await pool._look()
        assert standings(pool) == [Standing.WELL, Standing.DOWN]
        await answer(pool)
        two.down = False
        await pool._look()
        assert standings(pool) == [Standing.WELL, Standing.WELL]
        before = len(one.asked), len(two.asked)
        for _ in range(8):
            await answer(pool)
        assert (len(one.asked), len(two.asked)) == (before[0] + 8, before[1])
        clock.advance(SLOW_START_SECONDS)
        for _ in range(8):
            await answer(pool)
        assert (len(one.asked), len(two.asked)) == (before[0] + 12, before[1] + 4)


# Checks


async def test_one_check_that_fails_is_no_outage_and_one_that_passes_ends_one() -> None:
    engine = FakeEngine()
    async with pool_of(engine, FakeEngine()) as pool:
        engine.down = True
        await pool._look()
        assert standings(pool)[0] is Standing.WELL
        await pool._look()
        assert standings(pool)[0] is Standing.DOWN
        engine.down = False
        await pool._look()
        assert standings(pool)[0] is Standing.WELL


async def test_a_check_that_hangs_or_fails_oddly_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(FakeEngine):
        async def list_models(self):  # type: ignore[no-untyped-def]
            if self.hold is not None:
                await self.hold.wait()
            raise RuntimeError("a bug")

    monkeypatch.setattr(ollama_pool, "CHECK_LIMIT_SECONDS", 0.01)
    hanging = Odd(hold=asyncio.Event())
    async with pool_of(Odd(), hanging, FakeEngine()) as pool:
        await pool._look()
        assert standings(pool) == [Standing.DOWN, Standing.DOWN, Standing.WELL]


async def test_hosts_are_checked_all_the_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama_pool, "CHECK_SECONDS", 0.001)
    engine = FakeEngine()
    async with pool_of(engine, FakeEngine()) as pool:
        engine.down = True
        async with asyncio.timeout(5):
            while standings(pool)[0] is not Standing.DOWN:  # noqa: ASYNC110 - states that no event tells of
                await asyncio.sleep(0.001)


async def test_the_pool_answers_its_check_while_one_host_does() -> None:
    one, two = FakeEngine(down=True), FakeEngine()
    async with pool_of(one, two) as pool:
        await pool.check()
        two.down = True
        with pytest.raises(EngineUnavailable):
            await pool.check()
        for call in (pool.list_models(), pool.load(BASE), pool.count_tokens("nobody:1", "x")):
            with pytest.raises(EngineUnavailable):
                await call


# What all hosts do


def gguf(path: Path, content: bytes = b"GGUF one") -> str:
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


async def test_a_version_is_installed_loaded_unloaded_and_removed_everywhere(tmp_path: Path) -> None:
    one, two = FakeEngine(), FakeEngine()
    async with pool_of(one, two) as pool:
        sha256 = gguf(tmp_path / "a")
        assert await pool.install(NEW, tmp_path / "a", sha256)
        assert not await pool.install(NEW, tmp_path / "a", sha256)
        assert NEW in one.models
        assert NEW in two.models
        await pool.load(NEW)
        assert one.models[NEW].loaded
        assert two.models[NEW].loaded
        await pool.unload(NEW)
        assert not one.models[NEW].loaded
        one.models[NEW] = replace(one.models[NEW], loaded=True)
        listed = {model.name: model.loaded for model in await pool.list_models()}
        assert listed == {BASE: True, NEW: False}, "loaded is loaded everywhere"
        assert await pool.remove(NEW)
        assert not await pool.remove(NEW)
        assert list(one.models) == list(two.models) == [BASE]
        with pytest.raises(NotFound):
            await pool.load(NEW)


async def test_a_host_out_of_reach_is_caught_up_by_installing_again(tmp_path: Path) -> None:
    one, two = FakeEngine(), FakeEngine(down=True)
    async with pool_of(one, two) as pool:
        sha256 = gguf(tmp_path / "a")
        assert await pool.install(NEW, tmp_path / "a", sha256)
        two.down = False
        assert await pool.install(NEW, tmp_path / "a", sha256)
        assert NEW in two.models


async def test_removing_says_which_host_still_has_it(tmp_path: Path) -> None:
    one, two = FakeEngine(), FakeEngine()
    async with pool_of(one, two) as pool:
        await pool.install(NEW, tmp_path / "a", gguf(tmp_path / "a"))
        two.down = True
        with pytest.raises(EngineUnavailable, match="http://1"):
            await pool.remove(NEW)
        assert NEW not in one.models
        two.down = False
        assert await pool.remove(NEW)


async def test_a_name_that_one_host_has_with_other_bytes_is_not_given_again(tmp_path: Path) -> None:
    one, two = FakeEngine(), FakeEngine(models=(BASE, NEW))
    async with pool_of(one, two) as pool:
        with pytest.raises(AlreadyExists):
            await pool.install(NEW, tmp_path / "a", gguf(tmp_path / "a"))


async def test_vectors_and_counts_come_from_another_host_where_one_fails() -> None:
    class Bad(FakeEngine):
        async def count_tokens(self, model_version: str, prompt: str) -> int:
            raise EngineUnavailable("reset")

        async def generate(self, generation: Generation) -> AsyncGenerator[Piece | Finished, None]:
            raise AssertionError("nobody generates here")
            yield

    bad, good = Bad(), FakeEngine()
    async with pool_of(bad, good) as pool:
        assert await pool.count_tokens(BASE, "one two") == 2
        assert len((await pool.embed(BASE, ["x"])).vectors) == 1
        good.down = True
        with pytest.raises(EngineUnavailable):
            await pool.count_tokens(BASE, "one two")


async def test_every_host_shrinks_and_grows_again() -> None:
    engines = FakeEngine(), FakeEngine()
    async with pool_of(*engines) as pool:
        await pool.shrink(512)
        assert [engine.small for engine in engines] == [512, 512]
        await pool.grow()
        assert [engine.small for engine in engines] == [None, None]
