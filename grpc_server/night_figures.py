"""How the nights go, among a server's metrics: read again every minute, in a thread of its own.

The cycles may lie on storage that hangs: then the figures stay as they were, and nothing else waits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry

from grpc_server.adapters.nights import RESULTS, LastNight, Nights, nights
from grpc_server.background import in_rounds

EVERY_SECONDS = 60.0

_log = logging.getLogger(__name__)


class NightFigures(Collector):
    """Shows what was read last; nothing before there was a night."""

    def __init__(self, cycles_dir: Path, registry: CollectorRegistry) -> None:
        self._cycles_dir = cycles_dir
        self._found = Nights()
        registry.register(self)

    def running(self) -> AbstractAsyncContextManager[None]:
        """Reads while the block runs."""
        return in_rounds(self.round, "nights")

    def round(self) -> float:
        """Read once; seconds until the next time. Raises nothing."""
        try:
            self._found = nights(self._cycles_dir)
        except OSError as error:
            _log.warning("the cycles were not read", extra={"error": str(error)})
        return EVERY_SECONDS

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Every figure, at a scrape."""
        found = self._found
        if found.judged is not None:
            yield _gauge(
                "agentloop_night_judged_timestamp_seconds", "When the gate last spoke.", found.judged
            )
        if found.last is not None:
            yield from _of(found.last)


def _of(night: LastNight) -> Iterator[GaugeMetricFamily]:
    yield _gauge("agentloop_night_ended_timestamp_seconds", "When the newest night ended.", night.ended)
    single = (
        ("agentloop_night_examples", "Examples that it trained on.", night.examples),
        ("agentloop_night_training_tokens_per_second", "How fast it trained.", night.tokens_per_second),
    )
    for name, about, value in single:
        if value is not None:
            yield _gauge(name, about, value)
    result = GaugeMetricFamily("agentloop_night_result", "1 for how it ended.", labels=("result",))
    for each in RESULTS:
        result.add_metric((each,), float(each == night.result))
    yield result
    losses = {"first": night.loss_first, "last": night.loss_last}
    loss = GaugeMetricFamily("agentloop_night_loss", "Loss of its first and last step.", labels=("step",))
    for step, value in losses.items():
        if value is not None:
            loss.add_metric((step,), value)
    yield loss
    for name, about, values in (
        ("agentloop_night_step_seconds", "How long its steps took.", night.seconds),
        ("agentloop_night_step_peak_memory_bytes", "The most its steps had.", night.peak_memory_bytes),
    ):
        family = GaugeMetricFamily(name, about, labels=("step",))
        for step, value in values.items():
            family.add_metric((step,), value)
        yield family
    score = GaugeMetricFamily(
        "agentloop_night_score", "Share of a suite's items that were right.", labels=("suite", "subject")
    )
    for (suite, subject), value in night.scores.items():
        score.add_metric((suite, subject), value)
    yield score


def _gauge(name: str, about: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, about, value=value)
