"""The metrics as `agent-loop top` reads them: what the server writes, and its quantiles."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentloop.cli_top import figures
from agentloop.errors import ConfigurationError
from agentloop.scrape import ScrapeError, parse, scrape
from grpc_server.domain.errors import QueueFull
from grpc_server.domain.types import (
    FinishReason,
    InferenceEnded,
    InferenceStarted,
    Status,
    TargetRole,
    Timings,
    Usage,
)
from grpc_server.metrics import Metrics

NOW = datetime(2026, 1, 2, tzinfo=UTC)
ID = UUID(int=7)


def answered(metrics: Metrics, ttft_ms: float, count: int = 1, status: Status = Status.OK) -> None:
    start = InferenceStarted(ID, "s", "c", "k", "default", "m:1", TargetRole.STABLE, "", {}, NOW)
    timings = Timings(0, ttft_ms, ttft_ms * 2)
    end = InferenceEnded(ID, status, FinishReason.STOP, {}, Usage(10, 5), timings, "", NOW)
    for _ in range(count):
        metrics.ended(start, end)


def test_what_the_server_counts_is_what_is_read() -> None:
    metrics = Metrics()
    answered(metrics, 50, 3)
    answered(metrics, 50, status=Status.CANCELLED)
    metrics.refused(QueueFull("full"))
    metrics.engine_is(True)
    found = figures(parse(metrics.text().decode()))
    assert found.requests == {"ok": 3, "cancelled": 1}
    assert found.refused == {"QueueFull": 1}
    assert found.tokens == {"input": 40, "output": 20}
    assert found.by_model == {"m:1": 4}
    assert (found.engine_up, found.store_up) == (True, False)
    assert (found.seconds, found.requests_per_second) == (None, None)
    assert found.first_token["p50_ms"] is not None
    assert 40 <= found.first_token["p50_ms"] <= 60
    assert found.duration["p95_ms"] is not None
    assert 80 <= found.duration["p95_ms"] <= 160


def test_between_two_looks_only_what_came_in_between_counts() -> None:
    metrics = Metrics()
    answered(metrics, 5000, 100)
    before = replace(parse(metrics.text().decode()), at=10.0)
    answered(metrics, 15, 10)
    now = replace(parse(metrics.text().decode()), at=15.0)
    found = figures(now, before)
    assert (found.seconds, found.requests_per_second, found.output_tokens_per_second) == (5, 2, 10)
    assert found.first_token["p99_ms"] is not None
    assert 10 <= found.first_token["p99_ms"] <= 20
    idle = figures(replace(now, at=20.0), now)
    assert (idle.requests_per_second, idle.first_token["p50_ms"]) == (0, None)


def test_a_server_that_was_restarted_has_no_negative_rate() -> None:
    metrics = Metrics()
    answered(metrics, 15, 10)
    before = parse(metrics.text().decode())
    found = figures(parse(Metrics().text().decode()), before)
    assert (found.requests_per_second, found.first_token["p50_ms"]) == (0, None)


def test_beyond_the_last_bucket_its_beginning_stands_for_the_value() -> None:
    text = 'x_bucket{le="1"} 1\nx_bucket{le="+Inf"} 4\n'
    found = parse(text)
    assert found.quantile("x", 0.99) == 1
    assert found.quantile("x", 0.25) == 1
    assert found.quantile("y", 0.5) is None


def test_labels_may_hold_what_they_like() -> None:
    found = parse('a{b="x\\"y\\\\z\\n}",c="{"} 1 1700000000\n# HELP a\n\na 2\n')
    assert found.by("a", "b") == {'x"y\\z\n}': 1, "": 2}
    assert found.total("a") == 3
    assert found.total("none") == 0


@pytest.mark.parametrize("text", ["<html>", "a", "a b", "\0", "{} 1"])
def test_what_is_no_metrics_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ScrapeError, match="no metrics"):
        parse(text)


@given(st.text())
def test_any_text_is_metrics_or_said_to_be_none(text: str) -> None:
    try:
        assert parse(text).quantile("x", 0.5) is None
    except ScrapeError as error:
        assert str(error)


@given(st.lists(st.floats(0.0, 30.0), min_size=1, max_size=50), st.sampled_from([0.5, 0.95, 0.99]))
def test_a_quantile_is_in_the_bucket_of_what_it_stands_for(values: list[float], share: float) -> None:
    metrics = Metrics()
    for value in values:
        answered(metrics, value * 1000)
    name = "gen_ai_server_time_to_first_token_seconds"
    found = parse(metrics.text().decode())
    bounds = [0.0, *sorted(float(bound) for bound in found.by(f"{name}_bucket", "le"))]
    exact = sorted(values)[math.ceil(share * len(values)) - 1]
    index = next(index for index, bound in enumerate(bounds) if index and bound >= exact)
    quantile = found.quantile(name, share)
    assert quantile is not None
    assert bounds[index - 1] <= quantile <= bounds[index] + 1e-9


def test_an_address_that_is_none_and_one_where_nobody_is_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="it must be host:port"):
        scrape("ftp://x")
    with pytest.raises(ConfigurationError, match="cannot be used for TLS"):
        scrape("https://127.0.0.1:1", tmp_path / "none.pem")
    for address in ("127.0.0.1:1", "http://127.0.0.1:1/", "http://[::1", "http://\n"):
        with pytest.raises(ScrapeError, match="no metrics from"):
            scrape(address)
