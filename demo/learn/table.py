"""How the week's figures look in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from demo.table import NONE

COLUMNS = ("night", "requests", "examples", "champion", "candidate", "no function fits", "verdict", "hours")


def table(shown: Mapping[str, Any]) -> RenderableType:
    """A row a night, and below it what came of them all."""
    made = Table(
        *COLUMNS, title="nights, right on simple_python 200-299", title_justify="left", pad_edge=False
    )
    for night in shown["nights"]:
        made.add_row(*row(night))
    return Group(made, *(Text(line) for line in lines(shown)))


def row(night: Mapping[str, Any]) -> list[str]:
    """One night, as text."""
    verdict = night["verdict"] + (", serves" if night["promoted"] else "")
    return [
        str(night["night"]),
        _count(night["requests"]),
        _count(night["train"]),
        share(night["champion"]["simple_python"]),
        share(night["candidate"]["simple_python"]),
        share(night["candidate"]["irrelevance"]),
        verdict,
        NONE if night["seconds"] is None else f"{night['seconds'] / 3600:.1f}",
    ]


def lines(shown: Mapping[str, Any]) -> list[str]:
    """What serves, whether it ever got worse, and the sealed score."""
    score = shown["sealed"]
    told = [f"in service: {shown['served'] or NONE}"]
    if not shown["never_worse"]:
        told.append("a promoted version was right less often than the one before it")
    if score is None:
        return [*told, "the sealed items are not scored yet"]
    holds = "reached" if shown["holds"] else "not reached"
    return [
        *told,
        f"{score['items']}, by {score['checker']}: {share(score)} right, of {score['model_version']},"
        f" scored once, at {score['scored_at']}; the goal of {shown['goal']:.3f} is {holds}",
    ]


def share(measured: Mapping[str, Any] | None) -> str:
    """A share right with its interval."""
    if measured is None:
        return NONE
    return f"{measured['accuracy']:.2f} ({measured['ci_low']:.2f} to {measured['ci_high']:.2f})"


def _count(value: int | None) -> str:
    return NONE if value is None else str(value)
