"""May the candidate serve? Judges a cycle's evaluation by the rules in configs/gate.yaml, writes gate.json.

Reads only files: evaluation/evaluation.json (who was asked) and evaluation/<suite>.jsonl (their answers).
A verdict, whichever it is, is the step's success, and advances the watermark of freezing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from training import cycle
from training.statistics import paired_difference, wilson

RULES = Path(__file__).parent / "configs" / "gate.yaml"

Verdict = Literal["pass", "fail", "inconclusive"]
Row = Mapping[str, Any]
Suites = Mapping[str, Sequence[Row]]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Check(_Data):
    name: str
    suite: str
    minimum_items: int = Field(ge=1)
    blocking: bool = True
    level: float | None = Field(default=None, gt=0, lt=1)
    """Confidence of its interval, where it is not that of all the others."""


class Superior(_Check):
    """The candidate's share of right answers is above that of `against`."""

    rule: Literal["superior"]
    against: Literal["champion", "base_constrained"]


class NotInferior(_Check):
    """The candidate's share of right answers is at most `margin` below that of `against`."""

    rule: Literal["not_inferior"]
    against: Literal["champion", "base_constrained"]
    margin: float = Field(ge=0, le=1)


class LengthShare(_Check):
    """At most `bound` of the candidate's answers are cut by max_tokens."""

    rule: Literal["length_share"]
    bound: float = Field(ge=0, le=1)


Check = Annotated[Superior | NotInferior | LengthShare, Field(discriminator="rule")]


class Rules(_Data):
    """What configs/gate.yaml holds."""

    level: float = Field(gt=0, lt=1)
    checks: tuple[Check, ...] = Field(min_length=1)


def read_rules(path: Path = RULES) -> Rules:
    """The rules in a YAML file.

    Raises:
        pydantic.ValidationError: naming each key that is missing, unknown or out of range.
    """
    return Rules.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def run(directory: Path, rules_file: Path = RULES) -> dict[str, Any]:
    """Write `<cycle>/gate.json`, unless it is there for the same evaluation and rules; return what it holds.

    Raises:
        FileNotFoundError: if the cycle has no evaluation.
    """
    evaluation = directory / "evaluation"
    subjects = cycle.read_json(evaluation / "evaluation.json")
    files = {path.name: path for path in sorted(evaluation.glob("*.jsonl"))}
    files["evaluation.json"] = evaluation / "evaluation.json"
    rules = read_rules(rules_file)
    inputs = cycle.inputs_of(files, rules.model_dump(mode="json"))
    output = directory / "gate.json"
    if not cycle.done(output, inputs):
        with cycle.step(directory, "gate", outputs=["gate.json"]):
            suites = {path.stem: read_rows(path) for path in sorted(evaluation.glob("*.jsonl"))}
            decided = judge(rules, suites, subjects["champion"], subjects["candidate"])
            decided |= {"decided_at": datetime.now(UTC).isoformat(), "inputs": inputs}
            cycle.write_json(output, decided)
    return cycle.read_json(output)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def judge(rules: Rules, suites: Suites, champion: Row, candidate: Row) -> dict[str, Any]:
    """The verdict, its reason in a sentence, who was judged, and every check with its numbers. Pure."""
    checks = [
        _checked(check, suites.get(check.suite, ()), check.level or rules.level) for check in rules.checks
    ]
    verdict, reason = _verdict(checks, champion, candidate)
    return {
        "verdict": verdict,
        "reason": reason,
        "champion": dict(champion),
        "candidate": dict(candidate),
        "level": rules.level,
        "checks": checks,
    }


def _verdict(checks: Sequence[Row], champion: Row, candidate: Row) -> tuple[Verdict, str]:
    blocking = [check for check in checks if check["blocking"]]
    if champion["sha256"] == candidate["sha256"]:
        return "inconclusive", "The candidate is the champion, byte for byte, so there is nothing to promote."
    refuted = [check for check in blocking if check["refuted"]]
    if refuted:
        return "fail", f"The candidate is rejected: {_listed(refuted)}."
    open_ = [check for check in blocking if not check["holds"]]
    if open_:
        return "inconclusive", f"Too little is shown either way, so the champion stays: {_listed(open_)}."
    return "pass", f"The candidate may serve: {_listed(blocking)}."


def _listed(checks: Sequence[Row]) -> str:
    return "; ".join(f"{check['name']}: {check['detail']}" for check in checks)


def _checked(check: Check, rows: Sequence[Row], level: float) -> dict[str, Any]:
    """One check with its numbers. Not `holds` and not `refuted` is open: the numbers show neither."""
    numbers = (
        _share_cut(check, rows, level) if isinstance(check, LengthShare) else _paired(check, rows, level)
    )
    return {
        "name": check.name,
        "suite": check.suite,
        "blocking": check.blocking,
        "n": 0,
        "champion": None,
        "candidate": None,
        "difference": None,
        "ci_low": None,
        "ci_high": None,
        "holds": False,
        "refuted": False,
        **numbers,
    }


def _paired(check: Superior | NotInferior, rows: Sequence[Row], level: float) -> dict[str, Any]:
    margin = check.margin if isinstance(check, NotInferior) else 0.0
    rule = f"candidate - {check.against}: the whole interval above {0.0 - margin:g}"
    base = {"rule": rule, "against": check.against}
    one, other = _by_item(rows, check.against), _by_item(rows, "candidate")
    if set(one) != set(other):
        return base | {"detail": f"{len(set(one) ^ set(other))} items were asked of only one of the two"}
    if len(one) < check.minimum_items:
        return base | {"n": len(one), "detail": _too_few(len(one), check)}
    items = sorted(one)
    found = paired_difference(
        [one[item]["correct"] for item in items],
        [other[item]["correct"] for item in items],
        [one[item]["session_id"] or item for item in items],
        level,
    )
    low, high = found.interval.low, found.interval.high
    return base | {
        "n": found.n,
        "effective_n": found.effective_n,
        "champion": found.first,
        "candidate": found.second,
        "difference": found.difference,
        "ci_low": low,
        "ci_high": high,
        "holds": low > -margin,
        "refuted": high < 0,
        "detail": f"{found.second:.3f} against {found.first:.3f} on {found.n} items of {check.suite}, "
        f"a difference of {found.difference:+.3f} ({level:.0%} interval {low:+.3f} to {high:+.3f})",
    }


def _share_cut(check: LengthShare, rows: Sequence[Row], level: float) -> dict[str, Any]:
    base = {"rule": f"share of the candidate's answers cut by max_tokens at most {check.bound:g}"}
    found = _by_item(rows, "candidate").values()
    if len(found) < check.minimum_items:
        return base | {"n": len(found), "detail": _too_few(len(found), check)}
    cut, champion = _cut(found), _by_item(rows, "champion").values()
    share, interval = cut / len(found), wilson(cut, len(found), level)
    return base | {
        "n": len(found),
        "champion": _cut(champion) / len(champion) if champion else None,
        "candidate": share,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "holds": share <= check.bound,
        "refuted": interval.low > check.bound,
        "detail": f"{cut} of {len(found)} answers are cut by max_tokens ({check.bound:.0%} may be)",
    }


def _by_item(rows: Sequence[Row], subject: str) -> dict[str, Row]:
    return {row["item_id"]: row for row in rows if row["subject"] == subject}


def _cut(rows: Any) -> int:
    return sum(row["finish_reason"] == "length" for row in rows)


def _too_few(n: int, check: _Check) -> str:
    return f"{n} items of {check.suite}, {check.minimum_items} needed"
