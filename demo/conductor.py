"""The order of things: serve, play, learn, show."""

from __future__ import annotations

import asyncio
import fcntl
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.markup import escape

from agentloop import AgentLoopError
from agentloop.cli_session import printable
from agentloop.types import ChatEvent, Route, Started, TextDelta, ToolCall
from demo import figures, log_check, night, questions
from demo.failure import LinkError, tail
from demo.memory import MemoryMeter
from demo.night import Night
from demo.plan import HOME, Plan
from demo.processes import Program, Programs
from demo.questions import Questions
from demo.screen import Screen
from demo.serving import Serving, bring_up
from demo.table import table
from demo.tally import Tally
from demo.traffic import SERVICES, Player, connected

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


async def conduct(plan: Plan, screen: Screen) -> Path:
    """Run one demo; the path of its demo.json.

    Raises:
        LinkError: if any link of the loop failed.
    """
    started = time.monotonic()
    programs = Programs(plan.log_dir, plan.state_dir, HOME)
    with _alone(plan.private_dir):
        if left := await programs.sweep():
            screen.note(f"ended {left} processes that an earlier demo had left behind")
        meter = MemoryMeter(programs, plan.postmaster_pid)
        metering = asyncio.create_task(meter.run())
        try:
            screen.step("1 of 4: the service")
            serving = await bring_up(plan, programs, screen)
            chosen = questions.choose(plan.private_dir, plan.requests)
            async with connected(serving.grpc_address, serving.tokens) as services:
                player = Player(services, Tally(), f"{serving.started_at:%Y%m%dT%H%M%SZ}")
                stage = Stage(plan, programs, serving, screen, player)
                before = await _route(serving)
                await _first_answer(stage, chosen)
                waited = await _play(stage, chosen)
                cycle_dir = await _night(stage, chosen)
                logged = await _guarded(serving, log_check.check_log(serving, stage.tally.inference_ids))
            observed = figures.Observed(
                tally=stage.tally,
                rows_accepted=logged.accepted,
                rows_logged=logged.logged,
                peak_memory_bytes=meter.peak_bytes,
                route_before=before,
                route_after=await _route(serving),
                seconds=time.monotonic() - started - waited,
            )
            return await _show(stage, observed, cycle_dir)
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


async def _first_answer(stage: Stage, chosen: Questions) -> None:
    """One question, whose answer is shown as it streams."""
    screen = stage.screen
    item = chosen.items[0]
    screen.note(f"{SERVICES[0]} asks: {item.messages[-1].content}")

    def show(event: ChatEvent) -> None:
        match event:
            case Started():
                screen.console.print(f"      {escape(event.model_version)}: ", end="", style="dim")
            case TextDelta():
                screen.console.out(printable(event.text, True), end="", highlight=False)
            case ToolCall():
                screen.console.out(printable(f"{event.name}{dict(event.arguments)}", True), highlight=False)

    outcome = await _guarded(stage.serving, stage.player.ask(item, on_event=show))
    screen.console.print()
    if not outcome.expected:
        raise LinkError("first answer", outcome.detail, "see the server's log", stage.serving.server.log)
    screen.note(f"the first answer streamed {screen.seconds:.0f} s after the command")


async def _play(stage: Stage, chosen: Questions) -> float:
    """The day: all questions, and the rest of the installation; seconds only waited for the latter."""
    plan, screen, tally = stage.plan, stage.screen, stage.tally
    total = len(chosen.items)
    minutes = plan.traffic_seconds / 60
    screen.step(f"2 of 4: {', '.join(SERVICES)} ask {total} questions in about {minutes:.0f} minutes")
    installing: Program | None = None
    guards = []
    if plan.install:
        installing = await stage.programs.start("install", plan.install, low_priority=True)
        guards.append(_installed(plan, installing))

    def describe() -> str:
        rest = f"; installing: {_last_line(installing)}" if installing and installing.running else ""
        return f"{_traffic_so_far(stage)} of {total}{rest}"

    async with screen.watching(describe):
        asked = stage.player.play(chosen.items[1:], seconds=plan.traffic_seconds, in_flight=plan.in_flight)
        await _guarded(stage.serving, asked, *guards)
    questions.remember(plan.private_dir, chosen.items)
    screen.note(f"{_traffic_so_far(stage)}; {tally.feedbacks} right answers shown")
    _tolerate(stage)
    waiting = time.monotonic()
    if installing is not None:
        async with screen.watching(describe):
            installed = _installed(plan, installing)
            await _while_trickling(stage, chosen, installed, lambda: plan.night_pace)
        screen.note("installed what the night needs")
    return time.monotonic() - waiting


async def _night(stage: Stage, chosen: Questions) -> Path:
    """The DAG's run, while slower traffic goes on; its cycle directory."""
    plan, screen = stage.plan, stage.screen
    screen.step("3 of 4: the night: the DAG nightly_loop, while traffic goes on")
    running = await night.begin(plan, stage.programs, stage.serving)
    shown: set[str] = set()

    def describe() -> str:
        step = running.step
        if step not in shown:
            shown.add(step)
            screen.note(f"night: {step}")
        return f"night: {step}: {_last_line(running.program)}; {_traffic_so_far(stage)}"

    async with screen.watching(describe):
        ended = running.ended(new_questions=chosen.new)
        cycle_dir = await _while_trickling(stage, chosen, ended, lambda: _pace(plan, running))
    _tolerate(stage)
    return cycle_dir


async def _show(stage: Stage, observed: figures.Observed, cycle_dir: Path) -> Path:
    stage.screen.step("4 of 4: what came of it")
    shown = figures.figures(observed, cycle_dir)
    path = figures.write(shown, cycle_dir)
    await _write_report(stage, cycle_dir)
    stage.screen.console.print(table(shown, stage.tally))
    if skipped := night.skipped(cycle_dir):
        stage.screen.note(f"skipped at {skipped.name}: {skipped.reason}; the champion serves on")
    for name in ("gate", "rollout"):
        if reason := figures.read(cycle_dir / f"{name}.json").get("reason"):
            stage.screen.note(f"{name}: {reason}")
    for failure in stage.tally.failures[:5]:
        stage.screen.note(f"failed: {failure.kind} of {failure.service}: {failure.status} {failure.detail}")
    stage.screen.note(f"figures: {path}")
    stage.screen.note(f"report:  {cycle_dir / 'report.html'}")
    return path


async def _write_report(stage: Stage, cycle_dir: Path) -> None:
    """The night's page again, now with the demo's figures on it."""
    name = "report"
    command = [stage.plan.night[0], "-m", "training", "report", "--cycle", str(cycle_dir)]
    code, _ = await stage.programs.run(name, command, stage.plan.environment)
    if code != 0:
        log = stage.plan.log_dir / f"{name}.log"
        raise LinkError(name, f"it ended with exit code {code}", "see the log", log)


def _pace(plan: Plan, running: Night) -> float:
    """Seconds between requests: a canary needs more of them to be judged by."""
    return plan.rollout_pace if running.step == night.ROLL_OUT else plan.night_pace


async def _while_trickling(
    stage: Stage, chosen: Questions, work: Coroutine[Any, Any, T], pace: Callable[[], float]
) -> T:
    """Do the work while slow traffic goes on; every answer that was begun is waited for."""
    stop = asyncio.Event()
    trickle = asyncio.create_task(stage.player.trickle(chosen.items, pace, stop))
    try:
        done = await _guarded(stage.serving, work)
        stop.set()
        await _guarded(stage.serving, _joined(trickle))
    finally:
        trickle.cancel()
        await asyncio.gather(trickle, return_exceptions=True)
    return done


async def _joined(task: asyncio.Task[None]) -> None:
    await task


async def _guarded(serving: Serving, work: Coroutine[Any, Any, T], *guards: Coroutine[Any, Any, None]) -> T:
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


async def _installed(plan: Plan, program: Program) -> None:
    code = await program.ended()
    if code != 0:
        raise LinkError(
            "installation",
            f"it ended with exit code {code}",
            f"put right what the log names, and try `{' '.join(plan.install)}`",
            program.log,
        )


async def _route(serving: Serving) -> Route:
    async with serving.operator() as operator:
        try:
            return await operator.get_route()
        except AgentLoopError as error:
            raise LinkError(
                "server", f"it does not tell its route: {error}", "see the log", serving.server.log
            ) from error


def _tolerate(stage: Stage) -> None:
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


def _traffic_so_far(stage: Stage) -> str:
    tally = stage.tally
    median = tally.ttft_ms(50)
    speed = "" if median is None else f", first token after {median:.0f} ms (median)"
    failed = len(tally.failures)
    return f"{tally.requests} requests, {stage.player.in_flight} in flight, {failed} failed{speed}"


def _last_line(program: Program) -> str:
    lines = tail(program.log, 1)
    return lines[-1][:LINE_CHARACTERS] if lines else "starting"
