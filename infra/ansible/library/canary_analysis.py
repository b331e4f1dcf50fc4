#!/usr/bin/python
"""Ansible module: decide, by each version's own figures over the same minutes, on a canary."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ansible.module_utils.agentloop_judgement import Decision, Limits, decide
from ansible.module_utils.agentloop_metrics import Figures, Increase, figures
from ansible.module_utils.agentloop_sources import Scrape, prometheus, servers
from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: canary_analysis
short_description: Decide whether a canary is promoted or rolled back
description:
  - Reads the figures of model versions again and again, from I(prometheus_url), or where there is none from
    the servers' own I(metrics_url), and compares what the canary and the stable version did in the same
    minutes. Only the growth of the counters during the analysis counts, for both, not what came before.
  - The canary goes back if it fails more often, if its answers are more often cut by their length or called
    bad by their callers, or if it is slower; also if there are no figures, if a server is missing from them,
    or if there are too few requests at the time limit. Doubt is for the champion.
  - It decides once, when I(bake_seconds) are over and both versions have their minimum of requests; earlier
    only if a share is beyond its absolute limit.
  - A share is held worse if it is above its absolute limit and the stable version's is not (unless that is as
    likely as a coin's side twice), or if it exceeds the stable version's by more than the margin and Fisher's
    exact test (one-sided) says that this is not chance. So one unlucky request among eight does not decide,
    and a small harm among thousands does.
  - The canary is held slower if its mean and its median both exceed the stable version's by the factor and
    the slack, and Mann and Whitney's U test (one-sided, over the histogram's classes) says that this is not
    chance. The mean alone moves with one slow request, the median alone with the width of a bucket. With
    100 requests or more of each version the 95th percentile is held to the same limit, and Fisher's test is
    made on the requests beyond the stable version's.
  - With I(baseline) the candidate serves alone, after its promotion, and is watched for I(bake_seconds)
    against what the stable version did last. Then few requests mean that nothing speaks against it.
  - Requests that their callers cancelled are neither failures nor part of the sample; the server does not
    time them, so that quick cancellations do not make a canary look fast. The same holds for requests that
    turn out to be wrong only at the engine, as with a prompt that the context does not hold.
version_added: "0.1.0"
options:
  metrics_url:
    description: Where each server's own metrics are. Not read where I(prometheus_url) is given.
    type: list
    elements: str
    default: []
  prometheus_url:
    description: A Prometheus that scrapes all servers, as C(https://prometheus:9090); empty for none.
    type: str
    default: ""
  prometheus_selector:
    description: What picks the servers' series in it, as PromQL's labels.
    type: str
    default: job="agentloop"
  ca_file:
    description: PEM, the authority of these addresses' certificates, if not one of the host's.
    type: path
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
  bake_seconds:
    description: How long to look at least, though there are requests enough.
    type: float
    default: 0
  baseline:
    description: The stable version's C(figures) of an earlier analysis, to watch the promoted one against.
    type: dict
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
  negative_share_margin:
    description: By how much the canary's share of negative opinions may exceed the stable version's.
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
    description: Below which probability of chance a difference is believed, in each comparison.
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
    bake_seconds: 120
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
figures:
  description: The same as they were counted, for I(baseline).
  returned: always
  type: dict
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

WATCHED = 8
"""Requests of a promoted candidate below which nothing is said of it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A decision with the figures that it was made on, and the seconds that it took."""

    decision: Decision
    stable: Figures
    canary: Figures
    seconds: float


def analyse(
    scrape: Scrape,
    *,
    alias: str,
    stable: str,
    canary: str,
    limits: Limits,
    time_limit: float,
    poll_interval: float,
    bake_seconds: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Outcome:
    """Looks until the figures decide, or the time is up, which means back."""
    began, increase = clock(), Increase()
    while True:
        problem = _add(increase, scrape)
        before = figures(increase.total, alias, stable)
        now = figures(increase.total, alias, canary)
        decision = decide(before, now, limits)
        elapsed = clock() - began
        ripe = elapsed >= bake_seconds or decision.gross
        if not problem and decision.decision != "wait" and ripe:
            return Outcome(decision, before, now, elapsed)
        if elapsed + poll_interval > max(time_limit, bake_seconds + poll_interval):
            reason = f"{problem or decision.reason} after {elapsed:.0f} s"
            return Outcome(Decision("roll_back", reason), before, now, elapsed)
        sleep(poll_interval)


def watch(
    scrape: Scrape,
    *,
    alias: str,
    baseline: Figures,
    canary: str,
    limits: Limits,
    seconds: float,
    poll_interval: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Outcome:
    """Looks at a candidate that serves alone; back if it is worse than `baseline`, or without figures."""
    began, increase = clock(), Increase()
    limits = replace(limits, min_requests=min(limits.min_requests, WATCHED))
    while True:
        problem = _add(increase, scrape)
        now = figures(increase.total, alias, canary)
        decision = decide(baseline, now, limits)
        elapsed = clock() - began
        if elapsed >= seconds or (decision.gross and not problem):
            if problem:
                decision = Decision("roll_back", f"{problem} after {elapsed:.0f} s")
            elif decision.decision == "wait":
                decision = Decision("promote", f"nothing speaks against it: {decision.reason}")
            return Outcome(decision, baseline, now, elapsed)
        sleep(poll_interval)


def _add(increase: Increase, scrape: Scrape) -> str:
    """Take one more look; what was wrong with it."""
    try:
        increase.add(scrape())
    except (OSError, ValueError) as error:
        return f"no figures: {error}"
    return ""


def counted(version: Figures) -> dict[str, Any]:
    """For JSON, which has no infinity."""
    return {**asdict(version), "buckets": [[str(bound), count] for bound, count in version.buckets]}


def judged(asked: dict[str, Any]) -> Outcome:
    """What the module's options ask for.

    Raises:
        ValueError: an option makes no sense; it is named.
    """
    if asked["stable"] == asked["canary"]:
        raise ValueError(f"stable and canary are the same version, {asked['canary']}: nothing to compare")
    if asked["min_requests"] < 1 or asked["poll_interval"] <= 0:
        raise ValueError("min_requests must be at least 1 and poll_interval above 0")
    if not asked["prometheus_url"] and not asked["metrics_url"]:
        raise ValueError("neither prometheus_url nor metrics_url is given; name where the figures are")
    if asked["prometheus_url"]:
        scrape = prometheus(asked["prometheus_url"], asked["prometheus_selector"], asked["ca_file"])
    else:
        scrape = servers(asked["metrics_url"], asked["ca_file"])
    limits = Limits(**{name: asked[name] for name in asdict(Limits())})
    if asked["baseline"] is not None:
        return watch(
            scrape,
            alias=asked["alias"],
            baseline=Figures.of(asked["baseline"]),
            canary=asked["canary"],
            limits=limits,
            seconds=asked["bake_seconds"],
            poll_interval=asked["poll_interval"],
        )
    return analyse(
        scrape,
        alias=asked["alias"],
        stable=asked["stable"],
        canary=asked["canary"],
        limits=limits,
        time_limit=asked["time_limit"],
        poll_interval=asked["poll_interval"],
        bake_seconds=asked["bake_seconds"],
    )


def main() -> None:
    """Runs the module."""
    share = {"type": "float"}
    defaults = asdict(Limits())
    module = AnsibleModule(
        argument_spec={
            "metrics_url": {"type": "list", "elements": "str", "default": []},
            "prometheus_url": {"type": "str", "default": ""},
            "prometheus_selector": {"type": "str", "default": 'job="agentloop"'},
            "ca_file": {"type": "path"},
            "alias": {"type": "str", "default": "default"},
            "stable": {"type": "str", "required": True},
            "canary": {"type": "str", "required": True},
            "min_requests": {"type": "int", "default": 50},
            "time_limit": {"type": "int", "default": 1800},
            "poll_interval": {"type": "float", "default": 5},
            "bake_seconds": {"type": "float", "default": 0},
            "baseline": {"type": "dict"},
            **{name: share | {"default": defaults[name]} for name in defaults if name != "min_requests"},
        },
        supports_check_mode=True,
    )
    try:
        outcome = judged(module.params)
    except ValueError as error:
        module.fail_json(msg=str(error))
    module.exit_json(
        changed=False,
        decision=outcome.decision.decision,
        reason=outcome.decision.reason,
        checks=[asdict(check) for check in outcome.decision.checks],
        metrics={"stable": outcome.stable.plain(), "canary": outcome.canary.plain()},
        figures={"stable": counted(outcome.stable), "canary": counted(outcome.canary)},
        seconds=round(outcome.seconds, 1),
    )


if __name__ == "__main__":
    main()
