"""Asks a deployed service as many callers would, for a while: `make load`, after a deployment to staging.

Every request is a real one through the client, of the alias that is named, with a token of its own (scope
infer). Exit: 0 within the limits, 1 too many failed or the slow ones were too slow, 2 usage.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from agentloop.client import AsyncClient
from agentloop.errors import AgentLoopError, ConfigurationError
from agentloop.types import Sampling

PROMPTS = ("Say hello.", "Name a colour.", "Count to three.", "What is two and two?")
MAX_TOKENS = 16
USAGE = 2
PAUSE = 0.2
"""Seconds that a caller who was refused waits: a server that refuses at once is not asked in a loop."""

Ask = Callable[[str], Awaitable[object]]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Load:
    """What came of it: seconds of each answered request, and how the others ended."""

    seconds: list[float] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)

    @property
    def requests(self) -> int:
        """All that were made."""
        return len(self.seconds) + self.failed.total()

    @property
    def p95(self) -> float:
        """Seconds within which 95 of 100 answers were whole; 0 without two answers."""
        return statistics.quantiles(self.seconds, n=20)[-1] if len(self.seconds) > 1 else 0.0

    def verdict(self, most_failed: float, most_seconds: float) -> str:
        """Why it is not good enough; empty if it is."""
        failed = self.failed.total()
        if not self.seconds:
            return f"none of {failed} requests was answered: {self.failed.most_common(3)}"
        if failed > most_failed * self.requests:
            reasons = self.failed.most_common(3)
            return f"{failed} of {self.requests} requests failed, more than {most_failed:.1%}: {reasons}"
        if self.p95 > most_seconds:
            return f"95 of 100 answers took up to {self.p95:.1f} s; they may take {most_seconds:.1f} s"
        return ""


async def press(ask: Ask, callers: int, seconds: float) -> Load:
    """Let `callers` ask at once, each again when it was answered, until `seconds` are over."""
    load, until = Load(), time.monotonic() + seconds

    async def caller(number: int) -> None:
        asked = 0
        while time.monotonic() < until or not asked:
            began = time.monotonic()
            try:
                await ask(PROMPTS[(number + asked) % len(PROMPTS)])
                load.seconds.append(time.monotonic() - began)
            except AgentLoopError as error:
                load.failed[type(error).__name__] += 1
                await asyncio.sleep(PAUSE)
            asked += 1

    async with asyncio.TaskGroup() as group:
        for number in range(callers):
            group.create_task(caller(number))
    return load


@app.command()
def run(
    server: Annotated[str, typer.Option(envvar="AGENTLOOP_SERVER", help="Where: grpcs://host:50051.")],
    token_file: Annotated[
        Path, typer.Option(envvar="AGENTLOOP_TOKEN_FILE", help="A token of the scope infer.", exists=True)
    ],
    alias: Annotated[str, typer.Option(help="What is asked.")] = "default",
    callers: Annotated[int, typer.Option(min=1, max=1000, help="At once.")] = 16,
    seconds: Annotated[float, typer.Option(min=0, max=3600, help="For how long.")] = 60,
    most_failed: Annotated[float, typer.Option(min=0, max=1, help="The share that may fail.")] = 0.001,
    p95: Annotated[float, typer.Option(min=0, help="Seconds that 95 of 100 answers may take.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Press a service, and judge it."""

    async def pressed() -> Load:
        async with AsyncClient(server, token_file=token_file) as client:

            async def ask(prompt: str) -> object:
                return await client.ask(prompt, alias=alias, sampling=Sampling(max_tokens=MAX_TOKENS))

            return await press(ask, callers, seconds)

    try:
        load = asyncio.run(pressed())
    except ConfigurationError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(USAGE) from error
    why = load.verdict(most_failed, p95)
    found = {
        "requests": load.requests,
        "failed": dict(load.failed),
        "median_seconds": statistics.median(load.seconds) if load.seconds else None,
        "p95_seconds": load.p95,
    }
    text = f"{load.requests} requests, {load.failed.total()} failed, p95 {load.p95:.2f} s"
    typer.echo(json.dumps(found) if as_json else text)
    if why:
        typer.echo(why, err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m scripts.load")
