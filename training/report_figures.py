"""What the morning's page draws: curves of the training, drift of the traffic, canary beside champion."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from agentloop.night import Night
from training.plots import curve

Tone = Literal["good", "held", "bad", "quiet"]

_COMPARED = {
    "error_share": "answers that failed",
    "length_share": "answers cut by their length",
    "latency_p50_ms": "latency, median",
    "latency_p95_ms": "latency, 95th percentile",
}


@dataclass(frozen=True, slots=True)
class Plot:
    """A curve, its title, and the sentence that says what it shows."""

    title: str
    drawing: str
    says: str


@dataclass(frozen=True, slots=True)
class Drift:
    """One measure of the traffic against the nights before; `width`, `limit_at` in percent of the track."""

    name: str
    says: str
    tone: Tone
    value: str
    width: float = 0.0
    limit_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Pair:
    """One figure of the rollout, of both versions; widths in percent: of all answers, or of the slower."""

    name: str
    stable: str
    canary: str
    stable_width: float
    canary_width: float


def curves(night: Night) -> list[Plot]:
    """Loss, memory and speed over the steps of the fine-tuning."""
    found = []
    losses = _points(night.training, "loss")
    if losses:
        says = f"from {losses[0][1]:.2f} to {losses[-1][1]:.2f} in {len(losses)} steps"
        drawing = curve(losses, label=f"Loss: {says}", x_label="step", smooth=True)
        found.append(Plot("Loss", drawing, says))
    memory = _points(night.training, "memory_gb")
    if memory:
        says = f"{max(value for _, value in memory):.1f} GB at most"
        found.append(Plot("Memory, GB", curve(memory, label=f"Memory: {says}", x_label="step"), says))
    return found


def drifts(night: Night) -> list[Drift]:
    """How far the traffic moved from the nights before, each measure beside its limit."""
    told = night.validation.get("expectations")
    measured = [one for one in told if is_drift(one)] if isinstance(told, list) else []
    return [_drift(one) for one in measured]


def is_drift(outcome: Any) -> bool:
    """Whether an expectation's outcome is one of drift: a measure with its limit, or why there is none."""
    observed = outcome.get("observed") if isinstance(outcome, dict) else None
    return isinstance(observed, dict) and ("limit" in observed or "not_judged" in observed)


def _drift(outcome: Mapping[str, Any]) -> Drift:
    observed = outcome["observed"]
    name, says = str(outcome.get("name", "")).replace("_", " "), str(outcome.get("says", ""))
    value, limit = (_finite(observed.get(key)) for key in ("value", "limit"))
    if value is None or not limit:
        return Drift(name, str(observed.get("not_judged", says)), "quiet", "not judged")
    span = max(value, 2 * limit)
    tone: Tone = "good" if outcome.get("success") else "bad" if outcome.get("blocking") else "held"
    return Drift(name, says, tone, f"{value:.3f} of {limit:.3f}", 100 * value / span, 100 * limit / span)


def canary(night: Night) -> list[Pair]:
    """The figures on which the rollout was decided, of both versions; none where it compared none."""
    steps = night.rollout.get("steps")
    compared = [
        one["metrics"]
        for one in (steps if isinstance(steps, list) else ())
        if isinstance(one, dict) and isinstance(one.get("metrics"), dict) and len(one["metrics"]) == 2
    ]
    if not compared or not {"stable", "canary"} <= compared[-1].keys():
        return []
    stable, new = compared[-1]["stable"], compared[-1]["canary"]
    found = []
    for name, says in _COMPARED.items() if isinstance(stable, dict) and isinstance(new, dict) else ():
        one, other = _finite(stable.get(name)), _finite(new.get(name))
        if one is None or other is None or min(one, other) < 0:
            continue
        share = name.endswith("_share")
        largest = 1.0 if share else max(one, other) or 1.0
        texts = [f"{100 * each:.1f} %" if share else f"{each:,.0f} ms" for each in (one, other)]
        found.append(Pair(says, texts[0], texts[1], 100 * one / largest, 100 * other / largest))
    return found


def _finite(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def _points(lines: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [
        (step, value)
        for line in lines
        if (value := _finite(line.get(key))) is not None and (step := _finite(line.get("step"))) is not None
    ]
