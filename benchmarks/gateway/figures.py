"""Percentiles, what is added to them, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


def percentile(samples: Sequence[float], share: float) -> float:
    """The value that `share` (0 to 100) of the samples do not exceed, between neighbours if need be."""
    return float(np.percentile(samples, share))


def added(ours: Sequence[float], theirs: Sequence[float], share: float) -> tuple[float, float]:
    """The percentile of `ours` less that of `theirs`, and half the width of its 95 % bootstrap interval.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7; both sides
    are drawn anew, each by itself.
    """
    chance = np.random.default_rng(0)
    drawn = [
        np.percentile(chance.choice(side, (RESAMPLES, len(side))), share, axis=1) for side in (ours, theirs)
    ]
    low, high = np.quantile(drawn[0] - drawn[1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return percentile(ours, share) - percentile(theirs, share), float(high - low) / 2
