"""Places at the engine: never too many, in the order of arrival, and none lost."""

from __future__ import annotations

import asyncio

import pytest

from grpc_server.admission import Admission
from grpc_server.domain.errors import Exhausted


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


async def test_places_are_given_in_the_order_of_arrival() -> None:
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
        with pytest.raises(Exhausted, match="1 requests wait"):
            await admission.place().__aenter__()
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
        with pytest.raises(Exhausted, match=r"no place became free in 0\.01 s"):
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


async def _hold(admission: Admission) -> None:
    async with admission.place():
        await asyncio.sleep(0)
