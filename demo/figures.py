"""What demo.json holds: the figures of one demo, from its traffic and from the files of its cycle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agentloop.types import Route
from demo.tally import Tally

SUITE = "simple_python"
SUBJECTS = ("base_constrained", "champion", "candidate")


@dataclass(frozen=True, slots=True)
class Observed:
    """What the demo itself saw."""

    tally: Tally
    rows_accepted: int
    rows_logged: int
    peak_memory_bytes: int
    route_before: Route
    route_after: Route
    seconds: float


def figures(observed: Observed, cycle_dir: Path) -> dict[str, Any]:
    """The figures, by the names of demo.json; None where the night did not get that far.

    | name                                | is                                                            |
    |-------------------------------------|---------------------------------------------------------------|
    | requests, requests_failed           | meant to be answered; failed, and should not have             |
    | ttft_p50_ms, ttft_p95_ms            | to the first token, at the client                             |
    | rows_accepted                       | inferences that the server accepted, by its own count         |
    | rows_logged                         | of these, in Postgres                                         |
    | rows_quarantined                    | set aside by validation                                       |
    | examples_kept, examples_excluded    | of the rows validated: learned from or gating; not, by reason |
    | loss_first, loss_last, tokens_per_s | of the fine-tuning                                            |
    | peak_memory_gb                      | of the whole process tree, 10^9 bytes                         |
    | gguf_mb                             | the candidate, 10^6 bytes                                     |
    | <subject>_accuracy                  | share of simple_python 200-299 answered right                 |
    | <subject>_accuracy_ci               | its 95 % confidence interval (Wilson)                         |
    | verdict                             | of the gate: pass, fail, inconclusive; or skipped             |
    | route_before, route_after           | targets of the route `default`                                |
    | rollout_requests, …_failed_requests | answered during the rollout; None if nobody could count them  |
    | seconds                             | after installation                                            |
    """
    tally = observed.tally
    dataset = read(cycle_dir / "dataset" / "dataset.json")
    tuned = read(cycle_dir / "adapter" / "finetune.json")
    rollout = read(cycle_dir / "rollout.json")
    size = read(cycle_dir / "quantize.json").get("size_bytes")
    return {
        "requests": tally.requests,
        "requests_failed": len(tally.failures),
        "ttft_p50_ms": _rounded(tally.ttft_ms(50), 1),
        "ttft_p95_ms": _rounded(tally.ttft_ms(95), 1),
        "rows_accepted": observed.rows_accepted,
        "rows_logged": observed.rows_logged,
        "rows_quarantined": read(cycle_dir / "validation" / "result.json").get("quarantined_rows"),
        "examples_kept": _sum(dataset, ("new_train", "new_gate")),
        "examples_excluded": dataset.get("excluded"),
        "loss_first": _rounded(tuned.get("loss_first"), 4),
        "loss_last": _rounded(tuned.get("loss_last"), 4),
        "tokens_per_s": _rounded(tuned.get("tokens_per_s"), 1),
        "peak_memory_gb": round(observed.peak_memory_bytes / 1e9, 2),
        "gguf_mb": None if size is None else round(size / 1e6, 1),
        **accuracies(read(cycle_dir / "evaluation" / "summary.json").get(SUITE, {})),
        "verdict": read(cycle_dir / "gate.json").get("verdict", "skipped"),
        "route_before": _targets(observed.route_before),
        "route_after": _targets(observed.route_after),
        "rollout_requests": rollout.get("requests", 0),
        "rollout_failed_requests": rollout.get("failed_requests", 0),
        "seconds": round(observed.seconds, 1),
    }


def accuracies(suite: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy of each subject, and beside it its interval."""
    shown: dict[str, Any] = {}
    for subject in SUBJECTS:
        measured = suite.get(subject, {})
        interval = [measured.get("ci_low"), measured.get("ci_high")]
        shown[f"{subject}_accuracy"] = measured.get("accuracy")
        shown[f"{subject}_accuracy_ci"] = None if None in interval else [round(end, 4) for end in interval]
    return shown


def write(shown: Mapping[str, Any], cycle_dir: Path) -> Path:
    """Write demo.json, whole or not at all; its path."""
    path = cycle_dir / "demo.json"
    partial = path.with_name("demo.json.partial")
    partial.write_text(f"{json.dumps(shown, indent=2, sort_keys=True)}\n", encoding="utf-8")
    partial.replace(path)
    return path


def read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return value if isinstance(value, dict) else {}


def _targets(route: Route) -> list[dict[str, Any]]:
    return [asdict(target) for target in route.targets]


def _sum(values: Mapping[str, Any], names: Sequence[str]) -> int | None:
    return sum(values[name] for name in names) if all(name in values for name in names) else None


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
