"""Places at the engine: never too many, none lost, and refused at once where they would come too late."""

from __future__ import annotations

import asyncio

import pytest

from grpc_server.admission import Admission, Ask, cost_of
from grpc_server.domain.errors import (
    CallerQueueFull,
    CannotFinish,
    DeadlineExceeded,
    Exhausted,
    MemoryLow,
    QueueFull,
    QueueTimeout,
)
from grpc_server.domain.rules import estimated_tokens
from grpc_server.domain.types import ChatRequest, Message, Priority, Role, Sampling, Tool
from tests.fakes import FakeClock


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_no_more_run_at_once_than_there_are_places() -> None:
    admission, most = Admission(3), 0

    async def work() -> None:
        nonlocal most
        async with admission.place():
            most = max(most, admission.in_flight)
            await asyncio.sleep(0)

    await asyncio.gather(*(work() for _ in range(20)))
    assert most == 3
    assert (admission.in_flight, admission.queued) == (0, 0)


async def test_one_callers_places_are_given_in_the_order_of_arrival() -> None:
    admission = Admission(1)
    served: list[int] = []

    async def work(number: int) -> None:
        async with admission.place():
            served.append(number)
            await asyncio.sleep(0)

    await asyncio.gather(*(work(number) for number in range(10)))
    assert served == list(range(10))


async def test_a_full_queue_refuses_at_once() -> None:
    admission = Admission(1, queue_size=1)
    async with admission.place():
        waiting = asyncio.create_task(_hold(admission))
        await settle()
        with pytest.raises(QueueFull, match="all 1 places are taken and 1 requests wait") as refused:
            await admission.place(Ask("another")).__aenter__()
        assert refused.value.retry_after_seconds == 1
    await waiting


async def test_without_waiting_a_taken_place_refuses_at_once() -> None:
    admission = Admission(1)
    async with admission.place():
        with pytest.raises(Exhausted):
            await admission.place(wait=False).__aenter__()
    async with admission.place(wait=False):
        assert admission.in_flight == 1


async def test_a_wait_that_takes_too_long_is_refused_and_leaves_the_queue() -> None:
    admission = Admission(1, queue_seconds=0.01)
    async with admission.place():
        with pytest.raises(QueueTimeout, match=r"no place became free in 0\.01 s"):
            await admission.place().__aenter__()
        assert admission.queued == 0
    assert admission.in_flight == 0


async def test_a_wait_that_is_cancelled_leaves_the_queue_and_loses_no_place() -> None:
    admission = Admission(1)
    async with admission.place():
        first, second = (asyncio.create_task(_hold(admission)) for _ in range(2))
        await settle()
        first.cancel()
        await settle()
        assert admission.queued == 1
    await second
    assert first.cancelled()
    assert (admission.in_flight, admission.queued) == (0, 0)


async def test_a_place_given_in_the_moment_of_cancellation_goes_to_the_next() -> None:
    admission = Admission(1)
    async with admission.place():
        first, second = (asyncio.create_task(_hold(admission)) for _ in range(2))
        await settle()
    first.cancel()  # it was given the place just now, and has not run since
    await second
    assert first.cancelled()
    assert admission.in_flight == 0


async def test_a_place_freed_in_the_moment_after_a_cancellation_is_not_lost() -> None:
    admission = Admission(1)
    async with admission.place():
        first = asyncio.create_task(_hold(admission))
        await settle()
        first.cancel()  # it has not run since
    await asyncio.gather(first, return_exceptions=True)
    async with admission.place(wait=False):
        assert admission.in_flight == 1


async def test_a_place_is_given_back_when_its_block_fails() -> None:
    admission = Admission(1)
    with pytest.raises(KeyError):
        async with admission.place():
            raise KeyError
    assert admission.in_flight == 0


async def test_a_caller_whose_requests_wait_already_is_refused_and_others_are_not() -> None:
    admission = Admission(1, queue_size=8, queue_per_caller=1)
    async with admission.place():
        waiting = [asyncio.create_task(_hold(admission, Ask(caller))) for caller in ("one", "two")]
        await settle()
        with pytest.raises(CallerQueueFull, match="send fewer at once"):
            await admission.place(Ask("one")).__aenter__()
        assert admission.queued == 2
    await asyncio.gather(*waiting)


async def test_in_a_full_queue_the_caller_with_most_gives_way_to_one_with_less() -> None:
    admission = Admission(1, queue_size=4, queue_per_caller=4)
    async with admission.place():
        flood = [asyncio.create_task(_hold(admission, Ask("flood"))) for _ in range(4)]
        await settle()
        other = asyncio.create_task(_hold(admission, Ask("other")))
        await settle()
        assert flood[3].done()
        assert isinstance(flood[3].exception(), CallerQueueFull)
        assert admission.queued == 4
    await asyncio.gather(other, *flood[:3])
    assert admission.in_flight == 0


async def test_interactive_requests_go_first_and_batch_ones_get_every_eighth_place() -> None:
    admission, served = Admission(1, queue_size=99, queue_per_caller=99), ""

    async def work(priority: Priority) -> None:
        nonlocal served
        async with admission.place(Ask("one", priority)):
            served += priority[0]

    async with admission.place():
        tasks = [asyncio.create_task(work(Priority.BATCH)) for _ in range(3)]
        tasks += [asyncio.create_task(work(Priority.INTERACTIVE)) for _ in range(10)]
        await settle()
        assert (admission.queued_of(Priority.BATCH), admission.queued_of(Priority.INTERACTIVE)) == (3, 10)
    await asyncio.gather(*tasks)
    assert served == "iiiiiiibiiibb"


async def test_a_deadline_that_no_answer_meets_is_refused_at_once_even_by_an_idle_engine() -> None:
    admission = _measured(seconds=2)
    with pytest.raises(DeadlineExceeded, match=r"in 1 s, and nine of ten answers take over 2 s"):
        await admission.place(_ask(seconds=1)).__aenter__()
    async with admission.place(_ask(seconds=3)):
        assert admission.in_flight == 1
    async with admission.place(_ask(seconds=None)):
        assert admission.in_flight == 1


async def test_who_could_not_be_answered_in_time_is_refused_at_once_with_what_is_expected() -> None:
    admission = _measured(seconds=2)
    async with admission.place():
        first = asyncio.create_task(_hold(admission, _ask(seconds=None)))
        await settle()
        with pytest.raises(
            CannotFinish, match=r"place is expected in 4 s, and with an answer of 2\.2 s .* 5 s until"
        ) as refused:
            await admission.place(_ask(seconds=5)).__aenter__()
        assert refused.value.retry_after_seconds == 4
        second = asyncio.create_task(_hold(admission, _ask(seconds=7)))
        await settle()
        assert admission.queued == 2
    await asyncio.gather(first, second)


async def test_a_batch_request_expects_to_wait_for_interactive_ones() -> None:
    admission = _measured(seconds=1)
    async with admission.place():
        waiting = [asyncio.create_task(_hold(admission, _ask(seconds=None))) for _ in range(3)]
        await settle()
        with pytest.raises(CannotFinish, match="a place is expected in 4 s"):
            await admission.place(Ask("b", Priority.BATCH, 1, "m", 1, seconds=4.5)).__aenter__()
    await asyncio.gather(*waiting)


async def test_who_can_no_longer_finish_when_its_turn_comes_makes_room_for_who_can() -> None:
    clock = FakeClock()
    admission = Admission(1, monotonic=clock.monotonic)
    async with admission.place():
        late = asyncio.create_task(_hold(admission, _ask(seconds=5)))
        able = asyncio.create_task(_hold(admission, _ask(seconds=50)))
        await settle()
        clock.advance(4)
        _measure(admission, 2)
    with pytest.raises(CannotFinish, match=r"1 s are left until the deadline, and an answer takes 2\.2 s"):
        await late
    await able
    assert (admission.in_flight, admission.queued) == (0, 0)


async def test_with_too_little_memory_nothing_new_begins() -> None:
    available = [100 << 20]
    admission = Admission(1, memory_available=lambda: available[0], memory_floor=200 << 20)
    with pytest.raises(MemoryLow, match="100 MiB of memory are free, and 200 MiB are kept"):
        await admission.place().__aenter__()
    available[0] = 200 << 20
    async with admission.place():
        assert admission.in_flight == 1


async def test_without_a_floor_nobody_looks_at_the_memory() -> None:
    def look() -> int:
        raise AssertionError

    async with Admission(1, memory_available=look).place():
        pass


def test_the_cost_of_a_request_is_what_it_says_and_what_it_may_write() -> None:
    tool = Tool("t", "d" * 40, {})
    request = ChatRequest((Message(Role.USER, "x" * 400),), tools=(tool,), sampling=Sampling(max_tokens=7))
    assert cost_of(request, estimated_tokens(request)) == 117


async def _hold(admission: Admission, ask: Ask | None = None) -> None:
    async with admission.place(ask):
        await asyncio.sleep(0)


def _ask(seconds: float | None) -> Ask:
    return Ask(model_version="m", seconds=seconds)


def _measured(seconds: float) -> Admission:
    """One place, whose answers took `seconds` each."""
    admission = Admission(1, monotonic=FakeClock().monotonic)
    _measure(admission, seconds)
    return admission


def _measure(admission: Admission, seconds: float) -> None:
    for _ in range(10):
        admission.times.held(seconds)
        admission.times.answered("m", seconds, seconds, 1)
