"""The order of things: serve, play, learn, show."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.markup import escape

from agentloop import AgentLoopError
from agentloop.cli_session import printable
from agentloop.types import ChatEvent, Route, Started, TextDelta, ToolCall
from demo import figures, log_check, night, questions
from demo.failure import LinkError
from demo.night import Night
from demo.plan import Plan
from demo.processes import Program
from demo.questions import Questions
from demo.screen import Screen
from demo.serving import Serving, bring_up
from demo.stage import (
    Running,
    Stage,
    guarded,
    last_line,
    running,
    tolerate,
    traffic_so_far,
    while_trickling,
)
from demo.table import table
from demo.tally import Tally
from demo.traffic import SERVICES, Player, connected


async def conduct(plan: Plan, screen: Screen) -> Path:
    """Run one demo; the path of its demo.json.

    Raises:
        LinkError: if any link of the loop failed.
    """
    async with running(plan, screen) as machine:
        return await turn(plan, machine, screen, lambda: questions.choose(plan.private_dir, plan.requests))


async def turn(plan: Plan, machine: Running, screen: Screen, choose: Callable[[], Questions]) -> Path:
    """One turn of the loop, from the service's start; the path of its demo.json.

    Raises:
        LinkError: if any link of the loop failed.
    """
    started = time.monotonic()
    screen.step("1 of 4: the service")
    serving = await bring_up(plan, machine.programs, screen)
    chosen = choose()
    async with connected(serving.grpc_address, serving.tokens) as services:
        player = Player(services, Tally(), f"{serving.started_at:%Y%m%dT%H%M%SZ}", chosen.shown)
        stage = Stage(plan, machine.programs, serving, screen, player)
        before = await _route(serving)
        waited = 0.0
        if chosen.items:
            await _first_answer(stage, chosen)
            waited = await _play(stage, chosen)
        cycle_dir = await _night(stage, chosen)
        logged = await guarded(serving, log_check.check_log(serving, stage.tally.inference_ids))
    observed = figures.Observed(
        tally=stage.tally,
        rows_accepted=logged.accepted,
        rows_logged=logged.logged,
        peak_memory_bytes=machine.meter.peak_bytes,
        route_before=before,
        route_after=await _route(serving),
        seconds=time.monotonic() - started - waited,
    )
    return await _show(stage, observed, cycle_dir)


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

    outcome = await guarded(stage.serving, stage.player.ask(item, on_event=show))
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
        rest = f"; installing: {last_line(installing)}" if installing and installing.running else ""
        return f"{traffic_so_far(stage)} of {total}{rest}"

    async with screen.watching(describe):
        asked = stage.player.play(chosen.items[1:], seconds=plan.traffic_seconds, in_flight=plan.in_flight)
        await guarded(stage.serving, asked, *guards)
    screen.note(f"{traffic_so_far(stage)}; {tally.feedbacks} right answers shown")
    tolerate(stage)
    waiting = time.monotonic()
    if installing is not None:
        async with screen.watching(describe):
            installed = _installed(plan, installing)
            await while_trickling(stage, chosen, installed, lambda: plan.night_pace)
        screen.note("installed what the night needs")
    return time.monotonic() - waiting


async def _night(stage: Stage, chosen: Questions) -> Path:
    """The DAG's run, while slower traffic goes on; its cycle directory."""
    plan, screen = stage.plan, stage.screen
    screen.step("3 of 4: the night: the DAG nightly_loop, while traffic goes on")
    begun = await night.begin(plan, stage.programs, stage.serving)
    shown: set[str] = set()

    def describe() -> str:
        step = begun.step
        if step not in shown:
            shown.add(step)
            screen.note(f"night: {step}")
        return f"night: {step}: {last_line(begun.program)}; {traffic_so_far(stage)}"

    async with screen.watching(describe):
        ended = begun.ended(new_questions=chosen.new)
        cycle_dir = await while_trickling(stage, chosen, ended, lambda: _pace(plan, begun))
    tolerate(stage)
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


def _pace(plan: Plan, begun: Night) -> float:
    """Seconds between requests: a canary needs more of them to be judged by."""
    return plan.rollout_pace if begun.step == night.ROLL_OUT else plan.night_pace


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
