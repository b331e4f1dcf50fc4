"""What learn.json holds: each night's figures, what serves after it, and the sealed score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from demo.figures import read

SUITES = ("simple_python", "gate", "irrelevance")
SUBJECTS = ("champion", "candidate")
GOAL = 0.616
"""FunctionGemma 270M on BFCL Simple, as Google reports it. It had not seen the benchmark's neighbours."""


def figures(cycles: Sequence[Path], score: Mapping[str, Any] | None) -> dict[str, Any]:
    """The figures, by the names of learn.json; None where there is none yet.

    | name           | is                                                                                   |
    |----------------|--------------------------------------------------------------------------------------|
    | nights         | of each, in order, what `night` gives                                                |
    | served         | the version in service after the last of them                                        |
    | never_worse    | no promoted version was right less often on simple_python 200-299 than the one before |
    | irrelevance    | share of what no function fits that the version in service answers without a call    |
    | sealed         | the score on simple_python 300-399, taken once (training.sealed)                     |
    | goal, holds    | what `sealed` should reach; whether it does                                          |
    """
    nights = [night(number, each) for number, each in enumerate(cycles, start=1)]
    scored = [found for each in nights if (found := each["served"]["simple_python"]) is not None]
    return {
        "nights": nights,
        "served": nights[-1]["serves"] if nights else None,
        "never_worse": all(one["correct"] <= other["correct"] for one, other in pairwise(scored)),
        "irrelevance": _accuracy(nights[-1]["served"]["irrelevance"]) if nights else None,
        "sealed": None if score is None else dict(score),
        "goal": GOAL,
        "holds": None if score is None else score["accuracy"] >= GOAL,
    }


def night(number: int, cycle_dir: Path) -> dict[str, Any]:
    """One night: what it learned from, how both did on each suite, its verdict, and what serves after it.

    `champion`, `candidate` and `served` have, by suite, n, correct, accuracy with its 95 % interval (Wilson).
    """
    dataset = read(cycle_dir / "dataset" / "dataset.json")
    tuned = read(cycle_dir / "adapter" / "finetune.json")
    summary = read(cycle_dir / "evaluation" / "summary.json")
    gate = read(cycle_dir / "gate.json")
    turn = read(cycle_dir / "demo.json")
    serves = served(cycle_dir)
    promoted = serves == gate.get("candidate", {}).get("model_version")
    sides = {who: {suite: summary.get(suite, {}).get(who) for suite in SUITES} for who in SUBJECTS}
    return {
        "night": number,
        "cycle_id": cycle_dir.name,
        "requests": turn.get("requests"),
        "requests_failed": turn.get("requests_failed"),
        "train": dataset.get("train"),
        "new_train": dataset.get("new_train"),
        "excluded": dataset.get("excluded"),
        "tokens": tuned.get("tokens"),
        "loss_last": tuned.get("loss_last"),
        "training_seconds": tuned.get("seconds"),
        "seconds": turn.get("seconds"),
        "peak_memory_gb": turn.get("peak_memory_gb"),
        **sides,
        "verdict": gate.get("verdict", "skipped"),
        "reason": gate.get("reason"),
        "serves": serves,
        "promoted": promoted,
        "served": sides["candidate" if promoted else "champion"],
    }


def served(cycle_dir: Path) -> str:
    """The stable version after a night, as its demo.json says."""
    targets = read(cycle_dir / "demo.json")["route_after"]
    return str(next(each["model_version"] for each in targets if each["role"] == "stable"))


def _accuracy(measured: Mapping[str, Any] | None) -> float | None:
    return None if measured is None else float(measured["accuracy"])
