"""Answers that are cut off: what the log then says of tokens, and cancelling by id."""

from __future__ import annotations

import asyncio
from uuid import UUID, uuid4

import pytest

from grpc_server.domain.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineUnavailable,
    NotFound,
    StoreUnavailable,
)
from grpc_server.domain.types import Caller, Scope, Started, Status, Usage
from tests.fakes import FakeEngine
from tests.unit.test_inference import ADMIN, CALLER, Bench, ask


def held(**options: object) -> FakeEngine:
    """An engine that waits after two pieces."""
    return FakeEngine(hold=asyncio.Event(), hold_at=2, **options)  # type: ignore[arg-type]


async def begun(bench: Bench) -> asyncio.Task[None]:
    """A chat of CALLER that has been sent two pieces."""
    task = asyncio.create_task(bench.chat())
    await bench.engine.streaming.wait()
    return task


def words(bench: Bench) -> int:
    """Words of the prompt that the engine was asked: its tokens, to a fake."""
    return len(bench.engine.asked[0].prompt.split())


def identity(bench: Bench) -> UUID:
    started = bench.seen.events[0]
    assert isinstance(started, Started)
    return started.inference_id


async def test_a_cancelled_answer_has_the_engines_own_count_where_it_counts_as_it_goes() -> None:
    bench = Bench(held(tells=True))
    task = await begun(bench)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.end().usage == Usage(words(bench), 2)
    assert bench.engine.counted == []


async def test_a_cancelled_answer_has_its_pieces_and_a_prompt_counted_afterwards_where_it_does_not() -> None:
    bench = Bench(held())
    task = await begun(bench)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.end().usage == Usage(words(bench), 2)
    assert bench.end().status is Status.CANCELLED
    assert bench.engine.counted == [bench.engine.asked[0].prompt]


async def test_an_answer_out_of_time_tells_its_tokens_in_the_log_and_in_its_error() -> None:
    bench = Bench(held(), deadline=0.05)
    with pytest.raises(DeadlineExceeded) as late:
        await bench.chat()
    assert late.value.ended == bench.end()
    assert bench.end().usage == Usage(words(bench), 2)
    assert bench.end().status is Status.DEADLINE


async def test_a_failed_answer_has_what_the_engine_told_before_it_failed() -> None:
    bench = Bench(FakeEngine(fail=EngineUnavailable("the engine is down"), hold_at=3, tells=True))
    with pytest.raises(EngineUnavailable) as failed:
        await bench.chat()
    assert failed.value.ended == bench.end()
    assert bench.end().usage == Usage(words(bench), 3)


async def test_an_engine_that_has_failed_is_not_asked_to_count() -> None:
    bench = Bench(FakeEngine(fail=EngineUnavailable("the engine is down"), hold_at=3))
    with pytest.raises(EngineUnavailable):
        await bench.chat()
    assert bench.end().usage == Usage(0, 3)
    assert bench.engine.counted == []


async def test_a_prompt_that_was_never_read_is_not_counted() -> None:
    bench = Bench(FakeEngine(hold=asyncio.Event(), hold_at=0))
    task = await begun(bench)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.end().usage == Usage(0, 0)
    assert bench.engine.counted == []


async def test_a_count_that_takes_too_long_or_fails_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpc_server.inference.LATE_COUNT_SECONDS", 0.01)
    for down in (False, True):
        bench = Bench(held())
        task = await begun(bench)
        bench.engine.hold_count = asyncio.Event()
        bench.engine.down = down
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert bench.end().usage == Usage(0, 2)


async def test_at_a_shutdown_nothing_is_counted_any_more() -> None:
    bench = Bench(held())
    task = await begun(bench)
    drain = asyncio.create_task(bench.pipeline.drain(5))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, drain, return_exceptions=True)
    assert bench.engine.counted == []
    assert bench.end().status is Status.CANCELLED


@pytest.mark.parametrize("who", [CALLER, Caller("rotated", CALLER.name, frozenset({Scope.INFER})), ADMIN])
async def test_an_inference_is_cancelled_by_its_callers_name_and_by_administrators(who: Caller) -> None:
    bench = Bench(held())
    task = await begun(bench)
    await bench.pipeline.cancel(who, identity(bench))
    with pytest.raises(Cancelled) as cancelled:
        await task
    assert cancelled.value.ended == bench.end()
    assert (bench.end().status, bench.end().error) == (Status.CANCELLED, "")
    assert bench.end().usage == Usage(words(bench), 2)
    assert bench.engine.running == 0


async def test_nobody_can_tell_another_callers_inference_from_one_that_is_not_there() -> None:
    bench = Bench(held())
    task = await begun(bench)
    other = Caller("key", "travel-desk", frozenset({Scope.INFER}))
    texts = set()
    for wanted in (identity(bench), uuid4()):
        with pytest.raises(NotFound) as unknown:
            await bench.pipeline.cancel(other, wanted)
        texts.add(str(unknown.value).replace(str(wanted), "…"))
    assert len(texts) == 1
    assert bench.engine.hold is not None
    bench.engine.hold.set()
    await task
    assert bench.end().status is Status.OK


async def test_what_has_ended_cannot_be_cancelled_and_nothing_is_kept_of_it() -> None:
    bench = Bench()
    await bench.chat()
    with pytest.raises(NotFound):
        await bench.pipeline.cancel(CALLER, identity(bench))
    assert bench.pipeline._accepted == {}


async def test_cancelling_twice_is_cancelling_once() -> None:
    bench = Bench(held())
    task = await begun(bench)
    await bench.pipeline.cancel(CALLER, identity(bench))
    await bench.pipeline.cancel(CALLER, identity(bench))
    with pytest.raises(Cancelled):
        await task
    assert len(bench.spool.ends) == 1


async def test_cancelling_one_of_two_leaves_the_other_alone() -> None:
    bench = Bench(held())
    first = await begun(bench)
    second = asyncio.create_task(bench.chat(ask("another")))
    while len(bench.spool.starts) < 2:  # noqa: ASYNC110 (a fake tells nobody)
        await asyncio.sleep(0)
    await bench.pipeline.cancel(CALLER, bench.spool.starts[0].id)
    with pytest.raises(Cancelled):
        await first
    assert bench.engine.hold is not None
    bench.engine.hold.set()
    await second
    assert [end.status for end in bench.spool.ends] == [Status.CANCELLED, Status.OK]


class Others:
    """Servers that run `theirs`; keeps what they were asked for. `error` is what to ask them ends with."""

    def __init__(self, *theirs: UUID, error: Exception | None = None) -> None:
        self.theirs = set(theirs)
        self.asked: list[tuple[UUID, str | None]] = []
        self.error = error

    async def cancel(self, inference_id: UUID, caller: str | None) -> bool:
        self.asked.append((inference_id, caller))
        if self.error is not None:
            raise self.error
        return inference_id in self.theirs


async def test_what_does_not_run_here_is_asked_of_the_other_servers_in_the_callers_name() -> None:
    theirs, nobodys = uuid4(), uuid4()
    others = Others(theirs)
    bench = Bench()
    bench.pipeline._elsewhere = others
    await bench.pipeline.cancel(CALLER, theirs)
    await bench.pipeline.cancel(ADMIN, theirs)
    with pytest.raises(NotFound, match=str(nobodys)):
        await bench.pipeline.cancel(CALLER, nobodys)
    assert others.asked == [(theirs, CALLER.name), (theirs, None), (nobodys, CALLER.name)]


async def test_what_runs_here_is_cancelled_though_nobody_else_can_be_reached() -> None:
    bench = Bench(held())
    bench.pipeline._elsewhere = others = Others(error=StoreUnavailable("down"))
    task = await begun(bench)
    await bench.pipeline.cancel(CALLER, identity(bench))
    with pytest.raises(Cancelled):
        await task
    assert others.asked == []
    with pytest.raises(StoreUnavailable):
        await bench.pipeline.cancel(CALLER, uuid4())
