"""An Ollama that answers its checks and generates nothing: who notices, who is blamed, and who is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest

from grpc_server.adapters import ollama_pool
from grpc_server.adapters.ollama_pool import OllamaPool
from grpc_server.adapters.pool_host import FAILURES_TO_EJECT, GIVEN_UP_SECONDS, STALLED_SECONDS, Standing
from grpc_server.domain.errors import EngineUnavailable
from grpc_server.domain.ports import Finished, Generation, Piece
from tests.fakes import BASE, FakeEngine
from tests.unit.test_ollama_pool import NEVER, answer, pool_of, standings
from tests.virtual_time import clock, in_virtual_time


@pytest.fixture(autouse=True)
def checks_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama_pool, "CHECK_SECONDS", NEVER)


class Slow(FakeEngine):
    """Reads each prompt for `reading` seconds, then writes two pieces a second."""

    reading = 0.0

    async def generate(self, generation: Generation) -> AsyncGenerator[Piece | Finished, None]:
        await asyncio.sleep(self.reading)
        async for event in super().generate(generation):
            await asyncio.sleep(0.5)
            yield event


def stalled() -> FakeEngine:
    """Takes requests, and never says a word."""
    return FakeEngine(hold=asyncio.Event())


@asynccontextmanager
async def pool(*engines: FakeEngine) -> AsyncIterator[OllamaPool]:
    async with pool_of(*engines, clock=SimpleNamespace(monotonic=clock)) as made:  # type: ignore[arg-type]
        yield made


async def give_up(pool: OllamaPool, after: float, at_once: int = 1) -> None:
    async def one() -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(after):
                await answer(pool)

    await asyncio.gather(*(one() for _ in range(at_once)))


def run(main: Coroutine[Any, Any, None]) -> None:
    in_virtual_time(main)


def test_a_request_leaves_a_host_that_has_stalled_and_another_answers_it() -> None:
    async def main() -> None:
        bad, good = stalled(), FakeEngine()
        async with pool(bad, good) as both:
            assert await answer(both) == "Hello, world!"
            assert (clock(), bad.running) == (STALLED_SECONDS, 0)
            assert len(good.asked) == 1

    run(main())


def test_a_host_that_stalls_again_and_again_is_ejected_though_it_answers_its_checks() -> None:
    async def main() -> None:
        bad, good = stalled(), FakeEngine()
        async with pool(bad, good) as both:
            for _ in range(2 * FAILURES_TO_EJECT):
                await answer(both)
                await both._look()
            assert standings(both)[0] is Standing.EJECTED
            assert len(bad.asked) == FAILURES_TO_EJECT

    run(main())


def test_it_is_noticed_too_where_no_caller_waits_for_so_long() -> None:
    async def main() -> None:
        async with pool(stalled(), FakeEngine()) as both:
            for _ in range(2 * FAILURES_TO_EJECT):
                await give_up(both, after=3 * GIVEN_UP_SECONDS)
            assert standings(both)[0] is Standing.EJECTED

    run(main())


@pytest.mark.parametrize(
    ("after", "times", "at_once"),
    [
        pytest.param(GIVEN_UP_SECONDS / 2, 40, 1, id="callers who do not wait"),
        pytest.param(3 * GIVEN_UP_SECONDS, 1, 40, id="a caller who ends many at once"),
    ],
)
def test_what_callers_end_themselves_ejects_nobody(after: float, times: int, at_once: int) -> None:
    async def main() -> None:
        async with pool(stalled(), stalled()) as both:
            for _ in range(times):
                await give_up(both, after, at_once)
            assert standings(both) == [Standing.WELL, Standing.WELL]

    run(main())


def test_who_writes_for_others_has_not_stalled() -> None:
    async def main() -> None:
        busy, other = Slow(reply=["x"] * 200), FakeEngine()
        async with pool(busy, other) as both:
            both.hosts[1].in_flight = 100  # so that the busy one is asked
            first = asyncio.create_task(answer(both))
            await asyncio.sleep(1)
            busy.reading = 2 * STALLED_SECONDS
            for _ in range(2 * FAILURES_TO_EJECT):
                await give_up(both, after=3 * GIVEN_UP_SECONDS)
            assert await answer(both) == "x" * 200
            assert await first == "x" * 200
            assert standings(both) == [Standing.WELL, Standing.WELL]
            assert other.asked == []

    run(main())


def test_where_nobody_else_is_well_a_request_waits_for_as_long_as_it_may() -> None:
    async def main() -> None:
        bad, down = stalled(), FakeEngine()
        async with pool(bad, down) as both:
            down.down = True
            for _ in range(2):
                await both._look()
            waiting = asyncio.create_task(answer(both))
            await asyncio.sleep(4 * STALLED_SECONDS)
            assert not waiting.done()
            assert bad.hold is not None
            bad.hold.set()
            assert await waiting == "Hello, world!"

    run(main())


def test_a_request_that_waits_leaves_as_soon_as_another_host_is_back() -> None:
    async def main() -> None:
        bad, other = stalled(), FakeEngine()
        async with pool(bad, other) as both:
            other.down = True
            for _ in range(2):
                await both._look()
            waiting = asyncio.create_task(answer(both))
            await asyncio.sleep(2 * STALLED_SECONDS)
            other.down = False
            await both._look()
            assert await waiting == "Hello, world!"
            assert clock() < 2 * STALLED_SECONDS + 2
            assert bad.running == 0

    run(main())


def test_that_a_host_tells_what_a_file_is_does_not_forgive_it() -> None:
    async def main() -> None:
        bad, down = FakeEngine(fail=EngineUnavailable("reset")), FakeEngine(down=True)
        async with pool(bad, down) as both:
            for _ in range(FAILURES_TO_EJECT):
                await both.show(BASE)
                with pytest.raises(EngineUnavailable):
                    await answer(both)
            assert standings(both)[0] is Standing.EJECTED

    run(main())
