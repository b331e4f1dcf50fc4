"""What is expected of a snapshot, read from a reviewed YAML file (`suite.yaml`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from validation.features import FEATURES

SUITE = Path(__file__).with_name("suite.yaml")
GROUPS = ("contract", "integrity", "distribution", "safety")
_MEASURED = {
    "psi": ("prompt_length", "language", "tool", "refusal", "feedback"),
    "ks": ("prompt_length",),
}
_SHARES = ("refusal", "feedback")


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a snapshot, each "name: type", in order."""

    names: tuple[str, ...]
    says: str
    reason: str


@dataclass(frozen=True, slots=True)
class Rule:
    """What every row must be like: `feature` is 0. `counts`: whether breaking it is a fault of the log."""

    group: str
    rule: str
    feature: str
    says: str
    reason: str
    counts: bool = True


@dataclass(frozen=True, slots=True)
class Limit:
    """What the snapshot as a whole must be like: an expectation of Great Expectations, and its options."""

    group: str
    name: str
    expectation: str
    options: Mapping[str, Any]
    says: str
    reason: str
    blocks: bool = True


@dataclass(frozen=True, slots=True)
class Drift:
    """How far a distribution may move: `measure` of what `of` was drawn is at most `above`.

    `rises`: only a share that has grown counts. `blocks`: whether the snapshot is refused above it, or
    whoever reads the report is warned.
    """

    group: str
    name: str
    of: str
    measure: Literal["psi", "ks"]
    above: float
    says: str
    reason: str
    rises: bool = False
    blocks: bool = False


@dataclass(frozen=True, slots=True)
class Reference:
    """What drift is measured against: the last `nights` accepted ones; of each about `drawn_rows` at most.

    With fewer rows than `least_rows`, tonight or in the reference, drift is not judged.
    """

    nights: int
    drawn_rows: int
    least_rows: int
    reason: str


@dataclass(frozen=True, slots=True)
class Suite:
    """Everything that is expected of a snapshot."""

    columns: Columns
    rows: tuple[Rule, ...]
    snapshot: tuple[Limit, ...]
    reference: Reference
    drifts: tuple[Drift, ...]


def read_suite(path: Path = SUITE) -> Suite:
    """The suite in a YAML file.

    Raises:
        ValueError: if an entry has a field that is not known, lacks one, or judges nothing that is known.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        suite = _suite(data)
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no suite: {error}") from error
    _check(suite, path)
    return suite


def _suite(data: Mapping[str, Any]) -> Suite:
    if set(data) != set(GROUPS):
        raise ValueError(f"its groups are {', '.join(map(str, data))}; they must be {', '.join(GROUPS)}")
    contract, distribution = dict(data["contract"]), dict(data["distribution"])
    columns, reference = contract.pop("columns"), distribution.pop("reference")
    drifts = distribution.pop("drift")
    groups = {**data, "contract": contract, "distribution": distribution}
    rows: list[Rule] = []
    snapshot: list[Limit] = []
    for group in GROUPS:
        entries = dict(groups[group] or {})
        rows += [Rule(group=group, **each) for each in entries.pop("rows", ())]
        snapshot += [Limit(group=group, **each) for each in entries.pop("snapshot", ())]
        if entries:
            raise ValueError(f"{group} has {', '.join(entries)}, which is not known")
    return Suite(
        columns=Columns(tuple(columns.pop("names")), **columns),
        rows=tuple(rows),
        snapshot=tuple(snapshot),
        reference=Reference(**reference),
        drifts=tuple(Drift(group="distribution", **each) for each in drifts),
    )


def _check(suite: Suite, path: Path) -> None:
    for rule in suite.rows:
        if rule.feature not in FEATURES:
            raise ValueError(f"{path}: {rule.rule} judges {rule.feature!r}; known are {', '.join(FEATURES)}")
    for drift in suite.drifts:
        known = _MEASURED.get(drift.measure, ())
        if drift.of not in known or (drift.rises and drift.of not in _SHARES):
            raise ValueError(
                f"{path}: {drift.name} judges {drift.measure!r} of {drift.of!r}; known are"
                f" {'; '.join(f'{name} of ' + ', '.join(of) for name, of in _MEASURED.items())},"
                f" and `rises` of {' and '.join(_SHARES)}"
            )
    names = ["columns", *(each.rule for each in suite.rows)]
    names += [*(each.name for each in suite.snapshot), *(each.name for each in suite.drifts)]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"{path}: {', '.join(sorted(repeated))} stands in it more than once")
