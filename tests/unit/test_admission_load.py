"""Admission under loads that last hours, in virtual time: goodput, fairness, priorities, and nothing left."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from dataclasses import dataclass, field

from grpc_server.admission import Admission, Ask
from grpc_server.domain.errors import AgentLoopError
from grpc_server.domain.types import Priority
from tests.virtual_time import clock, in_virtual_time

PLACES = 4
SERVICE = 1.0
TOKENS = 100


@dataclass
class Load:
    """Requests to an engine of PLACES, whose answers take SERVICE seconds each."""

    admission: Admission = field(default_factory=lambda: Admission(PLACES, queue_size=64, monotonic=clock))
    waits: dict[str, list[float]] = field(default_factory=dict)
    ends: Counter[str] = field(default_factory=Counter)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def send(
        self,
        caller: str,
        *,
        deadline: float | None = None,
        priority: Priority = Priority.INTERACTIVE,
        seconds: float = SERVICE,
    ) -> None:
        self.tasks.append(asyncio.create_task(self._ask(caller, deadline, priority, seconds)))

    async def _ask(self, caller: str, deadline: float | None, priority: Priority, seconds: float) -> None:
        arrived = clock()
        try:
            async with asyncio.timeout(deadline):
                ask = Ask(caller, priority, 4 * TOKENS, "m", TOKENS, deadline)
                async with self.admission.place(ask) as place:
                    self.waits.setdefault(caller, []).append(clock() - arrived)
                    await asyncio.sleep(seconds)
                    self.admission.times.answered("m", seconds / 10, seconds, TOKENS)
                    place.used(TOKENS)
                    self.ends["answered"] += 1
        except AgentLoopError as error:
            self.ends[type(error).__name__] += 1
        except TimeoutError:
            self.ends["late"] += 1

    async def until_empty(self) -> None:
        await asyncio.gather(*self.tasks)
        assert (self.admission.in_flight, self.admission.queued) == (0, 0)
        assert [queue.remembered for queue in self.admission._queues.values()] == [0, 0]


async def _overload(times: float, seconds: float = 600.0) -> Load:
    """`times` what the engine can do, from 20 callers, each request with a deadline of 5 s."""
    load, gap = Load(), SERVICE / PLACES / times
    for number in range(int(seconds / gap)):
        load.send(f"caller {number % 20}", deadline=5.0)
        await asyncio.sleep(gap)
    await load.until_empty()
    return load


def test_at_ten_times_what_the_engine_can_do_as_much_is_answered_in_time_as_at_once() -> None:
    once, tenfold = (in_virtual_time(_overload(times)) for times in (1, 10))
    assert once.ends["answered"] > 0.95 * 600 * PLACES
    assert tenfold.ends["answered"] >= 0.95 * once.ends["answered"]
    assert tenfold.ends["late"] <= 0.01 * tenfold.ends["answered"]


def test_at_ten_times_the_load_all_callers_get_the_same() -> None:
    load = in_virtual_time(_overload(10))
    served = [len(waits) for waits in load.waits.values()]
    assert len(served) == 20
    assert max(served) <= 1.2 * min(served)


async def _flooded() -> Load:
    """One caller sends all that it may, all the time; another asks now and then."""
    load = Load()
    for _ in range(600):
        for _ in range(32):
            load.send("flood")
        load.send("other")
        await asyncio.sleep(2.0)
    await load.until_empty()
    return load


def test_a_flood_delays_nobody_elses_first_token_by_more_than_one_turn() -> None:
    load = in_virtual_time(_flooded())
    assert len(load.waits["other"]) == 600
    assert max(load.waits["other"]) <= SERVICE
    assert load.ends["answered"] >= 0.99 * 600 * 2 * PLACES  # and the flood gets all that is left


async def _many_flooded() -> Load:
    """Ten callers flood; the eleventh asks now and then."""
    load = Load()
    for _ in range(300):
        for caller in range(10):
            for _ in range(10):
                load.send(f"flood {caller}")
        load.send("other")
        await asyncio.sleep(4.0)
    await load.until_empty()
    return load


def test_among_ten_who_flood_the_eleventh_gets_a_place_within_its_share() -> None:
    load = in_virtual_time(_many_flooded())
    assert len(load.waits["other"]) == 300  # though the queue was full each time
    assert max(load.waits["other"]) <= SERVICE * math.ceil(11 / PLACES)


async def _with_batch() -> Load:
    load = Load()
    for _ in range(600):
        for number in range(8):
            load.send(f"person {number}")
        for _ in range(4):
            load.send("night", priority=Priority.BATCH)
        await asyncio.sleep(1.0)
    await load.until_empty()
    return load


def test_batch_requests_get_an_eighth_however_many_people_ask() -> None:
    load = in_virtual_time(_with_batch())
    places = PLACES * 600
    assert len(load.waits["night"]) >= places / 8
    assert sum(len(waits) for caller, waits in load.waits.items() if caller != "night") >= 0.85 * places


async def _cancelled() -> Load:
    """Callers who give up after a random while; seeds are fixed by their numbers."""
    load = Load()
    for number in range(3000):
        load.send(f"caller {number % 7}", deadline=None if number % 3 else 20.0)
        if number % 2:
            asyncio.get_running_loop().call_later(0.1 * (number % 37), load.tasks[-1].cancel)
        await asyncio.sleep(0.1)
    await asyncio.gather(*load.tasks, return_exceptions=True)
    return load


def test_those_who_give_up_leave_no_trace() -> None:
    load = in_virtual_time(_cancelled())
    assert (load.admission.in_flight, load.admission.queued) == (0, 0)
    assert [queue.remembered for queue in load.admission._queues.values()] == [0, 0]
    assert load.ends["answered"] > 1000


async def _slowed() -> tuple[int, int]:
    """The engine takes ten times as long for a while; nobody with a short deadline is refused for ever."""
    load = Load()
    for second in range(300):
        load.send("one", deadline=5.0, seconds=10.0 if 100 <= second < 150 else SERVICE)
        await asyncio.sleep(1.0)
        if second == 200:
            before = load.ends["answered"]
    await load.until_empty()
    return before, load.ends["answered"]


def test_an_engine_that_was_slow_for_a_while_is_asked_again() -> None:
    before, after = in_virtual_time(_slowed())
    assert after - before == 100
