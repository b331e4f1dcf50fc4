"""`python -m demo.learn`: what `make learn` runs."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from demo.__main__ import until_signal
from demo.learn.conductor import Order, conduct
from demo.learn.diary import OtherWeekError
from demo.learn.week import NIGHTS, week
from demo.plan import HOME, NIGHT, Plan
from demo.screen import Screen
from training.bfcl import SEALED

# A server that trains beside it answers a question in about a second and a half.
SECONDS_A_QUESTION = 1.5
# Seconds between requests while a night runs: there is traffic, and it takes next to nothing.
PACE = 30.0

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def learn(
    state_dir: Annotated[
        Path,
        typer.Option(envvar="AGENTLOOP_LEARN_DIR", help="All that the nights make, learn.json among it."),
    ] = Path("var/learn"),
    nights: Annotated[int, typer.Option(envvar="AGENTLOOP_LEARN_NIGHTS", min=1, help="How many.")] = NIGHTS,
    requests: Annotated[
        int | None,
        typer.Option(
            envvar="AGENTLOOP_LEARN_REQUESTS",
            min=1,
            help="Questions a night that a function answers. [default: all there are, over all nights]",
            show_default=False,
        ),
    ] = None,
    seal: Annotated[
        str,
        typer.Option(
            envvar="AGENTLOOP_LEARN_SEAL",
            help="Items of simple_python to score at the end: others than the sealed, to try it out.",
        ),
    ] = f"{SEALED[0]}-{SEALED[-1]}",
    as_json: Annotated[bool, typer.Option("--json", help="Print learn.json at the end.")] = False,
) -> None:
    """Learn for seven nights, and score the sealed items once. Goes on where an earlier run was ended."""
    place = (HOME / state_dir).absolute()
    try:
        scored = items(seal)
        asked = week(nights, requests)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    plan = Plan(
        state_dir=place,
        cycles_dir=place / "cycles",
        base_gguf=place / "models" / "gemma-3-270m-q4_k_m.gguf",
        traffic_seconds=SECONDS_A_QUESTION * max(map(len, asked)),
        night=(sys.executable, NIGHT),
        night_pace=PACE,
        command="make learn",
    )
    order = Order(plan, asked, scored)
    try:
        code = asyncio.run(until_signal(lambda screen: conduct(order, screen), Screen()))
    except OtherWeekError as error:
        raise typer.BadParameter(str(error)) from None
    if as_json and code == 0:
        typer.echo(json.dumps(json.loads((place / "learn.json").read_text(encoding="utf-8")), indent=2))
    raise typer.Exit(code)


def items(text: str) -> range:
    """`250-299` as a range with both ends in it.

    Raises:
        ValueError: if it is anything else, or not within simple_python's 0-399.
    """
    found = re.fullmatch(r"(\d{1,3})-(\d{1,3})", text)
    if not found or not int(found[1]) <= int(found[2]) < SEALED.stop:
        raise ValueError(f"seal is {text!r}; it must be like {SEALED[0]}-{SEALED[-1]}")
    return range(int(found[1]), int(found[2]) + 1)


if __name__ == "__main__":
    app()
