"""What a place at the engine costs, beside asyncio's semaphore.

Microseconds to take a place and give it back: by one request at a time, and by 1000 that wait for 4 places,
of 1 caller and of 250. The semaphore hands out the same places in the order of arrival, and knows nothing
of callers, deadlines, costs or priorities. Then how much longer a turn takes in a queue of 10,000 callers
than in one of 10.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from benchmarks.line import Line
from grpc_server.admission import Admission, Ask
from grpc_server.domain.fair_queue import FairQueue

ROUNDS = 20_000
WAITING = 1_000
PLACES = 4
TURNS = 20_000
TRIES = 3
"""The best of so many counts: what disturbs only makes slower."""

Place = Callable[[int], AbstractAsyncContextManager[object]]


async def _alone(place: Place) -> float:
    started = time.perf_counter()
    for _ in range(ROUNDS):
        async with place(0):
            pass
    return ROUNDS / (time.perf_counter() - started)


async def _crowded(place: Place) -> float:
    async def work(number: int) -> None:
        async with place(number):
            await asyncio.sleep(0)

    started = time.perf_counter()
    for _ in range(ROUNDS // WAITING):
        await asyncio.gather(*(work(number) for number in range(WAITING)))
    return ROUNDS / (time.perf_counter() - started)


def _admitted(callers: int) -> Place:
    admission = Admission(PLACES, queue_size=WAITING, queue_per_caller=WAITING)
    asks = [Ask(f"caller {number}", cost=100, model_version="m", seconds=60) for number in range(callers)]
    return lambda number: admission.place(asks[number % callers])


def _semaphore() -> Place:
    semaphore = asyncio.Semaphore(PLACES)
    return lambda _: semaphore


def _seconds_a_turn(callers: int) -> float:
    queue = FairQueue[int](callers, 2)
    for number in range(callers):
        queue.push(str(number), number, 100)
    started = time.perf_counter()
    for turn in range(TURNS):
        number = queue.pop()
        queue.end(str(number), 100, 50 + turn % 7)
        queue.push(str(number), number, 100)
    return (time.perf_counter() - started) / TURNS


def run() -> list[Line]:
    """Measure in this process, on one core."""

    def best(measure: Callable[[Place], object], place: Callable[[], Place]) -> float:
        return max(asyncio.run(measure(place())) for _ in range(TRIES))  # type: ignore[arg-type]

    alone, bare = best(_alone, lambda: _admitted(1)), best(_alone, _semaphore)
    one, crowd = best(_crowded, lambda: _admitted(1)), best(_crowded, lambda: _admitted(250))
    waiting = best(_crowded, _semaphore)
    few, many = (min(_seconds_a_turn(callers) for _ in range(TRIES)) for callers in (10, 10_000))
    peer = "asyncio.Semaphore"
    return [
        Line("admission", "us_a_place", 1e6 / alone, "us", peer, 1e6 / bare, "<= 100"),
        Line("admission", "us_a_place_1_caller_waits", 1e6 / one, "us", peer, 1e6 / waiting, "<= 200"),
        Line("admission", "us_a_place_250_callers_wait", 1e6 / crowd, "us", peer, 1e6 / waiting, "<= 200"),
        Line("admission", "turn_10000_vs_10_callers", many / few, "ratio", "10 callers", 1.0, "<= 4"),
    ]
