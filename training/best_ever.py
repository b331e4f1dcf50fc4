"""Who was ever best on a suite? Losses too small for one night's margin must not add up over many.

A version that has served was asked in earlier nights' evaluations, as champion and, before, as candidate. The
best is the one with the highest lower bound (Wilson's, 95 %) of its share of right answers over all items
of the suite that it was ever asked; of equals tonight's champion, then the latest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from training import cycle
from training.statistics import wilson

_ASKED_FREELY = ("champion", "candidate", "best_ever")


@dataclass(slots=True)
class Version:
    """A model version and its answers to a suite's items, right or wrong, over all nights."""

    model_version: str
    sha256: str
    served: bool = False
    right: dict[str, bool] = field(default_factory=dict)

    @property
    def at_least(self) -> float:
        """The lower bound of its share of right answers."""
        return wilson(sum(self.right.values()), len(self.right)).low if self.right else 0.0


def ranked(directory: Path, suite: str, champion: Mapping[str, str]) -> list[Version]:
    """Every version that has served, the best on `suite` first; `champion` is who serves tonight."""
    found: dict[str, Version] = {}
    for earlier in _earlier(directory):
        for row in _rows(earlier / "evaluation" / f"{suite}.jsonl"):
            sha256 = str(row["model_sha256"])
            version = found.setdefault(sha256, Version(str(row["model_version"]), sha256))
            version.served |= row["subject"] == "champion"
            version.right[str(row["item_id"])] = bool(row["correct"])
    now = found.setdefault(champion["sha256"], Version(champion["model_version"], champion["sha256"]))
    now.served = True
    order = {sha256: place for place, sha256 in enumerate(found)}
    return sorted(
        (version for version in found.values() if version.served),
        key=lambda version: (version.at_least, version is now, order[version.sha256]),
        reverse=True,
    )


def _earlier(directory: Path) -> list[Path]:
    try:
        return cycle.judged_before(directory)
    except ValueError:  # a cycle by hand, of no date
        return []


def _rows(path: Path) -> Iterable[Mapping[str, object]]:
    """The lines of an evaluation that say what a version answers when nothing holds it to a schema."""
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    row = json.loads(line)
                    if row["subject"] in _ASKED_FREELY:
                        yield row
