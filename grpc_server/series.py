"""A bound on how many series the figures have: those of a model version long unused are dropped."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, TypeVar

from prometheus_client import Counter, Histogram

VERSIONS = 64
"""Model versions whose figures are shown. A night makes one; an administrator may name any."""

Metric = TypeVar("Metric", Counter, Histogram)


class VersionSeries:
    """Gives out series by model version, and drops all of the version that was used longest ago."""

    def __init__(self, versions: int = VERSIONS) -> None:
        self._most = versions
        self._of_version: OrderedDict[str, set[tuple[Any, tuple[str, ...]]]] = OrderedDict()

    def of(self, metric: Metric, model_version: str, *labels: str) -> Metric:
        """The series of `metric` with these values of its labels."""
        used = self._of_version.setdefault(model_version, set())
        used.add((metric, labels))
        self._of_version.move_to_end(model_version)
        if len(self._of_version) > self._most:
            _, gone = self._of_version.popitem(last=False)
            for other, values in gone:
                other.remove(*values)
        return metric.labels(*labels)
