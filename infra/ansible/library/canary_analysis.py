#!/usr/bin/python
"""Ansible module: decide, by each version's own figures over the same minutes, on a canary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ansible.module_utils.agentloop_metrics import Figures, Increase, Series, fetch, figures
from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: canary_analysis
short_description: Decide whether a canary is promoted or rolled back
description:
  - Scrapes a server's C(/metrics) again and again and compares what the canary and the stable version did in
    the same minutes. Only the growth of the counters during the analysis counts, not what came before.
  - The canary goes back if it fails more often, if its answers are more often cut by their length, or if it
    is slower; also if there are no figures, or too few requests at the time limit. Doubt is for the champion.
  - A share is held worse if it is above its absolute limit and above the stable version's share, or if it
    exceeds the stable version's by more than the margin and Fisher's exact test (one-sided) says that this is
    not chance. So one unlucky request among eight does not decide, and a small harm among thousands does.
  - The canary is held slower if its mean and its median both exceed the stable version's by the factor and
    the slack. The mean alone moves with one slow request, the median alone with the width of a bucket. With
    100 requests or more of each version the 95th percentile is held to the same limit.
  - Requests that their callers cancelled are neither failures nor part of the sample; the server does not
    time them, so that quick cancellations do not make a canary look fast. The same holds for requests that
    turn out to be wrong only at the engine, as with a prompt that the context does not hold.
version_added: "0.1.0"
options:
  metrics_url:
    description: Where the server's Prometheus metrics are.
    type: str
    required: true
  alias:
    description: The alias whose requests count.
    type: str
    default: default
  stable:
    description: The model version that serves now.
    type: str
    required: true
  canary:
    description: The model version on trial.
    type: str
    required: true
  min_requests:
    description: How many requests of each version a decision needs.
    type: int
    default: 50
  time_limit:
    description: Seconds after which too few requests mean back.
    type: int
    default: 1800
  poll_interval:
    description: Seconds between two scrapes.
    type: float
    default: 5
  error_share_limit:
    description: Share of failed requests (0 to 1) that is too much in itself.
    type: float
    default: 0.2
  error_share_margin:
    description: By how much the canary's share of failures may exceed the stable version's.
    type: float
    default: 0.02
  length_share_limit:
    description: Share of answers cut by their length (0 to 1) that is too much in itself.
    type: float
    default: 0.5
  length_share_margin:
    description: By how much the canary's share of cut answers may exceed the stable version's.
    type: float
    default: 0.05
  latency_factor:
    description: How many times the stable version's latency is tolerated.
    type: float
    default: 1.5
  latency_slack:
    description: Seconds that are tolerated on top, so that short answers are not judged by milliseconds.
    type: float
    default: 0.5
  significance:
    description: Below which probability of chance a difference of shares is believed.
    type: float
    default: 0.05
author:
  - agent-loop-service contributors
"""

EXAMPLES = r"""
- name: Decide on the canary
  canary_analysis:
    metrics_url: http://127.0.0.1:8080/metrics
    stable: gemma-3-270m:base
    canary: gemma-3-270m:20260101T020000Z
    min_requests: 50
    time_limit: 1800
  register: analysis
"""

RETURN = r"""
decision:
  description: C(promote) or C(roll_back).
  returned: always
  type: str
  sample: promote
reason:
  description: Why, in a sentence with the figures that decided.
  returned: always
  type: str
metrics:
  description: Figures of each version during the analysis; shares are 0 to 1.
  returned: always
  type: dict
  sample:
    stable: {requests: 61, error_share: 0.0, length_share: 0.02, latency_p50_ms: 410.0}
    canary: {requests: 57, error_share: 0.0, length_share: 0.0, latency_p50_ms: 380.0}
checks:
  description: Each comparison that was made, and whether it holds; empty if there were too few requests.
  returned: always
  type: list
  elements: dict
seconds:
  description: How long the analysis took.
  returned: always
  type: float
"""

# From how many requests of each version on a 95th percentile is more than its largest few values.
_TAIL_REQUESTS = 100


@dataclass(frozen=True, slots=True)
class Limits:
    """What a canary is held to; see the options' descriptions."""

    min_requests: int = 50
    error_share_limit: float = 0.2
    error_share_margin: float = 0.02
    length_share_limit: float = 0.5
    length_share_margin: float = 0.05
    latency_factor: float = 1.5
    latency_slack: float = 0.5
    significance: float = 0.05


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: shares are 0 to 1, latencies seconds.

    `chance` is the probability of such a difference by chance, where it was computed.
    """

    name: str
    stable: float
    canary: float
    holds: bool
    rule: str
    chance: float | None = None

    def __str__(self) -> str:
        show = "{:.1%}".format if self.name.endswith("share") else "{:.2f} s".format
        return f"{self.name.replace('_', ' ')} {show(self.canary)} (stable {show(self.stable)})"


@dataclass(frozen=True, slots=True)
class Decision:
    """`promote`, `roll_back`, or `wait` while there are too few requests; and why."""

    decision: str
    reason: str
    checks: tuple[Check, ...] = ()


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


def decide(stable: Figures, canary: Figures, limits: Limits) -> Decision:
    """What the figures say; `wait` until both versions have their minimum of requests."""
    missing = [
        f"{name} has {have.requests}"
        for name, have in (("stable", stable), ("canary", canary))
        if have.requests < limits.min_requests
    ]
    if missing:
        return Decision("wait", f"too few requests of {limits.min_requests}: {', '.join(missing)}")
    checks = (
        _share(
            "error_share",
            (stable.failed, stable.requests),
            (canary.failed, canary.requests),
            limits.error_share_limit,
            limits.error_share_margin,
            limits.significance,
        ),
        _share(
            "length_share",
            (stable.cut, stable.answered),
            (canary.cut, canary.answered),
            limits.length_share_limit,
            limits.length_share_margin,
            limits.significance,
        ),
        *_latency(stable, canary, limits),
    )
    broken = [check for check in checks if not check.holds]
    over = f"over {canary.requests} requests (stable: {stable.requests})"
    if broken:
        told = "; ".join(f"{check}, {check.rule}" for check in broken)
        return Decision("roll_back", f"the canary is worse {over}: {told}", checks)
    return Decision("promote", f"the canary is no worse {over}: {', '.join(map(str, checks))}", checks)


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
    too_large = now > limit and now > before
    worse = now - before > margin and chance < significance
    rule = f"where {limit:.0%} is the limit, and {margin:.0%} more unless by chance (here {chance:.3f})"
    return Check(name, before, now, not (too_large or worse), rule, chance)


def _latency(stable: Figures, canary: Figures, limits: Limits) -> list[Check]:
    """Mean and median together; the tail, where there is one."""
    rule = f"where {limits.latency_factor} times and {limits.latency_slack} s more is the limit"

    def slower(now: float, before: float) -> bool:
        return now > before * limits.latency_factor + limits.latency_slack

    mean, median = (stable.mean, canary.mean), (stable.quantile(0.5), canary.quantile(0.5))
    if None in mean or None in median:
        return [Check("latency", 0.0, 0.0, False, "since no request was timed")]
    mean_slower, median_slower = slower(mean[1], mean[0]), slower(median[1], median[0])
    holds = not (mean_slower and median_slower)
    checks = [
        Check("mean_latency", mean[0], mean[1], holds, rule),
        Check("median_latency", median[0], median[1], holds, rule),
    ]
    before, now = stable.quantile(0.95), canary.quantile(0.95)
    if min(stable.timed, canary.timed) >= _TAIL_REQUESTS and before is not None and now is not None:
        checks.append(Check("p95_latency", before, now, not slower(now, before), rule))
    return checks


@dataclass(frozen=True, slots=True)
class Outcome:
    """A decision with the figures that it was made on, and the seconds that it took."""

    decision: Decision
    stable: Figures
    canary: Figures
    seconds: float


def analyse(
    scrape: Callable[[], Mapping[Series, float]],
    *,
    alias: str,
    stable: str,
    canary: str,
    limits: Limits,
    time_limit: float,
    poll_interval: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Outcome:
    """Scrapes until the figures decide, or the time is up, which means back."""
    began, increase = clock(), Increase()
    while True:
        problem = ""
        try:
            increase.add(scrape())
        except (OSError, ValueError) as error:
            problem = f"no figures: {error}"
        before = figures(increase.total, alias, stable)
        now = figures(increase.total, alias, canary)
        decision = decide(before, now, limits)
        elapsed = clock() - began
        if not problem and decision.decision != "wait":
            return Outcome(decision, before, now, elapsed)
        if elapsed + poll_interval > time_limit:
            reason = f"{problem or decision.reason} after {elapsed:.0f} s"
            return Outcome(Decision("roll_back", reason), before, now, elapsed)
        sleep(poll_interval)


def main() -> None:
    """Runs the module."""
    share = {"type": "float"}
    defaults = asdict(Limits())
    module = AnsibleModule(
        argument_spec={
            "metrics_url": {"type": "str", "required": True},
            "alias": {"type": "str", "default": "default"},
            "stable": {"type": "str", "required": True},
            "canary": {"type": "str", "required": True},
            "min_requests": {"type": "int", "default": 50},
            "time_limit": {"type": "int", "default": 1800},
            "poll_interval": {"type": "float", "default": 5},
            **{name: share | {"default": defaults[name]} for name in defaults if name != "min_requests"},
        },
        supports_check_mode=True,
    )
    asked: dict[str, Any] = module.params
    if asked["stable"] == asked["canary"]:
        module.fail_json(msg=f"stable and canary are the same version, {asked['canary']}: nothing to compare")
    if asked["min_requests"] < 1 or asked["poll_interval"] <= 0:
        module.fail_json(msg="min_requests must be at least 1 and poll_interval above 0")
    outcome = analyse(
        lambda: fetch(asked["metrics_url"]),
        alias=asked["alias"],
        stable=asked["stable"],
        canary=asked["canary"],
        limits=Limits(**{name: asked[name] for name in defaults}),
        time_limit=asked["time_limit"],
        poll_interval=asked["poll_interval"],
    )
    module.exit_json(
        changed=False,
        decision=outcome.decision.decision,
        reason=outcome.decision.reason,
        checks=[asdict(check) for check in outcome.decision.checks],
        metrics={"stable": outcome.stable.plain(), "canary": outcome.canary.plain()},
        seconds=round(outcome.seconds, 1),
    )


if __name__ == "__main__":
    main()
