"""How the newest night went, for the metrics: what the small records of its cycle tell.

Only records of a night that has ended are read, each of bounded size, as a server must not stall over them;
`agentloop.night` reads everything, for people. A record that cannot be read counts as not there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = ("promoted", "rolled_back", "not_started", "held", "skipped", "stopped")
"""How a night can end. held: the gate kept the champion; skipped: there was nothing to learn; not_started,
stopped: somebody must look."""
STEPS = ("freeze", "validate", "curate", "finetune", "quantize", "evaluate", "gate", "register")
MAX_BYTES = 4 * 2**20
MAX_SCORES = 64
_CYCLE_ID = re.compile(r"\d{8}T\d{6}Z")
_SUBJECTS = ("candidate", "champion")


@dataclass(frozen=True, slots=True)
class LastNight:
    """The newest night that has ended. Times are Unix seconds; what no record tells is None, or left out."""

    cycle_id: str
    ended: float
    result: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: Mapping[str, float] = field(default_factory=dict)
    examples: float | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    tokens_per_second: float | None = None
    scores: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Suite and subject (candidate or champion): the share of its items that were right, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Nights:
    """The newest night that has ended, and when the gate last spoke; None where there is none."""

    last: LastNight | None = None
    judged: float | None = None


def nights(cycles_dir: Path) -> Nights:
    """What the cycles in a folder tell. A cycle that unlearned is no night: nothing of it was due.

    Raises:
        OSError: if the folder is there and cannot be read.
    """
    last, judged = None, None
    for cycle in sorted(cycles_dir.iterdir() if cycles_dir.is_dir() else (), reverse=True):
        if not _CYCLE_ID.fullmatch(cycle.name) or (cycle / "unlearn.json").exists():
            continue
        if judged is None:
            judged = _moment(_record(cycle / "gate.json").get("decided_at"))
        if last is None:
            last = _ended(cycle)
        if last is not None and judged is not None:
            break
    return Nights(last, judged)


def _ended(cycle: Path) -> LastNight | None:
    """The night of a cycle; None while its last step, the report, has not ended."""
    ended = _moment(_record(cycle / "steps" / "report.json").get("ended_at"))
    if ended is None:
        return None
    notes = {step: _record(cycle / "steps" / f"{step}.json") for step in STEPS}
    training = _record(cycle / "adapter" / "finetune.json")
    gate = _record(cycle / "gate.json")
    memory = _numbers(notes, "peak_memory_gb")
    return LastNight(
        cycle.name,
        ended,
        _result(cycle, notes, gate),
        seconds=_numbers(notes, "seconds"),
        peak_memory_bytes={step: round(gigabytes * 1e9) for step, gigabytes in memory.items()},
        examples=_number(training.get("examples")),
        loss_first=_number(training.get("loss_first")),
        loss_last=_number(training.get("loss_last")),
        tokens_per_second=_number(training.get("tokens_per_s")),
        scores=_scores(gate),
    )


def _result(cycle: Path, notes: Mapping[str, Mapping[str, Any]], gate: Mapping[str, Any]) -> str:
    rolled_out = _record(cycle / "rollout.json").get("result")
    if rolled_out in ("promoted", "rolled_back", "not_started"):
        return str(rolled_out)
    warm_up = (cycle / "snapshot" / "sets.json").exists()  # its dataset was made beforehand
    began = False
    for step in STEPS[3:] if warm_up else STEPS:
        outcome = notes[step].get("outcome")
        if outcome == "skipped":
            return "skipped"
        if outcome is None and began and not (cycle / "steps" / f".{step}.lock").exists():
            return "skipped"  # the step before ended well, and told the scheduler that it was the last
        if outcome != "done":
            return "stopped"  # it failed, or left no note: it was killed
        began = True
    return "held" if gate.get("verdict") in ("fail", "inconclusive") else "stopped"


def _scores(gate: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    scores: dict[tuple[str, str], float] = {}
    checks = gate.get("checks")
    for check in checks if isinstance(checks, list) else ():
        if not isinstance(check, dict) or check.get("against") != "champion":
            continue
        suite = str(check.get("suite", ""))[:64]
        for subject in _SUBJECTS:
            share = _number(check.get(subject))
            if share is not None and len(scores) < MAX_SCORES:
                scores[suite, subject] = share
    return scores


def _numbers(notes: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, float]:
    told = {step: _number(note.get(key)) for step, note in notes.items()}
    return {step: value for step, value in told.items() if value is not None}


def _number(value: Any) -> float | None:
    with suppress(OverflowError):
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    return None


def _moment(text: Any) -> float | None:
    """Unix seconds of a moment in ISO 8601; one without a zone is UTC."""
    with suppress(TypeError, ValueError, OverflowError):
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    return None


def _record(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size <= MAX_BYTES:
            value = json.loads(path.read_bytes())
            if isinstance(value, dict):
                return value
    return {}
