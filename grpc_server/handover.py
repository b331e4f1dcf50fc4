"""The GPU, lent to a training on the same machine, and always taken back.

    serving ─lease─▶ draining ─▶ leased ─released, expired or at its end─▶ restoring ─▶ serving

A lease ends by itself unless its holder renews it, and at its end however often that is done; from then on
the models are loaded, again and again until they are there. All of that goes by the monotonic clock: a clock
that is set makes no lease longer or shorter. The holder reckons from before it asks, so it lets go before we
take.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol
from uuid import UUID, uuid4

from grpc_server.audit import Audit
from grpc_server.domain.errors import AgentLoopError, GpuLent, HandedOver, NotFound, Precondition
from grpc_server.domain.ports import Engine, LeaseStore
from grpc_server.domain.types import Caller, HandoverMode, HandoverState, KeptLease

TICK_SECONDS = 0.2
"""How often the end of a lease is looked for."""
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
"""Seconds between two attempts to load what could not be loaded; twice as long after each."""

log = logging.getLogger(__name__)

THIS_SERVER = Caller("", "server", frozenset())
"""Who takes the GPU back, in the table of events."""


class Pipeline(Protocol):
    """What refuses requests, and takes them again: `Inference`."""

    async def pause(self, refusal: Callable[[], AgentLoopError], grace_seconds: float) -> None:
        """Refuse so; returns when nothing runs."""

    def resume(self) -> None:
        """Take requests again."""


class _Lease:
    """A lease that is in force; `until` and `last` are monotonic seconds."""

    def __init__(self, kept: KeptLease, now: float) -> None:
        self.id, self.holder = kept.id, kept.holder
        self.began = now
        self.until = now + kept.expires_in_seconds
        self.last = now + kept.remaining_seconds
        self.released = asyncio.Event()
        self.restored = asyncio.Event()

    def ends_in(self, now: float) -> float:
        """Seconds until it ends unless it is renewed."""
        return min(self.until, self.last) - now

    def told(self, now: float) -> KeptLease:
        """As others see it."""
        return KeptLease(self.id, self.holder, max(0.0, self.ends_in(now)), max(0.0, self.last - now))


class Handover:
    """Lends the engine's GPU.

    Args:
        engine: what is unloaded, or shrunk.
        pipeline: what refuses requests meanwhile.
        routed: the model versions that routes lead to, which are loaded when the GPU is back.
        audit: where each act is written down.
        store: where a lease outlives this process; None: it does not.
        mode: how to give way.
        lease_seconds: how long a lease lasts unless it is renewed.
        max_seconds: how long it lasts at most.
        drain_seconds: what requests get to end in.
        small_context_tokens: of the engine that goes on on the processor.
    """

    def __init__(
        self,
        engine: Engine,
        pipeline: Pipeline,
        routed: Callable[[], Iterable[str]],
        audit: Audit,
        store: LeaseStore | None = None,
        *,
        mode: HandoverMode = HandoverMode.OFF,
        lease_seconds: float = 30.0,
        max_seconds: float = 6 * 3600.0,
        drain_seconds: float = 30.0,
        small_context_tokens: int = 1024,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.mode = mode
        self.lease_seconds = lease_seconds
        self.max_seconds = max_seconds
        self.state = HandoverState.SERVING
        self.ended: Callable[[str], object] = lambda _why: None
        self._engine, self._pipeline, self._routed = engine, pipeline, routed
        self._audit, self._store = audit, store
        self._drain_seconds = drain_seconds
        self._small = small_context_tokens
        self._monotonic = monotonic
        self._lease: _Lease | None = None
        self._refusing = False
        self._task: asyncio.Task[None] | None = None

    @property
    def lease(self) -> KeptLease | None:
        """The lease in force, if there is one."""
        return None if self._lease is None else self._lease.told(self._monotonic())

    @property
    def held_seconds(self) -> float:
        """How long the GPU has been away from serving; 0 while it is not."""
        return 0.0 if self._lease is None else self._monotonic() - self._lease.began

    def away(self) -> str:
        """Why requests are refused now; empty while they are not."""
        return self._told() if self._refusing else ""

    def refuse_loading(self) -> None:
        """Raises HandedOver while models must stay out of the GPU: they would be loaded into it."""
        if self._refusing:
            raise self._refusal()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Take up a lease that outlived the former process; at the end leave one to the next."""
        await self._take_up()
        try:
            yield
        finally:
            if self._task is not None:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)

    async def give(self, caller: Caller, holder: str) -> KeptLease:
        """Lend the GPU; returns when nothing of ours is in it.

        Raises:
            Precondition: this server lends nothing.
            GpuLent: somebody has it, or it is on its way.
            StoreUnavailable: that it is lent could not be written down.
        """
        if self.mode is HandoverMode.OFF:
            raise Precondition(
                "this server keeps its GPU: AGENTLOOP_GPU_HANDOVER is off; set it to drain or shrink there"
            )
        if self._lease is not None:
            wait = max(1.0, self._lease.ends_in(self._monotonic()))
            raise GpuLent(self._told(), retry_after_seconds=wait)
        kept = KeptLease(uuid4(), holder, self.lease_seconds, self.max_seconds)
        lease = self._lease = _Lease(kept, self._monotonic())
        self.state = HandoverState.DRAINING
        try:
            detail = {"lease_id": str(lease.id), "mode": self.mode.value}
            async with self._audit.act("gpu_lease", caller, holder, detail):
                await self._keep(lease)
                await self._give_way()
                lease.until = self._monotonic() + self.lease_seconds
                self.state = HandoverState.LEASED
        except BaseException:
            self._go_on(self._restore(lease, "failed"))
            raise
        self._go_on(self._until_over(lease))
        return lease.told(self._monotonic())

    async def renew(self, lease_id: UUID) -> KeptLease:
        """Put the end of a lease off. Raises NotFound if it is over."""
        lease = self._in_force(lease_id)
        lease.until = self._monotonic() + self.lease_seconds
        try:
            await self._keep(lease)
        except AgentLoopError as error:  # it is for the next process only
            log.warning("a renewed lease of the GPU was not written down: %s", error)
        return lease.told(self._monotonic())

    async def release(self, caller: Caller, lease_id: UUID) -> bool:
        """End a lease, and wait until the models are back; False if it is over already."""
        lease = self._lease
        if lease is None or lease.id != lease_id:
            return False
        if self.state is HandoverState.DRAINING:
            raise HandedOver(f"{self._told()}; release it when it has the GPU", retry_after_seconds=1.0)
        if self.state is HandoverState.LEASED:
            detail = {"lease_id": str(lease.id), "held_seconds": round(self.held_seconds, 1)}
            async with self._audit.act("gpu_release", caller, lease.holder, detail):
                lease.released.set()
        await lease.restored.wait()
        return True

    def _in_force(self, lease_id: UUID) -> _Lease:
        lease = self._lease
        over = lease is None or lease.id != lease_id or self.state is not HandoverState.LEASED
        if lease is None or over or lease.ends_in(self._monotonic()) <= 0 or lease.released.is_set():
            raise NotFound(f"lease {lease_id} of the GPU is over; let go of the GPU at once")
        return lease

    def _refusal(self) -> AgentLoopError:
        lease = self._lease
        soon = 1.0 if lease is None else lease.ends_in(self._monotonic())
        return HandedOver(f"{self._told()}; ask again", retry_after_seconds=min(max(1.0, soon), 30.0))

    def _told(self) -> str:
        lease, now = self._lease, self._monotonic()
        if lease is None:
            return "the GPU is on its way back to serving"
        if self.state is HandoverState.RESTORING:
            return f"the GPU is on its way back from {lease.holder}, and models are being loaded"
        left = max(0.0, lease.last - now)
        at = datetime.now(UTC) + timedelta(seconds=left)
        return (
            f"the GPU is lent to {lease.holder}, for {left:.0f} s more at most (until"
            f" {at:%Y-%m-%d %H:%M:%S} UTC)"
        )

    async def _keep(self, lease: _Lease) -> None:
        if self._store is not None:
            await self._store.keep(lease.told(self._monotonic()))

    async def _give_way(self) -> None:
        await self._pause(self._drain_seconds)
        if self.mode is HandoverMode.SHRINK:
            await self._engine.shrink(self._small)
            await self._load(set(self._routed()))  # what cannot be, its first request will try
            self._resume()
            return
        for model in await self._engine.list_models():  # one that only makes vectors is not told as loaded
            await self._engine.unload(model.name)

    async def _pause(self, seconds: float) -> None:
        self._refusing = True
        await self._pipeline.pause(self._refusal, seconds)

    def _resume(self) -> None:
        self._refusing = False
        self._pipeline.resume()

    async def _take_up(self) -> None:
        """A lease of this server that a former process gave, as long as it may still last.

        Where the database cannot tell, there is none: serving comes first, and the next renewal says so.
        """
        if self._store is None:
            return
        try:
            found = await self._store.find()
        except AgentLoopError as error:
            log.warning("whether the GPU is lent could not be read: %s", error)
            return
        if found is None:
            return
        expires = min(found.expires_in_seconds, self.lease_seconds)
        remaining = min(found.remaining_seconds, self.max_seconds)
        if self.mode is HandoverMode.OFF or min(expires, remaining) <= 0:
            await self._forget(found.id)
            return
        lease = self._lease = _Lease(KeptLease(found.id, found.holder, expires, remaining), self._monotonic())
        self.state = HandoverState.DRAINING
        log.warning("the GPU is lent since before this start", extra={"holder": lease.holder})
        try:
            await self._give_way()
            self.state = HandoverState.LEASED
            self._go_on(self._until_over(lease))
        except AgentLoopError as error:
            log.warning("a lease of the GPU was not taken up: %s", error)
            self._go_on(self._restore(lease, "failed"))

    def _go_on(self, work: Coroutine[Any, Any, None]) -> None:
        self._task = asyncio.create_task(work, name="gpu handover")

    async def _until_over(self, lease: _Lease) -> None:
        """Wait for the end of a lease, and take the GPU back."""
        while not lease.released.is_set() and lease.ends_in(self._monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(lease.released.wait(), TICK_SECONDS)
        why = "released" if lease.released.is_set() else "expired"
        if why == "expired" and lease.last <= self._monotonic():
            why = "overdue"
        await self._restore(lease, why)

    async def _restore(self, lease: _Lease, why: str) -> None:
        """Load what routes lead to until it is there. Requests are taken from the first attempt on."""
        self.state = HandoverState.RESTORING
        if why != "released":
            log.warning("the GPU is taken back", extra={"holder": lease.holder, "why": why})
        self.ended(why)
        detail = {"lease_id": str(lease.id), "why": why, "held_seconds": round(self.held_seconds, 1)}
        await self._tried(self._audit.done("gpu_restore", THIS_SERVER, lease.holder, detail))
        if self.mode is HandoverMode.SHRINK:
            await self._tried(self._regrown())
        pause, missing = FIRST_PAUSE, await self._load(set(self._routed()))
        self._resume()
        while missing:
            await asyncio.sleep(pause)
            pause = min(LONGEST_PAUSE, 2 * pause)
            missing = await self._load(missing & set(self._routed()))  # routes may have moved on
        await self._forget(lease.id)
        self.state, self._lease = HandoverState.SERVING, None
        lease.restored.set()

    async def _regrown(self) -> None:
        await self._pause(self._drain_seconds)
        await self._engine.grow()

    async def _load(self, names: set[str]) -> set[str]:
        """Those of `names` that could not be loaded, and may be later."""
        missing = set()
        for name in sorted(names):
            try:
                await self._engine.load(name)
            except NotFound as error:
                log.warning("a model version is not loaded again: %s", error)
            except Exception:  # whatever it is, serving wants it back
                log.warning("a model version was not loaded", extra={"model_version": name}, exc_info=True)
                missing.add(name)
        return missing

    async def _forget(self, lease_id: UUID) -> None:
        if self._store is not None:
            await self._tried(self._store.forget(lease_id))

    async def _tried(self, work: Awaitable[None]) -> None:
        """Do what must not keep the GPU from serving if it fails."""
        try:
            await work
        except Exception:
            log.warning("the GPU is taken back all the same", exc_info=True)
