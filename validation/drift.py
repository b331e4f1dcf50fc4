"""How far tonight's traffic has moved from that of the nights before.

A night keeps what was drawn of its accepted rows in `validation/profile.json`: counts, prompt lengths and
digests, no text and no ids. The reference is what the last accepted nights kept, each with the same weight a
row.

Two measures, both of size and not of significance:
- the population stability index, sum of (p - q) ln(p / q) over categories (Siddiqi, "Credit Risk Scorecards",
  2006): by its users' convention under 0.1 nothing has changed, over 0.25 much has;
- the Kolmogorov-Smirnov distance, the greatest difference of two distribution functions, from 0 to 1.

Few rows differ by chance alone, so a limit is never below what chance reaches once in a thousand nights: for
the index (B - 1 degrees of freedom) chi2(0.999) * (1/n + 1/m) (Yurdakul and Naranjo, "Statistical properties
of the population stability index", Journal of Risk Model Validation 14(4), 2020), for the distance
sqrt(-ln(0.001 / 2) / 2 * (n + m) / (n m)) (Smirnov, 1948). With many rows that falls to nothing, and the size
decides: a test of significance alone would alarm every night.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from validation.files import read_json, sha256
from validation.snapshot import is_cycle_id
from validation.suite import Drift, Reference

PROFILE = "profile.json"
CATEGORIES = ("language", "tool", "refusal", "feedback")
LENGTH = "prompt_length"

_CHANCE = 0.001
_COMMONEST = 20
_OTHER = "(other)"
_BINS = 10
_KEPT = 1000
# Added to each count: a category that one side has not seen would make the index infinite.
_PRIOR = 0.5


@dataclass(frozen=True, slots=True)
class Profile:
    """What was drawn: prompt lengths in characters, sorted, and how often each category was there."""

    lengths: Sequence[int]
    counts: Mapping[str, Counter[str]]

    def rows(self, of: str) -> int:
        """How many rows say something of it."""
        return len(self.lengths) if of == LENGTH else self.counts[of].total()


NOTHING = Profile([], {name: Counter() for name in CATEGORIES})
"""The profile of no rows."""


@dataclass(frozen=True, slots=True)
class Moved:
    """One measure of one thing: its value, the limit that chance allows for, and of how many rows.

    `not_judged` says why there is no value.
    """

    drift: Drift
    value: float = 0.0
    limit: float = 0.0
    rows: int = 0
    reference_rows: int = 0
    not_judged: str = ""


def profile_of(drawn: pa.Table) -> Profile:
    """The profile of rows that have the columns `draw.DRAWN`."""
    return Profile(
        sorted(drawn.column(LENGTH).drop_null().to_pylist()),
        {name: Counter(map(_name, drawn.column(name).drop_null().to_pylist())) for name in CATEGORIES},
    )


def to_plain(profile: Profile) -> dict[str, Any]:
    """A profile as `profile.json` holds it; of many tools the commonest."""
    return {
        LENGTH: list(profile.lengths),
        **{name: dict(profile.counts[name].most_common(_KEPT)) for name in CATEGORIES},
    }


def references(cycle: Path, nights: int) -> list[Path]:
    """The profiles of the last cycles before this one that were accepted, and judged; the oldest first.

    A cycle is judged when it has a verdict (gate.json): until then its rows come again.
    """
    found = []
    for other in cycle.parent.iterdir():
        profile = other / "validation" / PROFILE
        judged = is_cycle_id(other.name) and (other / "gate.json").is_file() and profile.is_file()
        if judged and other.name < cycle.name:
            found.append(profile)
    return sorted(found)[-nights:]


def merged(profiles: Iterable[Path]) -> Profile:
    """What some nights have drawn together; a profile that cannot be read is left out."""
    lengths: list[int] = []
    counts: dict[str, Counter[str]] = {name: Counter() for name in CATEGORIES}
    for path in profiles:
        try:
            read = _profile(read_json(path))
        except (AttributeError, OSError, KeyError, TypeError, ValueError):
            continue
        lengths += read.lengths
        for name in CATEGORIES:
            counts[name] += read.counts[name]
    return Profile(sorted(lengths), counts)


def digests(profiles: Iterable[Path]) -> dict[str, str]:
    """What the reference is made of: `{"<cycle>/validation/profile.json": sha256}`."""
    return {"/".join(path.parts[-3:]): sha256(path) for path in profiles}


def moved(now: Profile, before: Profile, drifts: Sequence[Drift], reference: Reference) -> list[Moved]:
    """Each of `drifts`, measured."""
    return [_moved(now, before, each, max(reference.least_rows, 1)) for each in drifts]


def _moved(now: Profile, before: Profile, drift: Drift, least_rows: int) -> Moved:
    rows, reference_rows = now.rows(drift.of), before.rows(drift.of)
    if reference_rows < least_rows:
        why = f"the nights before have {reference_rows} rows to compare with; {least_rows} are needed"
        return Moved(drift, rows=rows, reference_rows=reference_rows, not_judged=why)
    if rows < least_rows:
        why = f"tonight has {rows} rows of it; {least_rows} are needed"
        return Moved(drift, rows=rows, reference_rows=reference_rows, not_judged=why)
    if drift.measure == "ks":
        value, chance = ks(now.lengths, before.lengths)
    elif drift.of == LENGTH:
        value, chance = psi(*_binned(now.lengths, before.lengths))
    else:
        value, chance = psi(now.counts[drift.of], before.counts[drift.of])
    if drift.rises and _share(now.counts[drift.of]) <= _share(before.counts[drift.of]):
        value = 0.0
    limit = round(max(drift.above, chance), 4)
    return Moved(drift, round(value, 4), limit, rows, reference_rows)


def psi(now: Counter[str], before: Counter[str]) -> tuple[float, float]:
    """The population stability index of two counts, and what it reaches by chance.

    Categories are the 20 commonest of the reference; all others are one.
    """
    named = [name for name, _ in before.most_common(_COMMONEST)]
    pairs = [(now[name], before[name]) for name in named]
    others = (now.total() - sum(n for n, _ in pairs), before.total() - sum(m for _, m in pairs))
    if any(others):
        pairs.append(others)
    if len(pairs) < 2:
        return 0.0, 0.0
    n, m = (sum(column) + _PRIOR * len(pairs) for column in zip(*pairs, strict=True))
    shares = [((a + _PRIOR) / n, (b + _PRIOR) / m) for a, b in pairs]
    value = sum((p - q) * math.log(p / q) for p, q in shares)
    from scipy.stats import chi2  # half a second; the first nights do without

    return value, float(chi2.ppf(1 - _CHANCE, len(pairs) - 1)) * (1 / n + 1 / m)


def ks(now: Sequence[int], before: Sequence[int]) -> tuple[float, float]:
    """The Kolmogorov-Smirnov distance of two sorted samples, and what it reaches by chance."""
    n, m = len(now), len(before)
    distance = max(
        abs(bisect_right(now, value) / n - bisect_right(before, value) / m) for value in {*now, *before}
    )
    return distance, math.sqrt(-math.log(_CHANCE / 2) / 2 * (n + m) / (n * m))


def _binned(now: Sequence[int], before: Sequence[int]) -> tuple[Counter[str], Counter[str]]:
    """Both by the tenths of the reference."""
    edges = sorted({before[len(before) * tenth // _BINS] for tenth in range(1, _BINS)})

    def counted(lengths: Sequence[int]) -> Counter[str]:
        return Counter(str(bisect_right(edges, length)) for length in lengths)

    return counted(now), counted(before)


def _share(counts: Counter[str]) -> float:
    return counts["yes"] / max(counts.total(), 1)


def _name(value: bool | str) -> str:
    return value if isinstance(value, str) else "yes" if value else "no"


def _profile(plain: Mapping[str, Any]) -> Profile:
    return Profile(
        [int(length) for length in plain[LENGTH]],
        {name: Counter({str(key): int(count) for key, count in plain[name].items()}) for name in CATEGORIES},
    )
