"""Is the canary's analysis honest? It judges rollouts of equal versions, and of ones known to be worse.

Each simulated rollout goes the whole way that `make rollout` goes by default: 1, 10, 25, 50 % and,
promoted, the watch, at 5 requests a second, with the rules and limits of `canary_analysis` and their part
of the whole chance (5 %). Times are log-normal (median 1 s, sigma 0.8, as one model's answers of mixed
length), and are seen through the server's own histogram. The champion fails 0.5 % of its requests, 5 % of
its answers are cut, and callers give an opinion on 10 % of answers, of which 10 % are negative.

`false_alarms_*` are the share of 1,000 rollouts of an equal version that were rolled back: by that
champion; by one whose answers are cut 60 % of the time, which is beyond the limit; by one that is slow and
uneven (median 6 s, sigma 1.2). The bound is Clopper and Pearson's, 95 %, one-sided. `missed_*` are the
share of 1,000 rollouts of a worse version that were promoted all the same, for good; `exposed_*` how many
requests it answered, on average, until it went back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.random import Generator

from benchmarks.bench_gate import upper
from benchmarks.line import Line
from grpc_server.metrics import DURATION_BUCKETS
from tests.ansible_modules import canary_analysis, judgement, metrics

ROLLOUTS = 1000
RATE = 5.0
"""Requests a second, of both versions together."""
SHARES = (1, 10, 25, 50)
BAKE, WATCH, POLL = 60.0, 300.0, 5.0
SIGNIFICANCE = 0.05
_BOUNDS = np.array([*DURATION_BUCKETS, np.inf])


@dataclass(frozen=True, slots=True)
class Version:
    """What a version does to its callers: shares of 0 to 1, seconds."""

    failed: float = 0.005
    cut: float = 0.05
    opinions: float = 0.1
    negative: float = 0.1
    median: float = 1.0
    sigma: float = 0.8

    def figures(self, requests: int, draw: Generator) -> Any:
        """Those of so many requests."""
        failed = int(draw.binomial(requests, self.failed))
        answered = requests - failed
        opinions = int(draw.binomial(answered, self.opinions))
        times = draw.lognormal(np.log(self.median), self.sigma, requests)
        up_to = np.searchsorted(np.sort(times), _BOUNDS, side="right")
        return metrics.Figures(
            requests=requests,
            failed=failed,
            answered=answered,
            cut=int(draw.binomial(answered, self.cut)),
            opinions=opinions,
            negative=int(draw.binomial(opinions, self.negative)),
            seconds=float(times.sum()),
            timed=requests,
            buckets=tuple(zip(_BOUNDS.tolist(), up_to.astype(float).tolist(), strict=True)),
        )


CHAMPION = Version()
EQUALS = {
    "usual": CHAMPION,
    "often_cut": replace(CHAMPION, cut=0.6),
    "slow_and_uneven": replace(CHAMPION, median=6.0, sigma=1.2),
}
WORSE = {
    "fails_10_percent": replace(CHAMPION, failed=0.1),
    "fails_5_percent": replace(CHAMPION, failed=0.05),
    "cut_25_percent": replace(CHAMPION, cut=0.25),
    "disliked_60_percent": replace(CHAMPION, negative=0.6),
    "twice_as_slow": replace(CHAMPION, median=2.0),
    "3_times_as_slow": replace(CHAMPION, median=3.0),
}
SEEN_FOR_SURE = ("fails_10_percent", "cut_25_percent", "3_times_as_slow")
"""Harm of which at most 5 % may be missed; the others inform: of opinions there are few."""


def added(one: Any, more: Any) -> Any:
    """Both figures together."""
    counts = {
        name: getattr(one, name) + getattr(more, name)
        for name in ("requests", "failed", "answered", "cut", "opinions", "negative", "seconds", "timed")
    }
    buckets = tuple((bound, a + b) for (bound, a), (_, b) in zip(one.buckets, more.buckets, strict=True))
    return metrics.Figures(**counts, buckets=buckets)


def step(share: int, stable: Version, canary: Version, draw: Generator) -> Iterator[tuple[Any, Any, bool]]:
    """Both versions' figures at each look from the minimum of requests on, and whether the time is over."""
    enough = judgement.Limits().min_requests / (RATE * min(share, 100 - share) / 100)
    now = POLL * np.ceil(enough / POLL)
    old, new = (
        version.figures(round(now * RATE * part / 100), draw)
        for version, part in ((stable, 100 - share), (canary, share))
    )
    while True:
        yield old, new, bool(now >= BAKE)
        now += POLL
        old = added(old, stable.figures(round(POLL * RATE * (100 - share) / 100), draw))
        new = added(new, canary.figures(round(POLL * RATE * share / 100), draw))


def beyond(old: Any, new: Any, limits: Any) -> bool:
    """Whether the analysis would end at this look, before its time; most looks need no test to see it."""
    shares = (
        (old.failed_share, new.failed_share, limits.error_share_limit),
        (old.cut_share, new.cut_share, limits.length_share_limit),
    )
    if not any(before <= limit < now for before, now, limit in shares):
        return False
    return bool(judgement.decide(old, new, limits).gross)


def rolled_out(stable: Version, canary: Version, draw: Generator) -> tuple[bool, int]:
    """Whether the canary was promoted for good, and how many requests it answered while it was tried."""
    limits = judgement.Limits(significance=SIGNIFICANCE / (judgement.CHECKS * (len(SHARES) + 1)))
    exposed, baseline = 0, None
    for share in SHARES:
        for old, new, over in step(share, stable, canary, draw):
            if over or beyond(old, new, limits):
                break
        exposed += new.requests
        decision = judgement.decide(old, new, limits)
        if decision.decision == "roll_back":
            return False, exposed
        baseline = old
    watched = replace(limits, min_requests=canary_analysis.WATCHED)
    new = canary.figures(round(POLL * RATE), draw)
    for _ in range(round(WATCH / POLL) - 1):
        if beyond(baseline, new, watched):
            break
        new = added(new, canary.figures(round(POLL * RATE), draw))
    decision = judgement.decide(baseline, new, watched)
    return decision.decision == "promote", exposed + new.requests


def measured(
    stable: Version, canary: Version, draw: Generator, rollouts: int = ROLLOUTS
) -> tuple[int, float]:
    """How many rollouts were promoted, and how many requests the canary answered on average."""
    ends = [rolled_out(stable, canary, draw) for _ in range(rollouts)]
    return sum(promoted for promoted, _ in ends), float(np.mean([exposed for _, exposed in ends]))


def run(rollouts: int = ROLLOUTS) -> Iterator[Line]:
    """Judge the rollouts, in this process, on one core; some minutes."""
    draw, peer = np.random.default_rng(2026), "declared"
    for name, version in EQUALS.items():
        promoted, _ = measured(version, version, draw, rollouts)
        alarms = rollouts - promoted
        yield Line("canary", f"false_alarms_{name}", alarms / rollouts, "share", peer, SIGNIFICANCE)
        bound, goal = upper(alarms, rollouts), f"<= {SIGNIFICANCE}"
        yield Line("canary", f"false_alarms_{name}_upper", bound, "share", peer, SIGNIFICANCE, goal)
    for name, version in WORSE.items():
        promoted, exposed = measured(CHAMPION, version, draw, rollouts)
        missed, goal = promoted / rollouts, "<= 0.05" if name in SEEN_FOR_SURE else ""
        yield Line("canary", f"missed_{name}", missed, "share", "", None, goal)
        yield Line("canary", f"exposed_{name}", exposed, "requests", "", None)
