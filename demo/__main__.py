"""`python -m demo`: what `make demo` runs once serving is installed."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from demo.conductor import conduct
from demo.failure import LinkError
from demo.plan import HOME, NIGHT, REQUESTS, TRAFFIC_SECONDS, Plan
from demo.screen import Screen

FAILED = 1
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def demo(
    state_dir: Annotated[
        Path, typer.Option(envvar="AGENTLOOP_STATE_DIR", help="Models, the log, Postgres.")
    ] = Path("var"),
    cycles_dir: Annotated[
        Path, typer.Option(envvar="AGENTLOOP_CYCLES_DIR", help="One folder a cycle.")
    ] = Path("cycles"),
    base_gguf: Annotated[
        Path | None,
        typer.Option(envvar="AGENTLOOP_BASE_GGUF", help="Default: models/… in the state folder."),
    ] = None,
    model_name: Annotated[
        str, typer.Option(envvar="AGENTLOOP_MODEL_NAME", help="The model that is served.")
    ] = "gemma-3-270m",
    engine: Annotated[
        Literal["embedded", "ollama"], typer.Option(envvar="AGENTLOOP_ENGINE", help="What generates.")
    ] = "embedded",
    requests: Annotated[
        int, typer.Option(envvar="AGENTLOOP_DEMO_REQUESTS", min=2, help="Questions to ask.")
    ] = REQUESTS,
    traffic_seconds: Annotated[
        float,
        typer.Option(envvar="AGENTLOOP_DEMO_TRAFFIC_SECONDS", min=0, help="How long to take for them."),
    ] = TRAFFIC_SECONDS,
    install: Annotated[
        str,
        typer.Option(
            envvar="AGENTLOOP_DEMO_INSTALL", help="Command that installs the night's needs meanwhile."
        ),
    ] = "",
    night_python: Annotated[
        str,
        typer.Option(envvar="AGENTLOOP_DEMO_NIGHT_PYTHON", help="An interpreter that has the night's needs."),
    ] = sys.executable,
) -> None:
    """Turn the loop once: serve, log, learn, gate, roll out. Exit code 0 on any verdict of the gate."""
    state_dir, cycles_dir = (HOME / state_dir).absolute(), (HOME / cycles_dir).absolute()
    plan = Plan(
        state_dir=state_dir,
        cycles_dir=cycles_dir,
        base_gguf=(base_gguf or state_dir / "models" / "gemma-3-270m-q4_k_m.gguf").absolute(),
        model_name=model_name,
        engine=engine,
        requests=requests,
        traffic_seconds=traffic_seconds,
        install=tuple(shlex.split(install)),
        night=(night_python, NIGHT),
    )
    screen = Screen(started=float(os.environ.get("AGENTLOOP_DEMO_STARTED") or time.time()))
    code = asyncio.run(until_signal(lambda screen: conduct(plan, screen), screen))
    raise typer.Exit(code)


async def until_signal(work: Callable[[Screen], Coroutine[Any, Any, Path]], screen: Screen) -> int:
    """Do the work; a signal ends it in good order. The exit code."""
    conducting = asyncio.create_task(work(screen))
    loop = asyncio.get_running_loop()
    signals: list[signal.Signals] = []

    def interrupt(number: signal.Signals) -> None:
        if not signals:  # the second Ctrl-C changes nothing: all is being ended already
            screen.note(f"{number.name}: ending what was started")
            conducting.cancel()
        signals.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, interrupt, number)
    try:
        await conducting
    except LinkError as error:
        screen.broken(str(error))
        return FAILED
    except asyncio.CancelledError:
        if not signals:
            raise
        return INTERRUPTED if signals[0] is signal.SIGINT else 128 + signals[0]
    return 0


if __name__ == "__main__":
    app()
