"""A version that fails before its first token: another of the route answers, and each is counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping

import pytest

from grpc_server.domain import rules
from grpc_server.domain.errors import (
    AgentLoopError,
    DeadlineExceeded,
    EngineFailed,
    EngineUnavailable,
    Exhausted,
    InvalidArgument,
    NotFound,
    Precondition,
)
from grpc_server.domain.ports import Finished, Generation, Piece
from grpc_server.domain.types import (
    Attempt,
    InferenceEnded,
    Route,
    Started,
    Status,
    Target,
    TargetRole,
    TextDelta,
)
from grpc_server.metrics import Metrics
from tests import records as make
from tests.ansible_modules import metrics as figures_of
from tests.fakes import BASE, FakeEngine, FakeRoutes, FakeRouteStore
from tests.unit.test_inference import ADMIN, Bench, ask

NEW = "gemma-3-270m:new"
CANARY = Target(NEW, TargetRole.CANARY, 50)
STABLE = Target(BASE, TargetRole.STABLE, 50)
TO_CANARY, TO_STABLE = 0.1, 0.9  # what is drawn


class Failing(FakeEngine):
    """Each version raises its error instead of its piece number `at`."""

    def __init__(self, errors: Mapping[str, BaseException], at: int = 0) -> None:
        super().__init__(models=(BASE, NEW))
        self.errors, self.at = errors, at

    async def generate(self, generation: Generation) -> AsyncGenerator[Piece | Finished, None]:
        index = 0
        async for event in super().generate(generation):
            if index == self.at and (error := self.errors.get(generation.model_version)):
                raise error
            index += 1
            yield event


def bench(
    errors: Mapping[str, BaseException] | FakeEngine,
    *,
    at: int = 0,
    draw: float = TO_CANARY,
    targets: tuple[Target, ...] = (STABLE, CANARY),
) -> Bench:
    engine = errors if isinstance(errors, FakeEngine) else Failing(errors, at)
    return Bench(engine, routes=FakeRoutes(FakeRouteStore([Route("default", 1, targets)])), draw=draw)


def asked(made: Bench) -> list[str]:
    return [generation.model_version for generation in made.engine.asked]


@pytest.mark.parametrize(
    "error", [EngineUnavailable("it is down"), EngineFailed("nonsense"), NotFound("not installed")]
)
async def test_the_stable_version_answers_where_the_canary_fails(error: AgentLoopError) -> None:
    made = bench({NEW: error})
    await made.chat()
    started, *deltas, _ = made.seen.events
    assert isinstance(started, Started)
    assert started.model_version == BASE
    assert "".join(delta.text for delta in deltas if isinstance(delta, TextDelta)) == "Hello, world!"
    assert asked(made) == [NEW, BASE]
    assert made.engine.running == 0
    start, end = made.spool.starts[0], made.end()
    assert (start.model_version, start.target_role) == (NEW, TargetRole.CANARY)
    assert end.attempts == (
        Attempt(NEW, TargetRole.CANARY, type(error).__name__, str(error)),
        Attempt(BASE, TargetRole.STABLE),
    )
    assert (end.status, end.error, end.asked(start)) == (Status.OK, "", (BASE, TargetRole.STABLE))


async def test_the_canary_answers_where_the_stable_version_fails() -> None:
    made = bench({BASE: EngineUnavailable("it is down")}, draw=TO_STABLE)
    await made.chat()
    assert made.end().asked(made.spool.starts[0]) == (NEW, TargetRole.CANARY)


async def test_an_answer_at_first_try_has_no_attempts() -> None:
    made = bench({})
    await made.chat()
    assert made.end().attempts == ()
    assert made.end().asked(made.spool.starts[0]) == (NEW, TargetRole.CANARY)


async def test_where_all_fail_the_last_failure_is_told_and_all_are_in_the_row() -> None:
    made = bench({NEW: EngineFailed("nonsense"), BASE: EngineUnavailable("it is down")})
    with pytest.raises(EngineUnavailable):
        await made.chat()
    end = made.end()
    assert (end.status, end.error) == (Status.ERROR, "it is down")
    assert end.attempts == (
        Attempt(NEW, TargetRole.CANARY, "EngineFailed", "nonsense"),
        Attempt(BASE, TargetRole.STABLE),
    )
    assert made.pipeline.admission.in_flight == 0


async def test_after_the_first_token_no_other_version_is_asked() -> None:
    made = bench({NEW: EngineUnavailable("it broke off")}, at=1)
    with pytest.raises(EngineUnavailable):
        await made.chat()
    assert asked(made) == [NEW]
    assert (made.end().attempts, made.end().answer["content"]) == ((), "Hello")


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgument("the prompt is too long"),
        Precondition("no vectors"),
        Exhausted("no room"),
        RuntimeError("a bug"),
    ],
)
async def test_what_would_fail_everywhere_is_asked_once(error: Exception) -> None:
    made = bench({NEW: error})
    with pytest.raises(type(error)):
        await made.chat()
    assert asked(made) == [NEW]


async def test_whoever_names_a_version_gets_that_one_or_none() -> None:
    made = bench({NEW: EngineUnavailable("it is down")})
    with pytest.raises(EngineUnavailable):
        await made.chat(ask(model_version=NEW), caller=ADMIN)
    assert asked(made) == [NEW]


async def test_a_shadow_that_fails_asks_nobody_else() -> None:
    targets = (Target(BASE, TargetRole.STABLE, 100), Target(NEW, TargetRole.SHADOW, 100))
    made = bench({NEW: EngineUnavailable("it is down")}, targets=targets)
    await made.chat()
    await made.pipeline.drain(5)
    assert sorted(asked(made)) == sorted([NEW, BASE])
    assert [end.attempts for end in made.spool.ends] == [(), ()]


@pytest.mark.parametrize(
    ("other", "asked_too"),
    [
        (Target(NEW, TargetRole.CANARY, 0), False),  # it was taken out of service
        (Target(NEW, TargetRole.SHADOW, 100), False),
        (Target(NEW, TargetRole.CANARY, 1), True),
    ],
)
def test_only_what_serves_the_alias_is_asked_instead(other: Target, asked_too: bool) -> None:
    route = Route("default", 1, (STABLE, other))
    assert rules.fallbacks(route, STABLE) == ((other,) if asked_too else ())


async def test_started_comes_at_once_where_no_other_version_could_answer() -> None:
    hold = asyncio.Event()
    made = bench(FakeEngine(hold=hold), targets=(Target(BASE, TargetRole.STABLE, 100),))
    task = asyncio.create_task(made.chat())
    await asyncio.wait_for(made.engine.streaming.wait(), 5)
    async with asyncio.timeout(5):
        while not made.seen.events:  # noqa: ASYNC110 - only turns of the loop
            await asyncio.sleep(0)
    assert [type(event) for event in made.seen.events] == [Started]
    hold.set()
    await task


async def test_the_deadline_counts_for_all_attempts_together() -> None:
    class Slow(Failing):
        async def generate(self, generation: Generation) -> AsyncGenerator[Piece | Finished, None]:
            self.hold = asyncio.Event() if generation.model_version == BASE else None
            async for event in super().generate(generation):
                yield event

    made = bench(Slow({NEW: EngineUnavailable("it is down")}))
    with pytest.raises(DeadlineExceeded):
        await made.chat(seconds=0.1)
    end = made.end()
    assert end.status is Status.DEADLINE
    assert [attempt.model_version for attempt in end.attempts] == [NEW, BASE]
    assert made.engine.running == 0


async def test_a_caller_who_goes_away_during_the_second_attempt_is_logged_as_cancelled() -> None:
    made = bench({NEW: EngineUnavailable("it is down")})
    made.engine.hold, made.engine.hold_at = asyncio.Event(), 1
    task = asyncio.create_task(made.chat())
    async with asyncio.timeout(5):
        while len(made.seen.events) < 2:  # noqa: ASYNC110 - no sleep, only a turn of the loop
            await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert made.end().status is Status.CANCELLED
    assert made.end().attempts[-1] == Attempt(BASE, TargetRole.STABLE)


async def test_a_canary_that_fails_is_counted_as_failing_though_its_callers_were_answered() -> None:
    """What a rollout's analysis reads."""
    counted = Metrics()
    increase = figures_of.Increase()
    increase.add(figures_of.parse(counted.text().decode()))
    for draw in (TO_CANARY, TO_CANARY, TO_STABLE):
        made = bench({NEW: EngineUnavailable("it is down")}, draw=draw)
        made.pipeline._observer = counted
        await made.chat()
    increase.add(figures_of.parse(counted.text().decode()))
    canary = figures_of.figures(increase.total, "default", NEW)
    stable = figures_of.figures(increase.total, "default", BASE)
    assert (canary.requests, canary.failed, canary.answered) == (2, 2, 0)
    assert (stable.requests, stable.failed, stable.answered) == (3, 0, 3)
    assert stable.timed == 1, "the others lost their time with the canary"
    assert figures_of.ended(increase.total, "default") == 3, "requests are counted once"


def test_an_end_without_attempts_is_that_of_the_start() -> None:
    start = make.started()
    end: InferenceEnded = make.ended(start.id)
    assert end.asked(start) == (start.model_version, start.target_role)
