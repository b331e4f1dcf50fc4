"""The curve of the week, as a picture: who was how often right, night by night."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training import cycle

TITLES = {
    "simple_python": "simple_python 200-299",
    "gate": "what callers showed, never learned",
    "irrelevance": "no function fits, none is called",
}
COLOURS = {"champion": "#8a8f98", "candidate": "#2563eb"}
SERVED, SEALED = "#16a34a", "#b45309"
APART = 0.07  # champion and candidate beside each other, so that their intervals can be told apart
# The same figures make the same file.
_SAME: Any = {"svg.hashsalt": "learn", "svg.fonttype": "none", "font.size": 9}


def draw(shown: Mapping[str, Any], path: Path) -> None:
    """Write the SVG of `learn.json`'s figures: a panel a suite, 95 % intervals, the sealed score beside."""
    with rc_context(_SAME):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        panels = figure.subplots(1, len(TITLES), sharey=True)
        for panel, (suite, title) in zip(panels, TITLES.items(), strict=True):
            _panel(panel, shown["nights"], suite, title)
        if shown["sealed"] is not None:
            _sealed(panels[0], shown)
        panels[0].set_ylabel("share right")
        panels[0].legend(loc="lower right", frameon=False)
        with cycle.new_file(path) as building:
            figure.savefig(building, format="svg", metadata={"Date": None})


def _panel(panel: Axes, nights: Sequence[Mapping[str, Any]], suite: str, title: str) -> None:
    panel.set_title(title)
    panel.set_ylim(0, 1)
    panel.set_xlabel("night")
    panel.set_xticks([night["night"] for night in nights])
    panel.grid(axis="y", alpha=0.3)
    for who, shift in (("champion", -APART), ("candidate", APART)):
        measured = [(night["night"] + shift, night[who][suite]) for night in nights if night[who][suite]]
        _points(panel, measured, COLOURS[who], who)
    served = [
        (night["night"], night["served"][suite]["accuracy"]) for night in nights if night["served"][suite]
    ]
    panel.step(
        [x for x, _ in served],
        [y for _, y in served],
        where="mid",
        color=SERVED,
        label="serves after the night",
    )


def _points(
    panel: Axes, measured: Sequence[tuple[float, Mapping[str, Any]]], colour: str, label: str
) -> None:
    values = [found["accuracy"] for _, found in measured]
    below = [max(0.0, found["accuracy"] - found["ci_low"]) for _, found in measured]
    above = [max(0.0, found["ci_high"] - found["accuracy"]) for _, found in measured]
    at = [x for x, _ in measured]
    panel.errorbar(at, values, [below, above], fmt="o", color=colour, markersize=4, capsize=2, label=label)


def _sealed(panel: Axes, shown: Mapping[str, Any]) -> None:
    """The sealed score, to the right of the last night, and the goal as a line."""
    at = len(shown["nights"]) + 1
    _points(panel, [(at, shown["sealed"])], SEALED, f"{shown['sealed']['items']} (sealed)")
    panel.axhline(shown["goal"], color=SEALED, linestyle=":", linewidth=1)
    panel.set_xticks([*(night["night"] for night in shown["nights"]), at])
    panel.set_xticklabels([*(str(night["night"]) for night in shown["nights"]), "sealed"])
