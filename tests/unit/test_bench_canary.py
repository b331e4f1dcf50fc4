"""The simulation of rollouts judges as the rollouts do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks import bench_canary
from benchmarks.bench_canary import CHAMPION, rolled_out


def test_simulated_figures_are_those_of_the_version() -> None:
    version = replace(CHAMPION, failed=1.0)
    made = version.figures(40, np.random.default_rng(1))
    assert (made.requests, made.failed, made.answered, made.cut, made.opinions) == (40, 40, 0, 0, 0)
    twice = bench_canary.added(made, made)
    assert (twice.requests, twice.timed, twice.buckets[-1][1]) == (80, 80, 80.0)
    assert twice.seconds == 2 * made.seconds


def test_a_version_that_only_fails_goes_back_from_its_first_step() -> None:
    promoted, exposed = rolled_out(CHAMPION, replace(CHAMPION, failed=1.0), np.random.default_rng(1))
    assert (promoted, exposed) == (False, 50)


def test_an_equal_version_goes_all_the_way() -> None:
    promoted, exposed = rolled_out(CHAMPION, CHAMPION, np.random.default_rng(1))
    assert promoted
    assert exposed > 1500


def test_every_scenario_has_its_lines() -> None:
    lines = list(bench_canary.run(rollouts=1))
    assert len(lines) == 2 * len(bench_canary.EQUALS) + 2 * len(bench_canary.WORSE)
    assert {line.metric for line in lines} >= {f"missed_{name}" for name in bench_canary.SEEN_FOR_SURE}
