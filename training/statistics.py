"""Intervals for shares, and for the difference of two shares measured on the same items. Pure functions.

Sources:
    Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22.
    Tango 1998, "Equivalence test and confidence interval for the difference in proportions for the
        paired-sample design", Statistics in Medicine 17. A score interval: it keeps its level on small
        samples, and where no item was gained or lost, where a bootstrap's interval has no width.
    Rao and Scott 1992, "A simple method for the analysis of clustered binary data", Biometrics 48: items of
        one session are not independent; counts are divided by the design effect.
    Fisher 1935, "The Design of Experiments", section 21: if nothing differs, the names of the two may be
        swapped in any session. The test that swaps them all ways is exact at any size; of sessions with one
        item it is McNemar's exact test.
    Holm 1979, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics
    6. Nam 1997, "Establishing equivalence of two treatments and sample size requirements in matched-pairs
        design", Biometrics 53; without a margin it is Connor 1987, Biometrics 43.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

LEVEL = 0.95
_BISECTIONS = 100


@dataclass(frozen=True, slots=True)
class Interval:
    """From `low` to `high`, both included."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Share of the second minus share of the first, on the same `n` items, with its interval.

    `effective_n` is how many independent items these `n`, in their clusters, are worth; `discordance` the
    share of items that one of the two has right and the other wrong. `p_value` is the chance of such a
    difference in favour of the second, or a greater one, if nothing differs: one-sided and exact.
    """

    n: int
    effective_n: float
    first: float
    second: float
    difference: float
    discordance: float
    interval: Interval
    p_value: float


def wilson(successes: float, n: float, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a share.

    Raises:
        ValueError: if `n` is not above 0, or `successes` not from 0 to `n`.
    """
    if not (n > 0 and 0 <= successes <= n):
        raise ValueError(f"successes are {successes} of {n}; they must be from 0 to a count above 0")
    z = _z(level)
    share = successes / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Interval(max(0.0, middle - reach), min(1.0, middle + reach))


def tango(gained: float, lost: float, n: float, level: float = LEVEL) -> Interval:
    """Tango's score interval of (gained - lost) / n.

    Args:
        gained: items that only the second has right.
        lost: items that only the first has right.
        n: all items.
        level: share of samples whose interval holds the true difference.

    Raises:
        ValueError: if `n` is not above 0, or the counts are not from 0 to `n` together.
    """
    if not (n > 0 and gained >= 0 and lost >= 0 and gained + lost <= n * (1 + 1e-9)):
        raise ValueError(f"gained {gained} and lost {lost} must be counts of {n} items")
    z = _z(level)
    estimate = (gained - lost) / n

    def score(difference: float) -> float:
        distance = gained - lost - n * difference
        variance = n * (2 * _lost_share(gained, lost, n, difference) + difference * (1 - difference))
        if variance <= 0:
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance / math.sqrt(variance)

    # The score falls as the difference grows: it is 0 at the estimate, z below it, -z above.
    low = _root(lambda difference: score(difference) - z, -1.0, estimate)
    high = _root(lambda difference: score(difference) + z, estimate, 1.0)
    return Interval(low, high)


def _lost_share(gained: float, lost: float, n: float, difference: float) -> float:
    """The likeliest share of lost items, if shares differ by `difference` (Tango 1998, section 2)."""
    b = (2 * n - gained + lost) * difference - gained - lost
    c = -lost * difference * (1 - difference)
    return max(0.0, (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n))


def _root(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses 0; the nearer end if it does not."""
    if falling(low) <= 0:
        return low
    if falling(high) >= 0:
        return high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if falling(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def paired_difference(
    first: Sequence[bool],
    second: Sequence[bool],
    clusters: Sequence[Hashable] | None = None,
    level: float = LEVEL,
) -> PairedDifference:
    """Share of `second` minus share of `first`, item by item; items of one cluster need not be independent.

    Raises:
        ValueError: if there is no item, or the sequences differ in length.
    """
    n = len(first)
    clusters = range(n) if clusters is None else clusters
    if n == 0 or len(second) != n or len(clusters) != n:
        raise ValueError(
            f"{n} results, {len(second)} to compare and {len(clusters)} clusters; all must be as many, not 0"
        )
    differences = [int(after) - int(before) for before, after in zip(first, second, strict=True)]
    effect = design_effect(differences, clusters)
    gained, lost = differences.count(1), differences.count(-1)
    return PairedDifference(
        n=n,
        effective_n=n / effect,
        first=sum(first) / n,
        second=sum(second) / n,
        difference=(gained - lost) / n,
        discordance=(gained + lost) / n,
        interval=tango(gained / effect, lost / effect, n / effect, level),
        p_value=swapped(differences, clusters),
    )


def design_effect(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """How many times the mean's variance grows as values of a cluster resemble each other; 1 or more.

    Where it cannot be estimated (one cluster, or all values equal), each cluster counts as one item.
    """
    n, sizes = len(values), Counter(clusters)
    as_one_item = sum(size**2 for size in sizes.values()) / n
    if as_one_item == 1:
        return 1.0
    mean = sum(values) / n
    spread = sum((value - mean) ** 2 for value in values) / n**2
    if len(sizes) == 1 or spread == 0:
        return as_one_item
    sums: defaultdict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    clustered = len(sizes) / (len(sizes) - 1) * sum(total**2 for total in sums.values()) / n**2
    return max(1.0, clustered / spread)


def swapped(differences: Sequence[int], clusters: Sequence[Hashable]) -> float:
    """Share of all ways to swap the two, cluster by cluster, in which the differences' sum is as great.

    It takes time as the square of how many items differ.
    """
    sums: Counter[Hashable] = Counter()
    for difference, cluster in zip(differences, clusters, strict=True):
        sums[cluster] += difference
    weights = [abs(total) for total in sums.values() if total]
    chances = [1.0]  # of each total of the clusters that are in the second's favour
    for weight in weights:
        nothing = [0.0] * weight
        chances = [(out + into) / 2 for out, into in zip(chances + nothing, nothing + chances, strict=True)]
    return min(1.0, math.fsum(chances[(sum(sums.values()) + sum(weights)) // 2 :]))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Each p-value as it is to be compared with the alpha of the whole family (Holm 1979)."""
    adjusted: dict[str, float] = {}
    least = 0.0
    for rank, (name, p_value) in enumerate(sorted(p_values.items(), key=lambda each: each[1])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_value))
        adjusted[name] = least
    return adjusted


def items_needed(
    difference: float, discordance: float, *, alpha: float, power: float, margin: float = 0.0
) -> float:
    """How many independent items would show, with `power`, that the second is above the first - `margin`.

    Infinite, if the `difference` is no more than -`margin`. One-sided `alpha`. Without a margin one more item
    for each that the difference is the inverse of, because the exact test goes by whole items.
    """
    gap = difference + margin
    if gap <= 0:
        return math.inf
    here = max(discordance, abs(difference))  # no fewer items differ than the difference says
    at_margin = max(discordance, margin) - margin**2
    spread = _z(1 - 2 * alpha) * math.sqrt(at_margin if margin else here) + _quantile(power) * math.sqrt(
        max(0.0, here - difference**2)
    )
    return (spread / gap) ** 2 + (0.0 if margin else 1 / gap)


def detectable(n: float, discordance: float, *, alpha: float, power: float) -> float | None:
    """The smallest difference that `n` independent items show with `power`; None if none would be shown."""
    if items_needed(1.0, discordance, alpha=alpha, power=power) > n:
        return None

    def lacking(difference: float) -> float:
        return items_needed(difference, discordance, alpha=alpha, power=power) - n

    return _root(lacking, 1e-6, 1.0)


def _z(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must be between 0 and 1")
    return _quantile((1 + level) / 2)


def _quantile(share: float) -> float:
    return NormalDist().inv_cdf(share)
