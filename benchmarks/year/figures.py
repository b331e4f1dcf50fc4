"""What a year's ledger says, as lines of the benchmark."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.line import Line
from benchmarks.year.calendar import ATTACKS
from training.gate_rules import NotInferior, Rules, read_rules

Ledger = Sequence[Mapping[str, Any]]

_ENDS = 30
_EARLY = slice(60, 90)
QUALITIES = ("target", "callers")


def lines(ledger: Ledger, never_learned: int, rules: Rules | None = None) -> Iterator[Line]:
    """Every figure; those with a goal are promises, the others say what it came to."""
    rules = rules or read_rules()
    margins = margins_of(rules)
    promoted = [line for line in ledger if line["outcome"] == "promoted"]
    worse = [line for line in promoted if is_false(line, margins)]
    no_better = sum(gain(line, "target") < 0 for line in promoted)
    yield _line("nights", len(ledger), "nights")
    yield _line("promotions", len(promoted), "nights")
    yield _line("false_promotions", len(worse), "nights", "<= 0")
    spent = sum(float(line.get("alpha", 0.0)) for line in ledger)
    yield Line(
        "year", "no_better_promotions", no_better, "nights", "alpha spent", round(spent, 2), f"<= {spent:.2f}"
    )
    for quality in QUALITIES:
        lost = [line["best"][quality] - line["champion"][quality] for line in ledger]
        yield _line(f"quality_lost_{quality}", statistics.mean(lost), "share", "<= 0.01")
        yield _line(f"quality_lost_{quality}_worst", max(lost), "share", f"<= {margins[quality]:g}")
        yield Line(
            "year",
            f"quality_{quality}_last",
            ledger[-1]["champion"][quality],
            "share",
            "best candidate of the last 30 nights",
            best_candidate(ledger[-_ENDS:], quality),
        )
    yield _line("interventions", len(interventions(ledger)), "nights", "<= 0")
    yield _line("nights_failed", sum(line["outcome"] == "failed" for line in ledger), "nights")
    yield _line("never_learned", never_learned, "rows", "<= 0")
    yield _line("steps_run_again", sum(sum(line["reruns"].values()) for line in ledger), "steps")
    for what, count in sorted(holds(ledger).items()):
        yield _line(f"held: {what}", count, "nights")
    yield from _poison(ledger)
    budget = [line["budget_left"] for line in ledger if "budget_left" in line]
    yield _line("error_budget_left_least", min(budget, default=0.0), "alpha", "> 0")
    yield from _growths(ledger)
    yield _line("cpu_a_night", statistics.mean(sum(line["cpu"].values()) for line in ledger), "s", "<= 8")
    yield _line("disk", sum(line["bytes"] for line in ledger) / 1e6, "MB")


def margins_of(rules: Rules) -> dict[str, float]:
    """How much worse than the champion a model may be, on the target and on what callers ask."""
    guards = [each for each in rules.checks if isinstance(each, NotInferior)]
    suites = {"target": "simple_python", "callers": "gate"}
    return {
        name: max(
            each.margin
            for each in guards
            if each.suite == suite and each.against in ("champion", "best_ever")
        )
        for name, suite in suites.items()
    }


def gain(line: Mapping[str, Any], quality: str) -> float:
    """How much better a promoted model truly is than the one it replaced, that night."""
    return float(line["candidate"][quality] - line["before"][quality])


def is_false(line: Mapping[str, Any], margins: Mapping[str, float]) -> bool:
    """Whether a promotion made what serves worse by more than a margin."""
    return any(gain(line, quality) < -margin for quality, margin in margins.items())


def interventions(ledger: Ledger) -> list[int]:
    """Numbers of the nights that failed where the night before had failed: it does not mend itself."""
    return [
        int(line["night"])
        for before, line in pairwise(ledger)
        if before["outcome"] == line["outcome"] == "failed" and before["step"] == line["step"]
    ]


def best_candidate(ledger: Ledger, quality: str) -> float | None:
    """The best that a candidate truly was."""
    return max((line["candidate"][quality] for line in ledger if "candidate" in line), default=None)


def holds(ledger: Ledger) -> Counter[str]:
    """Why nights promoted nothing: the checks that did not hold, or the step at which they ended."""
    found: Counter[str] = Counter()
    for line in ledger:
        if line["outcome"] == "held":
            found.update(line["held_by"])
        elif line["outcome"] != "promoted":
            found[f"{line['outcome']} at {line['step']}"] += 1
    return found


def _poison(ledger: Ledger) -> Iterator[Line]:
    """The most that all poison so far had of the dataset, in the nights of each kind of campaign."""
    shares: dict[str, float] = {}
    for line in ledger:
        for event in line["events"]:
            if event in ATTACKS and "train" in line:
                share = line["attack_learned"] / max(1, line["train"])
                shares[event] = max(shares.get(event, 0.0), share)
    for name, share in sorted(shares.items()):
        yield _line(f"poison_in_dataset_{name}", share, "share")
    wrong = [line["wrong_share"] for line in ledger if "wrong_share" in line]
    yield _line("wrong_in_dataset_worst", max(wrong, default=0.0), "share")


def _growths(ledger: Ledger) -> Iterator[Line]:
    if len(ledger) < _EARLY.stop + _ENDS:
        return
    figures: dict[str, Callable[[Mapping[str, Any]], float]] = {
        "cycle_bytes": lambda line: line["bytes"],
        "log_bytes": lambda line: line["log_bytes"],
        "curate_cpu": lambda line: line["cpu"].get("curate", 0.0),
        "evaluate_cpu": lambda line: line["cpu"].get("evaluate", 0.0),
        "night_cpu": lambda line: sum(line["cpu"].values()),
    }
    judged = [line for line in ledger if "train" in line]
    early = [line for line in judged if _EARLY.start <= line["night"] < _EARLY.stop]
    for name, figure in figures.items():
        then = statistics.median(map(figure, early))
        now = statistics.median(map(figure, judged[-_ENDS:]))
        yield Line("year", f"{name}_growth", now / then, "ratio", "nights 61 to 90", 1.0, "<= 2")


def _line(metric: str, value: float, unit: str, goal: str = "") -> Line:
    return Line("year", metric, round(value, 4), unit, "", None, goal)
