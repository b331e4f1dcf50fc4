"""The order of things: night after night, then the sealed score."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from agentloop.errors import AgentLoopError
from demo.conductor import turn
from demo.failure import LinkError
from demo.learn import figures, picture
from demo.learn.diary import Diary
from demo.learn.table import table
from demo.plan import Plan
from demo.screen import Screen
from demo.serving import FREE_GIB, GIB, gguf_of
from demo.stage import running
from demo.traffic import Asked
from training import bfcl, cycle, sealed
from training.official_checker import CheckerFailedError
from training.own_server import ServerFailedError
from training.subjects import Place, Subject

CONFIGS = Path(sealed.__file__).parent / "configs" / "learn"

# Whatever the dataset has, three passes: hours are there. The environment may say otherwise.
NIGHT = {
    "AGENTLOOP_TRAINING_TOKENS": "2000000",
    "AGENTLOOP_RECIPE": str(CONFIGS / "recipe.yaml"),
    "AGENTLOOP_SUITES": str(CONFIGS / "suites.yaml"),
    "AGENTLOOP_GATE_RULES": str(CONFIGS / "gate.yaml"),
}

GIB_A_NIGHT = 1  # its GGUF twice, and what else its cycle keeps


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be done, and where: `plan` for every night, `week` what each asks, `seal` what is scored."""

    plan: Plan
    week: Sequence[Sequence[Asked]]
    seal: range = field(default=bfcl.SEALED)

    @property
    def diary(self) -> Diary:
        """Which nights are done."""
        return Diary(self.plan.state_dir / "nights")

    @property
    def sealed_dir(self) -> Path:
        """Where the sealed score is, once it was taken."""
        return self.plan.state_dir / "sealed"


async def conduct(order: Order, screen: Screen) -> Path:
    """Do what is left of the nights, take the sealed score, show all; the path of learn.json.

    Raises:
        LinkError: if any link of the loop failed; what was done stays done.
    """
    _enough_room(order)
    order.diary.begin(order.week)
    for number, items in enumerate(order.week, start=1):
        if order.diary.ended(number):
            screen.note(f"night {number} of {len(order.week)} is done: {order.diary.cycle_of(number)}")
        else:
            await _night(order, number, items, screen)
            show(order, screen)
    if sealed.result(order.sealed_dir) is None:
        await _score(order, screen)
    return show(order, screen)


def _enough_room(order: Order) -> None:
    place = order.plan.state_dir
    place.mkdir(parents=True, exist_ok=True)
    wanted = FREE_GIB + GIB_A_NIGHT * (len(order.week) - len(order.diary.cycles()))
    free = shutil.disk_usage(place).free / GIB
    if free < wanted:
        raise LinkError(
            "start",
            f"{free:.1f} GiB are free in {place}, {wanted:.0f} may be needed",
            "free some space, or set AGENTLOOP_LEARN_DIR to a larger disk",
        )


async def _night(order: Order, number: int, items: Sequence[Asked], screen: Screen) -> None:
    screen.step(f"night {number} of {len(order.week)}")
    settings = NIGHT | dict(order.plan.night_settings)
    async with running(order.plan, screen) as machine:
        plan = replace(order.plan, night_settings=settings, cycle_id=order.diary.cycle_of(number))
        await turn(plan, machine, screen, partial(order.diary.asks, number, items))
    order.diary.end(number)


async def _score(order: Order, screen: Screen) -> None:
    """The version in service, on the sealed items, once."""
    plan = order.plan
    served = figures.served(plan.cycles_dir / order.diary.cycles()[-1])
    gguf = gguf_of(plan, served)
    screen.step(f"the sealed score of {served}: {sealed.CATEGORY} {order.seal[0]}-{order.seal[-1]}")
    done = [0, len(order.seal)]

    def progress(*now: int) -> None:
        done[:] = now

    place = Place(plan.state_dir, plan.cycles_dir, plan.base_gguf, plan.model_name, plan.engine)
    try:
        subject = Subject("candidate", served, gguf, await asyncio.to_thread(cycle.sha256, gguf))
        async with running(plan, screen), screen.watching(lambda: f"{done[0]} of {done[1]} answers"):
            await sealed.score(order.sealed_dir, subject, place, numbers=order.seal, progress=progress)
    except (AgentLoopError, OSError, ServerFailedError, CheckerFailedError, sealed.SealBrokenError) as error:
        raise LinkError("sealed score", str(error), f"put it right, then `{plan.command}` again") from error


def show(order: Order, screen: Screen) -> Path:
    """Write learn.json and the picture, and print the table, of what is done so far."""
    cycles = [order.plan.cycles_dir / each for each in order.diary.cycles()]
    shown: dict[str, Any] = figures.figures(cycles, sealed.result(order.sealed_dir))
    path = order.plan.state_dir / "learn.json"
    cycle.write_json(path, shown)
    picture.draw(shown, path.with_suffix(".svg"))
    screen.console.print(table(shown))
    screen.note(f"figures: {path}")
    screen.note(f"picture: {path.with_suffix('.svg')}")
    return path
