"""Who gets a place at the engine, and when.

As many run at once as the engine can; the others wait, in a queue that is bounded, fair between callers
(`domain.fair_queue`) and aware of deadlines: by what answers took lately (`domain.service_times`) a request
that could not be answered in time is refused at once, and again when its turn comes, so that at any overload
the places go to those who can still use them. Interactive requests go before batch ones, which get one place
in BATCH_EVERY all the same. Neither the engine's load nor the processor's decides: one busy stream already
shows 100 %.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from opentelemetry.trace import Tracer

from grpc_server.domain.errors import (
    CallerQueueFull,
    CannotFinish,
    DeadlineExceeded,
    Exhausted,
    MemoryLow,
    QueueFull,
    QueueTimeout,
)
from grpc_server.domain.fair_queue import FairQueue, NoRoomError
from grpc_server.domain.service_times import ServiceTimes
from grpc_server.domain.types import EmbedRequest, InferenceRequest, Priority
from grpc_server.tracing import silent, spanning

BATCH_EVERY = 8
"""Of so many places that become free while batch requests wait, one is for them: they never starve."""
LEAST_RETRY_SECONDS = 0.1
UNKNOWN_RETRY_SECONDS = 1.0
"""When to try again, before anything was measured."""
MEMORY_RETRY_SECONDS = 5.0
CLOCK_SECONDS = 0.01
"""What a timer may be early by."""
MARGIN = 1.1
"""Under load all who wait come close to their deadlines: estimates a little too low would waste places."""
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Ask:
    """What is known of a request before it is answered.

    `cost` in tokens, an estimate that the end corrects; `seconds` until its deadline, None without one.
    """

    caller: str = ""
    priority: Priority = Priority.INTERACTIVE
    cost: float = 1.0
    model_version: str = ""
    max_tokens: int = 1
    seconds: float | None = None


def cost_of(request: InferenceRequest | EmbedRequest, prompt_tokens: int) -> float:
    """About how many tokens `request` takes: those of its prompt, and all that it may write."""
    if isinstance(request, EmbedRequest):
        return prompt_tokens
    return prompt_tokens + request.sampling.max_tokens


@dataclass(slots=True, eq=False)
class Place:
    """A place that is held since `since` (monotonic seconds); its holder tells what it was used for."""

    since: float
    tokens: int = 0

    def used(self, tokens: int) -> None:
        """So many tokens were read and written."""
        self.tokens = tokens


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    ask: Ask
    until: float | None
    turn: asyncio.Future[Exhausted | None]
    """Set to None: the place is given; to an error: it will not be."""


class Admission:
    """`places` at once. Of each priority at most `queue_size` wait, `queue_per_caller` of one caller.

    Args:
        places: how many generations the engine runs at once.
        queue_size: how many may wait, of each priority.
        queue_per_caller: how many of one caller; by default half of the queue.
        queue_seconds: how long one may wait.
        memory_available: bytes that this machine has left for us; None where nobody looks.
        memory_floor: with fewer bytes than these, nothing new begins.
        monotonic: the clock, in seconds.
        tracer: has a span for each wait.
    """

    def __init__(
        self,
        places: int,
        *,
        queue_size: int = 64,
        queue_per_caller: int | None = None,
        queue_seconds: float = 30,
        memory_available: Callable[[], int] | None = None,
        memory_floor: int = 0,
        monotonic: Callable[[], float] = time.monotonic,
        tracer: Tracer | None = None,
    ) -> None:
        self.times = ServiceTimes(monotonic)
        self.on_wait: Callable[[Priority, float], None] = lambda *_: None
        """Told how long each request waited that got a place."""
        self._free = places
        self._places = places
        self._queue_seconds = queue_seconds
        self._memory_available = memory_available
        self._memory_floor = memory_floor
        self._monotonic = monotonic
        self._tracer = tracer or silent()
        per_caller = max(1, queue_size // 2) if queue_per_caller is None else queue_per_caller
        self._queues = {priority: FairQueue[_Waiter](queue_size, per_caller) for priority in Priority}
        self._in_a_row = 0  # interactive requests that went before waiting batch ones

    @property
    def places(self) -> int:
        """How many run at once."""
        return self._places

    @property
    def in_flight(self) -> int:
        """Places taken."""
        return self._places - self._free

    @property
    def queued(self) -> int:
        """Requests that wait for one."""
        return sum(len(queue) for queue in self._queues.values())

    def queued_of(self, priority: Priority) -> int:
        """Those of one priority."""
        return len(self._queues[priority])

    @asynccontextmanager
    async def place(self, ask: Ask | None = None, *, wait: bool = True) -> AsyncIterator[Place]:
        """Hold a place while the block runs.

        Raises:
            Exhausted: one of its kinds: the queue, or the caller's part of it, is full; the wait took longer
                than `queue_seconds`, or would take longer than the deadline allows; memory is low. Without
                `wait`, if no place is free.
            DeadlineExceeded: the deadline is too short even for an idle engine.
        """
        ask, arrived = ask or Ask(), self._monotonic()
        with spanning(self._tracer, "queue", attributes={"agentloop.priority": ask.priority.value}):
            await self._take(ask, wait)
        place = Place(self._monotonic())
        self.on_wait(ask.priority, place.since - arrived)
        try:
            yield place
        finally:
            self.times.held(self._monotonic() - place.since)
            self._queues[ask.priority].end(ask.caller, ask.cost, place.tokens)
            self._give_back()

    async def _take(self, ask: Ask, wait: bool) -> None:
        self._refuse_without_memory()
        self._refuse_short_deadline(ask)
        if self._free > 0:
            self._free -= 1
            self._queues[ask.priority].begin(ask.caller, ask.cost)
            return
        if not wait:
            raise Exhausted(
                f"all {self._places} places are taken; try again later",
                retry_after_seconds=self._retry_after(),
            )
        self._refuse_long_wait(ask)
        waiter = self._enqueue(ask)
        hopeful = math.inf if ask.seconds is None else ask.seconds - self._typical(ask)
        try:
            async with asyncio.timeout(min(self._queue_seconds, hopeful)):
                refusal = await waiter.turn
        except BaseException as error:
            if not self._queues[ask.priority].discard(ask.caller, waiter):
                self._return_unused(waiter)
            if isinstance(error, TimeoutError):
                raise self._waited_too_long(waiter) from None
            raise
        if refusal is not None:
            raise refusal

    def _enqueue(self, ask: Ask) -> _Waiter:
        until = None if ask.seconds is None else self._monotonic() + ask.seconds
        waiter = _Waiter(ask, until, asyncio.get_running_loop().create_future())
        queue = self._queues[ask.priority]
        try:
            lost = queue.push(ask.caller, waiter, ask.cost)
        except NoRoomError as error:
            raise self._full(own=ask.caller if error.own else "") from None
        if lost is not None and not lost.turn.done():
            lost.turn.set_result(self._full(own=lost.ask.caller))
        return waiter

    def _return_unused(self, waiter: _Waiter) -> None:
        """The wait ended in the moment in which its place was given."""
        turn = waiter.turn
        if turn.done() and not turn.cancelled() and turn.result() is None:
            self._queues[waiter.ask.priority].end(waiter.ask.caller, waiter.ask.cost, 0)
            self._give_back()

    def _give_back(self) -> None:
        """Hand the place to the next who can still use it, or free it."""
        now = self._monotonic()
        while (waiter := self._next()) is not None:
            refusal = self._too_late(waiter, now)
            if waiter.turn.done() or refusal is not None:
                self._queues[waiter.ask.priority].end(waiter.ask.caller, waiter.ask.cost, 0)
            if waiter.turn.done():
                continue
            waiter.turn.set_result(refusal)
            if refusal is None:
                interactive = waiter.ask.priority is Priority.INTERACTIVE
                self._in_a_row = self._in_a_row + 1 if interactive and self._queues[Priority.BATCH] else 0
                return
        self._free += 1
        if self._free == self._places:
            for queue in self._queues.values():
                queue.forget()

    def _next(self) -> _Waiter | None:
        interactive, batch = self._queues[Priority.INTERACTIVE], self._queues[Priority.BATCH]
        if batch and (not interactive or self._in_a_row >= BATCH_EVERY - 1):
            return batch.pop()
        return interactive.pop() if interactive else None

    def _refuse_without_memory(self) -> None:
        if self._memory_available is None or not self._memory_floor:
            return
        available = self._memory_available()
        if available < self._memory_floor:
            raise MemoryLow(
                f"{available // MIB} MiB of memory are free, and {self._memory_floor // MIB} MiB are kept so;"
                " try again later, or elsewhere",
                retry_after_seconds=MEMORY_RETRY_SECONDS,
            )

    def _refuse_short_deadline(self, ask: Ask) -> None:
        least = self.times.least(ask.model_version, ask.max_tokens)
        if ask.seconds is not None and least is not None and least > ask.seconds:
            raise DeadlineExceeded(
                f"the deadline is in {ask.seconds:.3g} s, and nine of ten answers take over {least:.3g} s"
                " even without a wait; set a later one"
            )

    def _refuse_long_wait(self, ask: Ask) -> None:
        expected = self._expected_wait(ask)
        if ask.seconds is None or expected is None:
            return
        if expected * MARGIN + self._typical(ask) > ask.seconds:
            raise CannotFinish(
                f"a place is expected in {expected:.3g} s, and with an answer of {self._typical(ask):.3g} s"
                f" that is too long for the {ask.seconds:.3g} s until the deadline; try again later",
                retry_after_seconds=max(LEAST_RETRY_SECONDS, expected),
            )

    def _waited_too_long(self, waiter: _Waiter) -> Exhausted:
        refusal = self._too_late(waiter, self._monotonic() + CLOCK_SECONDS)
        return refusal or QueueTimeout(
            f"no place became free in {self._queue_seconds:g} s; try again later",
            retry_after_seconds=self._retry_after(),
        )

    def _too_late(self, waiter: _Waiter, now: float) -> CannotFinish | None:
        typical = self._typical(waiter.ask)
        if waiter.until is None or now + typical <= waiter.until:
            return None
        return CannotFinish(
            f"{max(0.0, waiter.until - now):.3g} s are left until the deadline, and an answer takes"
            f" {typical:.3g} s; try again later",
            retry_after_seconds=self._retry_after(),
        )

    def _typical(self, ask: Ask) -> float:
        """Seconds that an answer takes, with a margin: a place is not for who will probably be too late."""
        return MARGIN * (self.times.typical(ask.model_version, ask.max_tokens) or 0.0)

    def _expected_wait(self, ask: Ask) -> float | None:
        """Seconds until a request that begins to wait now gets a place; None while nothing is measured."""
        if self.times.mean is None:
            return None
        ahead = self._queues[ask.priority].ahead_of(ask.caller)
        if ask.priority is Priority.BATCH:
            ahead += min(self.queued_of(Priority.INTERACTIVE), (BATCH_EVERY - 1) * (ahead + 1))
        else:
            ahead += min(self.queued_of(Priority.BATCH), ahead // (BATCH_EVERY - 1))
        return (ahead + 1) * self.times.mean / self._places

    def _retry_after(self) -> float:
        """Seconds until what waits now is served."""
        if self.times.mean is None:
            return UNKNOWN_RETRY_SECONDS
        return max(LEAST_RETRY_SECONDS, (self.queued + 1) * self.times.mean / self._places)

    def _full(self, *, own: str = "") -> Exhausted:
        """`own` is the caller, where only its part of the queue is full."""
        seconds = self._retry_after()
        if own:
            return CallerQueueFull(
                "as many of your requests wait as may, while others ask too; send fewer at once, and try"
                f" again in {seconds:.3g} s",
                retry_after_seconds=seconds,
                subject=f"caller:{own}",
            )
        return QueueFull(
            f"all {self._places} places are taken and {self.queued} requests wait; try again in"
            f" {seconds:.3g} s",
            retry_after_seconds=seconds,
        )
