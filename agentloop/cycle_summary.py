"""A cycle in figures, and two of them side by side: what `agent-loop cycles` shows, of its files alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from agentloop.night import STEPS, Night, lines_of

Figures = dict[str, Any]

_BOOKKEEPING = ("inputs", "excluded_ids", "versions", "config")
_MOST_FIGURES = 100
"""Of one record: what is no record of ours could hold any number."""


def summary(night: Night) -> Figures:
    """The cycle in one line: its verdict, what came of it, accuracies on the gate's first suite, counts.

    None stands for what is not known: the step has not come, or its record cannot be read.
    """
    suite, subjects = judged(night)
    stopped = night.stopped
    return {
        "cycle_id": night.cycle_id,
        "verdict": _text(night.gate.get("verdict")),
        "result": _text(night.rollout.get("result")),
        "suite": suite,
        "champion": number(subjects.get("champion"), "accuracy"),
        "candidate": number(subjects.get("candidate"), "accuracy"),
        "model_version": model_version(night),
        "train": number(night.dataset, "train"),
        "new_train": number(night.dataset, "new_train"),
        "gate": number(night.dataset, "gate"),
        "seconds": round(night.seconds, 3),
        "stopped_at": stopped.name if stopped else None,
        "stopped_because": stopped.reason if stopped else None,
        "running": night.running,
        "erasures": len(night.erasures),
        "problems": list(night.problems),
    }


def model_version(night: Night) -> str | None:
    """The version that the cycle made and the gate judged; None without a verdict."""
    candidate = night.gate.get("candidate")
    return _text(candidate.get("model_version")) if isinstance(candidate, dict) else None


def steps(night: Night) -> list[Figures]:
    """Every step: how it went, when, its figures, and the path of what it made."""
    return [
        {
            "step": step.name,
            "title": step.title,
            "state": step.state,
            "reason": step.reason,
            "started_at": step.started_at.isoformat() if step.started_at else None,
            "seconds": step.seconds,
            "peak_memory_gb": step.peak_memory_gb,
            "figures": figures(night)[step.name],
            "output": str(output) if output.exists() else None,
        }
        for step in night.steps
        for output in (night.directory / STEPS[step.name][1],)
    ]


def figures(night: Night) -> dict[str, Figures]:
    """What each step counted and measured, flat: `{"curate": {"train": 192, "excluded.too_long": 1}}`."""
    records = {
        "freeze": night.snapshot,
        "validate": night.validation,
        "curate": night.dataset,
        "finetune": night.finetune,
        "quantize": night.quantize,
        "evaluate": night.summary,
        "gate": night.gate,
        "register": night.registry,
        "roll_out": night.rollout,
    }
    return {name: dict(islice(_flat(record), _MOST_FIGURES)) for name, record in records.items()}


def config(night: Night) -> Figures:
    """What the cycle was made with: the options of each step, and the versions that it ran on."""
    found: Figures = {}
    for name, record in (
        ("curate", night.dataset),
        ("finetune", night.finetune),
        ("quantize", night.quantize),
    ):
        inputs = record.get("inputs")
        options = inputs.get("options") if isinstance(inputs, dict) else None
        found |= {f"{name}.{key}": value for key, value in _flat(options or record.get("config") or {})}
    for name, note in night.notes.items():
        found |= {f"{name}.{key}": value for key, value in _flat(note.get("versions") or {})}
    return found


def checks(night: Night) -> dict[str, str]:
    """By check of the gate, how it came out, with its numbers in words."""
    found = {}
    for each in night.gate.get("checks") or ():
        if isinstance(each, dict):
            outcome = "holds" if each.get("holds") else "broken" if each.get("refuted") else "not shown"
            found[str(each.get("name"))] = f"{outcome}: {each.get('detail', '')}".removesuffix(": ")
    return found


def difference(one: Night, other: Night) -> Figures:
    """Two cycles side by side: `{"config": {name: [one, other]}, …}`, of what differs; examples as counts."""
    sides = [(config(night), _metrics(night), checks(night)) for night in (one, other)]
    parts = dict(zip(("config", "metrics", "checks"), map(_unlike, *sides), strict=True))
    return {
        "cycles": [one.cycle_id, other.cycle_id],
        "dataset": {name: _examples(one, other, name) for name in ("train", "gate")},
        **parts,
        "problems": {night.cycle_id: list(night.problems) for night in (one, other)},
    }


def number(record: Any, key: str) -> float | None:
    """A figure of a record, None where there is none."""
    value = record.get(key) if isinstance(record, Mapping) else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def inference_ids(path: Path) -> Iterator[str]:
    """The inferences of a dataset's train.jsonl or gate.jsonl; none where it is not there.

    Raises:
        OSError: if the file cannot be read.
    """
    for _, line in lines_of(path) if path.is_file() else ():
        if line is not None and isinstance(line.get("inference_id"), str):
            yield line["inference_id"]


def _examples(one: Night, other: Night, name: str) -> Figures:
    first, second = ({*inference_ids(each.directory / "dataset" / f"{name}.jsonl")} for each in (one, other))
    return {
        "count": [len(first), len(second)],
        "new": len(second - first),
        "removed": len(first - second),
        "same": len(first & second),
    }


def _metrics(night: Night) -> Figures:
    found = {"seconds": round(night.seconds, 3), "peak_memory_gb": night.peak_memory_gb}
    for step, values in figures(night).items():
        found |= {f"{step}.{key}": value for key, value in values.items()}
    return found


def _unlike(one: Figures, other: Figures) -> dict[str, list[Any]]:
    names = dict.fromkeys((*one, *other))
    return {name: [one.get(name), other.get(name)] for name in names if one.get(name) != other.get(name)}


def judged(night: Night) -> tuple[str | None, Mapping[str, Any]]:
    """The suite that the gate's first check judges, and each subject's figures on it."""
    told = night.gate.get("checks")
    first = told[0] if isinstance(told, list) and told else None
    suite = first.get("suite") if isinstance(first, dict) else None
    subjects = night.summary.get(suite) if isinstance(suite, str) else None
    return _text(suite), subjects if isinstance(subjects, dict) else {}


def _flat(record: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Single values, also of objects within; no lists, and nothing that only files need."""
    if not isinstance(record, Mapping):
        return
    for key, value in record.items():
        if isinstance(value, Mapping) and key not in _BOOKKEEPING:
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, str | int | float | bool) or value is None:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
