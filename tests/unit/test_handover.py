"""The GPU is lent to one at a time, and comes back to serving whatever its holder does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest

from grpc_server import handover
from grpc_server.audit import Audit
from grpc_server.domain.errors import (
    AgentLoopError,
    EngineUnavailable,
    GpuLent,
    HandedOver,
    NotFound,
    Precondition,
    StoreUnavailable,
)
from grpc_server.domain.types import Caller, HandoverMode, HandoverState, KeptLease, Scope
from grpc_server.handover import Handover
from tests.fakes import BASE, FakeClock, FakeEngine, FakeLeaseStore, FakeLogStore

TRAINER = Caller("k-write", "night", frozenset({Scope.MODELS_WRITE}))
NEW = "gemma-3-270m:20260102T030000Z"


class FakePipeline:
    """Keeps what it was told; `refusal` is None while it takes requests."""

    def __init__(self) -> None:
        self.refusal: Callable[[], AgentLoopError] | None = None
        self.graces: list[float] = []
        self.hold: asyncio.Event | None = None

    async def pause(self, refusal: Callable[[], AgentLoopError], grace_seconds: float) -> None:
        self.refusal = refusal
        self.graces.append(grace_seconds)
        if self.hold is not None:
            await self.hold.wait()

    def resume(self) -> None:
        self.refusal = None

    @property
    def takes(self) -> bool:
        return self.refusal is None


class Desk:
    """A handover on fakes, whose clock moves when told to."""

    def __init__(self, mode: HandoverMode = HandoverMode.DRAIN, **more: Any) -> None:
        self.engine = FakeEngine(models=(BASE, NEW))
        self.pipeline = FakePipeline()
        self.log = FakeLogStore()
        self.leases = more.pop("store", FakeLeaseStore())
        self.clock = FakeClock()
        self.routed = {BASE}
        self.ends: list[str] = []
        self.handover = Handover(
            self.engine,
            self.pipeline,
            lambda: self.routed,
            Audit(self.log, "gpu-1"),
            self.leases,
            mode=mode,
            lease_seconds=30,
            max_seconds=100,
            drain_seconds=5,
            small_context_tokens=512,
            monotonic=self.clock.monotonic,
            **more,
        )
        self.handover.ended = self.ends.append

    async def give(self, holder: str = "finetune") -> KeptLease:
        return await self.handover.give(TRAINER, holder)

    async def until(self, state: HandoverState) -> None:
        async with asyncio.timeout(10):
            while self.handover.state is not state:  # noqa: ASYNC110 - a fake clock has no events
                await asyncio.sleep(0.001)

    def loaded(self) -> list[str]:
        return [name for name, model in self.engine.models.items() if model.loaded]

    def acts(self) -> list[tuple[str, str, str]]:
        return [(kind, actor, detail["outcome"]) for kind, actor, _, detail in self.log.events]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "TICK_SECONDS", 0.001)
    monkeypatch.setattr(handover, "FIRST_PAUSE", 0.001)


async def test_a_drained_server_holds_no_model_refuses_with_a_time_and_loads_again_when_released() -> None:
    desk = Desk()
    async with desk.handover.running():
        lease = await desk.give()
        assert (desk.handover.state, desk.loaded()) == (HandoverState.LEASED, [])
        assert (lease.expires_in_seconds, lease.remaining_seconds) == (30, 100)
        assert desk.pipeline.refusal is not None
        refusal = desk.pipeline.refusal()
        assert isinstance(refusal, HandedOver)
        assert refusal.retry_after_seconds == 30
        assert str(refusal).startswith("the GPU is lent to finetune, for 100 s more at most (until 20")
        assert desk.handover.away() in str(refusal)
        with pytest.raises(HandedOver):
            desk.handover.refuse_loading()
        assert await desk.handover.release(TRAINER, lease.id)
        assert (desk.handover.state, desk.loaded()) == (HandoverState.SERVING, [BASE])
        assert desk.pipeline.takes
        assert (desk.handover.away(), desk.handover.lease) == ("", None)
        desk.handover.refuse_loading()
    assert desk.ends == ["released"]
    assert desk.leases.kept is None
    assert sorted(desk.acts()) == [
        ("gpu_lease", "night", "asked"),
        ("gpu_lease", "night", "done"),
        ("gpu_release", "night", "asked"),
        ("gpu_release", "night", "done"),
        ("gpu_restore", "server", "done"),
    ]


async def test_a_shrunk_server_answers_on_the_processor_and_grows_again() -> None:
    desk = Desk(HandoverMode.SHRINK)
    async with desk.handover.running():
        lease = await desk.give()
        assert (desk.engine.small, desk.loaded()) == (512, [BASE])
        assert (desk.pipeline.takes, desk.handover.away()) == (True, "")
        desk.handover.refuse_loading()
        await desk.handover.release(TRAINER, lease.id)
        assert (desk.engine.small, desk.loaded(), desk.pipeline.graces) == (None, [BASE], [5, 5])


async def test_a_holder_that_is_silent_loses_the_gpu_and_is_told_so_at_its_next_word() -> None:
    desk = Desk()
    async with desk.handover.running():
        lease = await desk.give()
        desk.clock.advance(29)
        assert (await desk.handover.renew(lease.id)).expires_in_seconds == 30
        desk.clock.advance(31)
        await desk.until(HandoverState.SERVING)
        assert (desk.loaded(), desk.ends) == ([BASE], ["expired"])
        with pytest.raises(NotFound, match="is over; let go of the GPU at once"):
            await desk.handover.renew(lease.id)
        assert not await desk.handover.release(TRAINER, lease.id)
    assert desk.log.events[-1][3]["why"] == "expired"
    assert desk.log.events[-1][3]["held_seconds"] >= 60


async def test_no_renewal_puts_the_last_end_off() -> None:
    desk = Desk()
    async with desk.handover.running():
        lease = await desk.give()
        for _ in range(4):
            desk.clock.advance(24)
            lease = await desk.handover.renew(lease.id)
        assert (lease.expires_in_seconds, lease.remaining_seconds) == (4, 4)
        desk.clock.advance(5)
        with pytest.raises(NotFound):
            await desk.handover.renew(lease.id)
        await desk.until(HandoverState.SERVING)
        assert desk.ends == ["overdue"]


async def test_a_second_holder_is_refused_with_who_has_the_gpu_and_until_when() -> None:
    desk = Desk()
    async with desk.handover.running():
        await desk.give("the first")
        desk.clock.advance(10)
        with pytest.raises(GpuLent, match=r"lent to the first, for 90 s more at most \(until ") as refused:
            await desk.give("the second")
        assert refused.value.retry_after_seconds == 20


async def test_of_two_that_ask_at_once_one_gets_it() -> None:
    desk = Desk()
    async with desk.handover.running():
        found = await asyncio.gather(desk.give("a"), desk.give("b"), return_exceptions=True)
        assert sorted(type(each).__name__ for each in found) == ["GpuLent", "KeptLease"]


async def test_a_server_that_is_off_lends_nothing() -> None:
    with pytest.raises(Precondition, match="AGENTLOOP_GPU_HANDOVER is off"):
        await Desk(HandoverMode.OFF).give()


async def test_a_clock_that_is_set_changes_no_lease() -> None:
    desk = Desk()
    async with desk.handover.running():
        lease = await desk.give()
        desk.clock.time = desk.clock.time.replace(year=2001)
        assert desk.handover.lease == lease
        await asyncio.sleep(0.01)
        assert desk.handover.state is HandoverState.LEASED


async def test_a_caller_that_goes_away_while_requests_end_gets_nothing_and_keeps_nothing() -> None:
    desk = Desk()
    desk.pipeline.hold = asyncio.Event()
    async with desk.handover.running():
        asking = asyncio.create_task(desk.give())
        await desk.until(HandoverState.DRAINING)
        lease = desk.handover.lease
        assert lease is not None
        with pytest.raises(HandedOver, match="release it when it has the GPU"):
            await desk.handover.release(TRAINER, lease.id)
        asking.cancel()
        await desk.until(HandoverState.SERVING)
        assert (desk.loaded(), desk.ends, desk.pipeline.takes) == ([BASE, NEW], ["failed"], True)


async def test_without_an_audit_row_nothing_is_lent_and_a_dead_database_does_not_keep_the_gpu() -> None:
    desk = Desk()
    async with desk.handover.running():
        desk.log.down = True
        with pytest.raises(StoreUnavailable):
            await desk.give()
        await desk.until(HandoverState.SERVING)
        desk.log.down = False
        lease = await desk.give()
        desk.log.down = desk.leases.down = True
        assert (await desk.handover.renew(lease.id)).expires_in_seconds == 30
        desk.clock.advance(31)
        await desk.until(HandoverState.SERVING)
        assert desk.loaded() == [BASE]


async def test_what_cannot_be_loaded_is_tried_again_while_requests_are_taken() -> None:
    desk = Desk()
    desk.routed = {BASE, NEW, "m:gone"}
    async with desk.handover.running():
        lease = await desk.give()
        loads: list[str] = []
        load = desk.engine.load

        async def full(model_version: str) -> None:
            loads.append(model_version)
            if model_version == NEW and loads.count(NEW) < 3:
                raise EngineUnavailable("a process that was stopped still holds the memory")
            await load(model_version)

        desk.engine.load = full  # type: ignore[method-assign]
        releasing = asyncio.create_task(desk.handover.release(TRAINER, lease.id))
        await desk.until(HandoverState.RESTORING)
        with pytest.raises(GpuLent, match="on its way back from finetune"):
            await desk.give()
        assert await releasing
        assert (loads.count(BASE), loads.count(NEW), desk.loaded()) == (1, 3, [BASE, NEW])


async def test_a_route_that_has_moved_on_is_followed() -> None:
    desk = Desk()
    async with desk.handover.running():
        lease = await desk.give()
        desk.routed = {NEW}
        await desk.handover.release(TRAINER, lease.id)
        assert desk.loaded() == [NEW]


async def test_a_server_that_starts_anew_leaves_the_gpu_to_its_holder_and_takes_it_in_time() -> None:
    kept = KeptLease(uuid4(), "finetune", 20.0, 5000.0)
    desk = Desk(store=FakeLeaseStore(kept))
    async with desk.handover.running():
        assert (desk.handover.state, desk.loaded()) == (HandoverState.LEASED, [])
        assert desk.handover.lease is not None
        # A database whose clock was set cannot make it longer than this server lends.
        assert desk.handover.lease.remaining_seconds == 100
        assert (await desk.handover.renew(kept.id)).expires_in_seconds == 30
        desk.clock.advance(31)
        await desk.until(HandoverState.SERVING)
    assert (desk.loaded(), desk.leases.kept) == ([BASE], None)


@pytest.mark.parametrize(
    ("mode", "seconds", "down"),
    [(HandoverMode.DRAIN, -1.0, False), (HandoverMode.OFF, 20.0, False), (HandoverMode.DRAIN, 20.0, True)],
)
async def test_a_server_that_starts_anew_serves_where_no_lease_is_in_force_or_known(
    mode: HandoverMode, seconds: float, down: bool
) -> None:
    store = FakeLeaseStore(KeptLease(uuid4(), "finetune", seconds, 50.0), down=down)
    desk = Desk(mode, store=store)
    async with desk.handover.running():
        assert (desk.handover.state, desk.handover.lease) == (HandoverState.SERVING, None)
    assert (store.kept is None) is not down


async def test_a_lease_that_cannot_be_taken_up_is_over() -> None:
    desk = Desk(store=FakeLeaseStore(KeptLease(uuid4(), "finetune", 20.0, 50.0)))
    desk.engine.down = True
    async with desk.handover.running():
        await desk.until(HandoverState.RESTORING)
        desk.engine.down = False
        await desk.until(HandoverState.SERVING)
    assert desk.ends == ["failed"]


async def test_without_a_database_a_lease_lives_as_long_as_the_server() -> None:
    desk = Desk(store=None)
    async with desk.handover.running():
        lease = await desk.give()
        assert await desk.handover.release(TRAINER, lease.id)
        assert not await desk.handover.release(TRAINER, lease.id)
