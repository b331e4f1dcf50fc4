"""What every part of a turn uses, and how it waits: for work, while traffic and programs are watched."""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from demo.failure import LinkError, tail
from demo.memory import MemoryMeter
from demo.plan import HOME, Plan
from demo.processes import Program, Programs
from demo.questions import Questions
from demo.screen import Screen
from demo.serving import Serving
from demo.tally import Tally
from demo.traffic import Player

T = TypeVar("T")

LINE_CHARACTERS = 60  # of another program's output
# A few failures are life; more than this share, and the service does not serve.
TOLERATED_FAILURES = 0.02


@dataclass(frozen=True, slots=True)
class Stage:
    """What all steps of one demo use."""

    plan: Plan
    programs: Programs
    serving: Serving
    screen: Screen
    player: Player

    @property
    def tally(self) -> Tally:
        """How the traffic went so far."""
        return self.player.tally


@dataclass(frozen=True, slots=True)
class Running:
    """What was started on this machine, and what it takes."""

    programs: Programs
    meter: MemoryMeter


@asynccontextmanager
async def running(plan: Plan, screen: Screen) -> AsyncIterator[Running]:
    """Alone on the state folder; whatever was started, by an earlier demo too, ends at the end.

    Raises:
        LinkError: if another demo uses the folder.
    """
    programs = Programs(plan.log_dir, plan.state_dir, HOME)
    with _alone(plan.private_dir):
        if left := await programs.sweep():
            screen.note(f"ended {left} processes that an earlier demo had left behind")
        meter = MemoryMeter(programs, plan.postmaster_pid)
        metering = asyncio.create_task(meter.run())
        try:
            yield Running(programs, meter)
        finally:
            metering.cancel()
            await programs.stop()


@contextmanager
def _alone(private_dir: Path) -> Iterator[None]:
    """Hold the lock of the state folder: two demos would end each other's programs."""
    private_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (private_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LinkError(
                "start",
                f"another demo uses {private_dir.parent}",
                "wait for it, end it, or set AGENTLOOP_STATE_DIR to another folder",
            ) from error
        yield


async def while_trickling(
    stage: Stage, chosen: Questions, work: Coroutine[Any, Any, T], pace: Callable[[], float]
) -> T:
    """Do the work while slow traffic goes on; every answer that was begun is waited for."""
    stop = asyncio.Event()
    trickle = asyncio.create_task(stage.player.trickle(chosen.slowly or chosen.items, pace, stop))
    try:
        done = await guarded(stage.serving, work)
        stop.set()
        await guarded(stage.serving, _joined(trickle))
    finally:
        trickle.cancel()
        await asyncio.gather(trickle, return_exceptions=True)
    return done


async def _joined(task: asyncio.Task[None]) -> None:
    await task


async def guarded(serving: Serving, work: Coroutine[Any, Any, T], *guards: Coroutine[Any, Any, None]) -> T:
    """Do the work, unless a guard, or one of those that watch Postgres and the server, raises before."""
    task = asyncio.create_task(work)
    watching = {
        asyncio.create_task(guard)
        for guard in (*guards, _must_run(serving.keeper), _must_run(serving.server))
    }
    try:
        while not task.done():
            pending = {task, *(guard for guard in watching if not guard.done())}
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for guard in watching:
                if guard.done():
                    guard.result()
        return task.result()
    finally:
        for each in (task, *watching):
            each.cancel()
        await asyncio.gather(task, *watching, return_exceptions=True)


async def _must_run(program: Program) -> None:
    code = await program.exited()
    raise LinkError(program.name, f"it ended, with exit code {code}", "see the log", program.log)


def tolerate(stage: Stage) -> None:
    """Raise LinkError if more failed than may."""
    tally = stage.tally
    if len(tally.failures) > TOLERATED_FAILURES * len(tally.outcomes):
        first = tally.failures[0]
        raise LinkError(
            "traffic",
            f"{len(tally.failures)} of {len(tally.outcomes)} requests failed;"
            f" the first: {first.kind} of {first.service}: {first.status} {first.detail}",
            "see the server's log",
            stage.serving.server.log,
        )


def traffic_so_far(stage: Stage) -> str:
    """How the traffic goes, for the one who watches."""
    tally = stage.tally
    median = tally.ttft_ms(50)
    speed = "" if median is None else f", first token after {median:.0f} ms (median)"
    failed = len(tally.failures)
    return f"{tally.requests} requests, {stage.player.in_flight} in flight, {failed} failed{speed}"


def last_line(program: Program) -> str:
    """The last line that a program printed, for the one who watches."""
    lines = tail(program.log, 1)
    return lines[-1][:LINE_CHARACTERS] if lines else "starting"
