"""Whether a canary is worse than the version that serves, by figures of the same minutes. Pure functions.

Every comparison has two sides: a difference must matter (its margin), and must not be chance (its test). What
is expected of the tests by simulation is in docs/benchmarks.md, `canary`.
Standard library only: modules run with whatever Python the host has (3.11 or later).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ansible.module_utils.agentloop_metrics import Figures

CHECKS = 4
"""Tests that a step makes: failures, cut answers, negative feedback, latency (its tail is one more look)."""

# From how many requests of each version on a 95th percentile is more than its largest few values.
_TAIL_REQUESTS = 100
# Beyond a share's limit doubt is for the champion: a difference needs only to be more than an even chance's.
_LIMIT_CHANCE = 0.25


@dataclass(frozen=True, slots=True)
class Limits:
    """What a canary is held to; see the options' descriptions in canary_analysis."""

    min_requests: int = 50
    error_share_limit: float = 0.2
    error_share_margin: float = 0.02
    length_share_limit: float = 0.5
    length_share_margin: float = 0.05
    negative_share_margin: float = 0.05
    latency_factor: float = 1.5
    latency_slack: float = 0.5
    significance: float = 0.05


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: shares are 0 to 1, latencies seconds.

    `chance` is the probability of such a difference by chance; `gross`: so bad that nobody waits for more.
    """

    name: str
    stable: float
    canary: float
    holds: bool
    rule: str
    chance: float | None = None
    gross: bool = False

    def __str__(self) -> str:
        show = "{:.1%}".format if self.name.endswith("share") else "{:.2f} s".format
        return f"{self.name.replace('_', ' ')} {show(self.canary)} (stable {show(self.stable)})"


@dataclass(frozen=True, slots=True)
class Decision:
    """`promote`, `roll_back`, or `wait` while there are too few requests; and why."""

    decision: str
    reason: str
    checks: tuple[Check, ...] = ()

    @property
    def gross(self) -> bool:
        """Whether the canary goes back before its time is over."""
        return any(check.gross and not check.holds for check in self.checks)


def chance_of(bad: int, n: int, other_bad: int, other_n: int) -> float:
    """Probability of `bad` or more of `n` if both had the same share: Fisher's exact test, one-sided.

    R. A. Fisher, "On the interpretation of chi-squared from contingency tables", 1922.
    """
    total, marked = n + other_n, bad + other_bad

    def log_choose(of: int, k: int) -> float:
        return math.lgamma(of + 1) - math.lgamma(k + 1) - math.lgamma(of - k + 1)

    whole = log_choose(total, n)
    return min(
        1.0,
        math.fsum(
            math.exp(log_choose(marked, k) + log_choose(total - marked, n - k) - whole)
            for k in range(max(bad, n - (total - marked)), min(marked, n) + 1)
        ),
    )


def chance_of_slower(stable: Sequence[float], canary: Sequence[float]) -> float:
    """Probability that the canary's times are so much larger by chance: Mann and Whitney's U test, one-sided.

    H. B. Mann, D. R. Whitney, "On a test of whether one of two random variables is stochastically larger than
    the other", 1947; the normal approximation, corrected for ties (requests in one class of times are equal)
    and for continuity.

    Args:
        stable: how many requests of the stable version are in each class of times, from fast to slow.
        canary: the same for the canary.

    Returns:
        0 to 1; 1 where nothing can be told.
    """
    n, m = sum(canary), sum(stable)
    if not n or not m:
        return 1.0
    wins = below = ties = 0.0
    for slow, fast in zip(canary, stable, strict=True):
        wins += slow * (below + fast / 2)
        below += fast
        ties += (slow + fast) ** 3 - (slow + fast)
    variance = n * m / 12 * (n + m + 1 - ties / ((n + m) * (n + m - 1)))
    if variance <= 0:
        return 1.0
    z = (wins - n * m / 2 - 0.5) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2)) / 2


def decide(stable: Figures, canary: Figures, limits: Limits) -> Decision:
    """What the figures say; `wait` until both versions have their minimum of requests."""
    missing = [
        f"{name} has {have.requests}"
        for name, have in (("stable", stable), ("canary", canary))
        if have.requests < limits.min_requests
    ]
    if missing:
        return Decision("wait", f"too few requests of {limits.min_requests}: {', '.join(missing)}")
    checks = tuple(_checks(stable, canary, limits))
    broken = [check for check in checks if not check.holds]
    over = f"over {canary.requests} requests (stable: {stable.requests})"
    if broken:
        told = "; ".join(f"{check}, {check.rule}" for check in broken)
        return Decision("roll_back", f"the canary is worse {over}: {told}", checks)
    return Decision("promote", f"the canary is no worse {over}: {', '.join(map(str, checks))}", checks)


def _checks(stable: Figures, canary: Figures, limits: Limits) -> list[Check]:
    failed = _share(
        "error_share",
        (stable.failed, stable.requests),
        (canary.failed, canary.requests),
        limits.error_share_limit,
        limits.error_share_margin,
        limits.significance,
    )
    cut = _share(
        "length_share",
        (stable.cut, stable.answered),
        (canary.cut, canary.answered),
        limits.length_share_limit,
        limits.length_share_margin,
        limits.significance,
    )
    disliked = _share(
        "negative_feedback_share",
        (stable.negative, stable.opinions),
        (canary.negative, canary.opinions),
        1.0,  # opinions are few, and differ: no share of them is too much in itself
        limits.negative_share_margin,
        limits.significance,
    )
    heard = [disliked] if stable.opinions or canary.opinions else []
    return [failed, cut, *heard, *_latency(stable, canary, limits)]


def _share(
    name: str,
    stable: tuple[int, int],
    canary: tuple[int, int],
    limit: float,
    margin: float,
    significance: float,
) -> Check:
    """Holds unless the canary's share is too large in itself, or larger than chance explains."""
    before, now = (bad / n if n else 0.0 for bad, n in (stable, canary))
    chance = chance_of(*canary, *stable)
    too_large = before <= limit < now and chance < _LIMIT_CHANCE
    worse = now - before > margin and chance < significance
    rule = f"where {limit:.0%} is the limit, and {margin:.0%} more unless by chance (here {chance:.3f})"
    # Who looks often sees either share on either side of the limit: only what is no chance ends a step early.
    gross = too_large and chance < significance
    return Check(name, before, now, not (too_large or worse), rule, chance, gross)


def _latency(stable: Figures, canary: Figures, limits: Limits) -> list[Check]:
    """Mean and median together, where it is not chance; the tail, where there is one."""
    rule = f"where {limits.latency_factor} times and {limits.latency_slack} s more is the limit"

    def slower(now: float, before: float) -> bool:
        return now > before * limits.latency_factor + limits.latency_slack

    mean, median = (stable.mean, canary.mean), (stable.quantile(0.5), canary.quantile(0.5))
    if None in mean or None in median:
        return [Check("latency", 0.0, 0.0, False, "since no request was timed")]
    chance = chance_of_slower(*_classes(stable, canary))
    much = slower(mean[1], mean[0]) and slower(median[1], median[0])
    holds = not (much and chance < limits.significance)
    rule = f"{rule} unless by chance (here {chance:.3f})"
    checks = [
        Check("mean_latency", mean[0], mean[1], holds, rule, chance),
        Check("median_latency", median[0], median[1], holds, rule, chance),
    ]
    before, now = stable.quantile(0.95), canary.quantile(0.95)
    if min(stable.timed, canary.timed) >= _TAIL_REQUESTS and before is not None and now is not None:
        chance = chance_of(*_beyond(canary, before), *_beyond(stable, before))
        holds = not (slower(now, before) and chance < limits.significance)
        checks.append(Check("p95_latency", before, now, holds, rule, chance))
    return checks


def _classes(stable: Figures, canary: Figures) -> tuple[list[float], list[float]]:
    """How many requests each has in each class of times, over the bounds that either knows."""
    bounds = sorted({bound for one in (stable, canary) for bound, _ in one.buckets})

    def counts(one: Figures) -> list[float]:
        known, up_to = dict(one.buckets), [0.0]
        for bound in bounds:
            up_to.append(max(up_to[-1], known.get(bound, up_to[-1])))
        return [after - before for before, after in pairwise(up_to)]

    return counts(stable), counts(canary)


def _beyond(one: Figures, seconds: float) -> tuple[int, int]:
    """Of the timed requests those that surely took longer than `seconds`, and all of them."""
    last = one.buckets[-1][1]
    within = next((count for bound, count in one.buckets if bound >= seconds), last)
    return round(last - within), round(last)
