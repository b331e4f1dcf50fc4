"""A week of one night on a real server and Postgres: broken off, gone on with, scored. The DAG stands in."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from demo.failure import LinkError
from demo.learn.conductor import Order, conduct
from demo.learn.week import week
from demo.plan import Plan
from demo.screen import Screen
from tests.integration.test_demo import FAKE_ENGINE, NIGHT, no_environment, started_by
from tests.unit.test_sealed import Answers
from training import cycle, sealed

__all__ = ["no_environment"]  # a fixture


@pytest.mark.soak
async def test_a_week_that_broke_off_goes_on_where_it_stood_and_is_scored_once(
    places: Callable[[str], Path],
    cluster: Callable[[Path], Path],
    base_gguf: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = places("a week & its state")
    cluster(place / "postgres")
    plan = Plan(
        state_dir=place,
        cycles_dir=place / "cycles",
        base_gguf=base_gguf,
        traffic_seconds=0,
        server=FAKE_ENGINE,
        night=(*NIGHT, "fail"),
        command="make learn",
    )
    order = Order(plan, week(1, 2), range(210, 215))
    answers = Answers()
    monkeypatch.setattr(sealed, "ask_all", answers)
    console = Console(file=io.StringIO(), width=120)
    with pytest.raises(LinkError, match=r"step curate: (.|\n)*`make learn` again"):
        await conduct(order, Screen(console))
    cycle_id = order.diary.cycle_of(1)
    assert not order.diary.ended(1) and sealed.result(order.sealed_dir) is None
    assert order.diary.asks(1, order.week[0]).items == ()

    again = replace(order, plan=replace(plan, night=(*NIGHT, "inconclusive")))
    shown = cycle.read_json(await conduct(again, Screen(console)))
    (night,) = shown["nights"]
    assert (night["cycle_id"], night["verdict"], night["promoted"]) == (cycle_id, "inconclusive", False)
    assert (shown["served"], shown["sealed"]["correct"]) == ("gemma-3-270m:base", 3)
    assert [path.name for path in plan.cycles_dir.iterdir()] == [cycle_id]
    assert cycle.read_json(await conduct(again, Screen(console))) == shown
    assert len(answers.asked) == 5
    assert started_by(place) == []
