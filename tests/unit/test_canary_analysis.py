"""What makes a canary go back, and what does not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from scipy.stats import fisher_exact, mannwhitneyu

from tests.ansible_modules import canary_analysis, judgement, metrics, sources
from tests.module_run import run_module

Figures, Limits, Increase = metrics.Figures, judgement.Limits, metrics.Increase
LIMITS = Limits(min_requests=8)
BOUNDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, math.inf)


def figures(requests: int = 8, *, failed: int = 0, cut: int = 0, seconds: list[float] | None = None) -> Any:
    """Figures of `requests` requests of which each took the next of `seconds` (0.5 each if not given)."""
    took = seconds or [0.5] * requests
    counts = [
        sum(low < each <= high for each in took) for low, high in zip((0.0, *BOUNDS), BOUNDS, strict=False)
    ]
    return Figures(
        requests=requests,
        failed=failed,
        answered=requests - failed,
        cut=cut,
        seconds=sum(took),
        timed=len(took),
        buckets=tuple(zip(BOUNDS, map(float, accumulate(counts)), strict=True)),
    )


def with_opinions(opinions: int, negative: int, requests: int = 50) -> Any:
    return replace(figures(requests), opinions=opinions, negative=negative)


def decision(stable: Any, canary: Any, limits: Any = LIMITS) -> str:
    return str(canary_analysis.decide(stable, canary, limits).decision)


def broken(stable: Any, canary: Any) -> list[str]:
    decided = canary_analysis.decide(stable, canary, LIMITS)
    return [check.name for check in decided.checks if not check.holds]


def test_an_equal_canary_is_promoted() -> None:
    decided = canary_analysis.decide(figures(), figures(), LIMITS)
    assert decided.decision == "promote"
    assert "no worse over 8 requests (stable: 8)" in decided.reason
    assert "error share 0.0% (stable 0.0%)" in decided.reason


@pytest.mark.parametrize(("stable", "canary"), [(0, 0), (7, 8), (8, 7), (500, 7)])
def test_too_few_requests_of_either_version_decide_nothing(stable: int, canary: int) -> None:
    assert decision(figures(stable), figures(canary)) == "wait"


def test_one_unlucky_request_among_eight_does_not_decide() -> None:
    assert decision(figures(), figures(failed=1)) == "promote"
    assert decision(figures(), figures(cut=1)) == "promote"


def test_a_quarter_of_failures_is_too_much_if_the_champion_has_none() -> None:
    assert broken(figures(), figures(failed=2)) == ["error_share"]


def test_failures_that_the_champion_has_too_are_not_the_canarys() -> None:
    assert decision(figures(20, failed=10), figures(20, failed=9)) == "promote"


def test_a_small_harm_among_thousands_decides() -> None:
    assert broken(figures(5000, failed=50), figures(5000, failed=200)) == ["error_share"]


def test_a_significant_difference_within_the_margin_does_not_decide() -> None:
    assert decision(figures(20000, failed=100), figures(20000, failed=200)) == "promote"


def test_a_difference_that_chance_explains_does_not_decide() -> None:
    assert decision(figures(20, failed=1), figures(20, failed=3)) == "promote"


def test_a_candidate_that_never_stops_goes_back() -> None:
    decided = canary_analysis.decide(figures(10, cut=1), figures(9, cut=9), LIMITS)
    assert decided.decision == "roll_back"
    assert "length share 100.0% (stable 10.0%)" in decided.reason


def test_versions_that_are_both_cut_more_often_than_the_limit_are_told_apart_by_chance_alone() -> None:
    assert decision(figures(20, cut=12), figures(20, cut=13)) == "promote"
    assert decision(figures(20, cut=12), figures(20, cut=20)) == "roll_back"


def test_callers_who_call_more_of_its_answers_bad_bring_a_canary_down() -> None:
    assert broken(with_opinions(30, 2), with_opinions(30, 12)) == ["negative_feedback_share"]
    assert broken(with_opinions(0, 0), with_opinions(1, 1)) == []
    assert broken(with_opinions(30, 30), with_opinions(2, 2)) == []
    decided = canary_analysis.decide(with_opinions(30, 3), with_opinions(30, 3), LIMITS)
    assert "negative feedback share 10.0% (stable 10.0%)" in decided.reason


def test_what_nobody_gave_an_opinion_on_is_not_judged_by_it() -> None:
    assert "negative" not in canary_analysis.decide(figures(), figures(), LIMITS).reason


def test_a_candidate_that_is_cut_less_often_than_its_champion_is_promoted() -> None:
    assert decision(figures(10, cut=10), figures(10, cut=7)) == "promote"


def test_a_canary_that_only_failed_goes_back_though_it_was_never_cut() -> None:
    assert broken(figures(), figures(failed=8)) == ["error_share"]


def test_one_slow_request_does_not_decide() -> None:
    assert decision(figures(), figures(seconds=[0.5] * 7 + [60.0])) == "promote"


def test_a_canary_that_is_slow_throughout_goes_back() -> None:
    assert broken(figures(), figures(seconds=[2.0] * 8)) == ["mean_latency", "median_latency"]


def test_a_canary_that_answers_shorter_and_so_faster_is_promoted() -> None:
    assert decision(figures(seconds=[3.0] * 8), figures(seconds=[0.2] * 8)) == "promote"


def test_milliseconds_more_do_not_decide() -> None:
    assert decision(figures(seconds=[0.02] * 8), figures(seconds=[0.3] * 8)) == "promote"


def test_the_tail_counts_only_where_there_is_one() -> None:
    slow_tail = [0.5] * 90 + [9.0] * 10
    assert broken(figures(100), figures(100, seconds=slow_tail)) == ["p95_latency"]
    assert decision(figures(99), figures(99, seconds=slow_tail[1:])) == "promote"


def test_requests_that_were_never_timed_are_no_figures() -> None:
    assert broken(figures(), replace(figures(), timed=0, buckets=())) == ["latency"]


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 40), st.integers(1, 40))
def test_the_chance_is_fishers(bad: int, other_bad: int, n: int, other_n: int) -> None:
    bad, other_bad = min(bad, n), min(other_bad, other_n)
    table = [[bad, n - bad], [other_bad, other_n - other_bad]]
    expected = fisher_exact(table, alternative="greater").pvalue
    assert judgement.chance_of(bad, n, other_bad, other_n) == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=12))
def test_the_chance_of_slower_times_is_mann_and_whitneys(classes: list[tuple[int, int]]) -> None:
    stable, canary = [one for one, _ in classes], [other for _, other in classes]
    fast = [place for place, count in enumerate(stable) for _ in range(count)]
    slow = [place for place, count in enumerate(canary) for _ in range(count)]
    ours = judgement.chance_of_slower(stable, canary)
    if len({*fast, *slow}) < 2 or not fast or not slow:
        assert ours == 1.0
    else:
        theirs = mannwhitneyu(slow, fast, alternative="greater", method="asymptotic", use_continuity=True)
        assert ours == pytest.approx(theirs.pvalue, abs=1e-9)


def test_times_that_are_slower_only_by_chance_do_not_decide() -> None:
    canary = figures(9, seconds=[0.3] * 4 + [40.0] * 5)
    assert broken(figures(9, seconds=[0.3] * 5 + [20.0] * 4), canary) == []
    assert broken(figures(9, seconds=[0.3] * 9), canary) == ["mean_latency", "median_latency"]


def test_versions_whose_histograms_have_other_classes_are_compared_all_the_same() -> None:
    stable = replace(figures(8), buckets=((0.5, 8.0), (math.inf, 8.0)))
    assert decision(stable, figures(8)) == "promote"
    assert broken(stable, figures(seconds=[9.0] * 8)) == ["mean_latency", "median_latency"]


@given(st.integers(8, 60), st.integers(8, 60), st.data())
def test_more_failures_never_turn_a_rollback_into_a_promotion(
    n: int, other_n: int, data: st.DataObject
) -> None:
    failed = data.draw(st.integers(0, n - 1))
    stable = figures(other_n, failed=data.draw(st.integers(0, other_n)))
    if decision(stable, figures(n, failed=failed)) == "roll_back":
        assert decision(stable, figures(n, failed=failed + 1)) == "roll_back"


def test_quantiles_are_prometheus_own() -> None:
    some = Figures(buckets=((1.0, 2.0), (2.0, 2.0), (4.0, 6.0), (math.inf, 8.0)))
    assert some.quantile(0.25) == 1.0
    assert some.quantile(0.5) == 3.0
    assert some.quantile(0.99) == 4.0  # beyond the last finite bound: that bound
    assert Figures().quantile(0.5) is None
    assert Figures().mean is None
    assert Figures().plain()["latency_mean_ms"] is None


# What the analysis makes of scrapes.


class Server:
    """A server's real counters, scraped as text."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        names = ("alias", "model_version", "target_role", "status", "finish_reason", "error_type")
        self.ended = Counter("agentloop_inferences", "x", names, registry=self.registry)
        models = ("gen_ai_request_model", "gen_ai_response_model")
        said = ("alias", "model_version", "target_role", "opinion")
        self.feedback = Counter("agentloop_feedback", "x", said, registry=self.registry)
        self.duration = Histogram(
            "gen_ai_server_request_duration_seconds", "x", models, buckets=BOUNDS, registry=self.registry
        )
        kinds = ("gen_ai_response_model", "gen_ai_token_type")
        self.tokens = Histogram("gen_ai_client_token_usage", "x", kinds, registry=self.registry)

    def answer(
        self,
        version: str,
        role: str = "stable",
        status: str = "ok",
        reason: str = "stop",
        *,
        alias: str = "default",
        seconds: float = 0.5,
        error: str = "",
    ) -> None:
        self.ended.labels(alias, version, role, status, reason if status == "ok" else "", error).inc()
        if status != "cancelled" and error != "InvalidArgument":
            self.duration.labels(alias, version).observe(seconds)
        self.tokens.labels(version, "output").observe(7)

    def scrape(self) -> Any:
        return metrics.parse(generate_latest(self.registry).decode())


Scrapes = Iterator[Any] | Callable[[], Any]


def looking(scrapes: Scrapes) -> dict[str, Any]:
    """What an analysis looks with, whose clock moves only when it sleeps."""
    now = [0.0]

    def scrape() -> Any:
        got = scrapes() if callable(scrapes) else next(scrapes)
        if isinstance(got, Exception):
            raise got
        return got

    return {
        "scrape": scrape,
        "alias": "default",
        "canary": "m:new",
        "limits": LIMITS,
        "poll_interval": 5,
        "clock": lambda: now[0],
        "sleep": lambda seconds: now.__setitem__(0, now[0] + seconds),
    }


def analyse(scrapes: Scrapes, time_limit: float = 20, bake_seconds: float = 0) -> Any:
    return canary_analysis.analyse(
        **looking(scrapes), stable="m:old", time_limit=time_limit, bake_seconds=bake_seconds
    )


def watched(scrapes: Scrapes, baseline: Any) -> Any:
    return canary_analysis.watch(**looking(scrapes), baseline=baseline, seconds=20)


def traffic(server: Server, canary: Callable[[], None], count: int = 8) -> Iterator[Any]:
    """Scrapes with `count` requests of each version between the first two."""
    yield server.scrape()
    for _ in range(count):
        server.answer("m:old")
        canary()
    while True:
        yield server.scrape()


def test_only_what_happens_during_the_analysis_counts() -> None:
    server = Server()
    for _ in range(100):
        server.answer("m:old", status="error")
        server.answer("m:new", "canary", status="error")
    outcome = analyse(traffic(server, lambda: server.answer("m:new", "canary")))
    assert outcome.decision.decision == "promote"
    assert (outcome.stable.requests, outcome.canary.requests, outcome.canary.failed) == (8, 8, 0)
    assert outcome.seconds == 5


def test_each_version_is_judged_by_its_own_figures() -> None:
    server = Server()
    outcome = analyse(traffic(server, lambda: server.answer("m:new", "canary", reason="length", seconds=0.3)))
    assert outcome.decision.decision == "roll_back"
    assert outcome.canary.plain() == {
        "requests": 8,
        "failed": 0,
        "cancelled": 0,
        "mistaken": 0,
        "cut_by_length": 8,
        "error_share": 0.0,
        "length_share": 1.0,
        "opinions": 0,
        "negative_share": 0.0,
        "latency_mean_ms": 300.0,
        "latency_p50_ms": 240.0,
        "latency_p95_ms": 312.0,
        "output_tokens": 56,
    }
    assert outcome.stable.plain()["length_share"] == 0.0


def test_deadlines_are_failures_and_cancelled_requests_are_not_even_requests() -> None:
    server = Server()
    outcome = analyse(traffic(server, lambda: server.answer("m:new", "canary", "deadline")))
    assert outcome.decision.decision == "roll_back"
    outcome = analyse(traffic(server, lambda: server.answer("m:new", "canary", "cancelled")))
    assert outcome.decision.reason == "too few requests of 8: canary has 0 after 20 s"
    assert outcome.canary.cancelled == 8
    assert outcome.canary.timed == 0


def test_a_caller_whose_prompts_are_too_long_does_not_bring_a_good_canary_down() -> None:
    server = Server()

    def both() -> None:
        server.answer("m:new", "canary")
        for _ in range(5):
            server.answer("m:new", "canary", "error", error="InvalidArgument")

    outcome = analyse(traffic(server, both))
    assert outcome.decision.decision == "promote"
    assert (outcome.canary.requests, outcome.canary.failed, outcome.canary.mistaken) == (8, 0, 40)
    ended = metrics.ended(server.scrape(), "default", metrics.FAILED)
    assert (ended, metrics.ended(server.scrape(), "default")) == (0, 56)


def test_errors_of_the_engine_still_bring_a_canary_down() -> None:
    server = Server()
    broken = traffic(server, lambda: server.answer("m:new", "canary", "error", error="EngineUnavailable"))
    assert analyse(broken).decision.decision == "roll_back"


def test_other_aliases_and_shadows_do_not_count() -> None:
    server = Server()

    def elsewhere() -> None:
        server.answer("m:new", "canary", alias="agent")
        server.answer("m:new", "shadow")

    outcome = analyse(traffic(server, elsewhere))
    assert outcome.decision.decision == "roll_back"
    assert outcome.canary.requests == 0


def test_no_request_until_the_time_limit_means_back() -> None:
    outcome = analyse(Server().scrape)
    assert outcome.decision.decision == "roll_back"
    assert outcome.decision.reason == "too few requests of 8: stable has 0, canary has 0 after 20 s"


def test_no_figures_mean_back() -> None:
    outcome = analyse(lambda: OSError("connection refused"))
    assert outcome.decision.reason == "no figures: connection refused after 20 s"
    assert outcome.decision.decision == "roll_back"


def test_a_scrape_that_fails_once_is_made_good_by_the_next() -> None:
    server = Server()

    def scrapes() -> Iterator[Any]:
        good = traffic(server, lambda: server.answer("m:new", "canary"))
        yield next(good)
        yield ValueError("not Prometheus' text format")
        yield from good

    outcome = analyse(scrapes())
    assert (outcome.decision.decision, outcome.seconds) == ("promote", 10)


def test_a_step_lasts_as_long_as_it_is_baked_though_there_are_requests_enough() -> None:
    server = Server()
    outcome = analyse(traffic(server, lambda: server.answer("m:new", "canary")), bake_seconds=60)
    assert (outcome.decision.decision, outcome.seconds) == ("promote", 60)


def test_harm_beyond_a_limit_ends_a_step_before_it_is_baked() -> None:
    server = Server()
    broken = traffic(server, lambda: server.answer("m:new", "canary", "error"))
    outcome = analyse(broken, bake_seconds=600)
    assert (outcome.decision.decision, outcome.seconds) == ("roll_back", 5)


def test_metrics_that_go_missing_while_it_bakes_mean_back() -> None:
    server = Server()

    def scrapes() -> Iterator[Any]:
        good = traffic(server, lambda: server.answer("m:new", "canary"))
        yield next(good)
        yield next(good)
        while True:
            yield OSError("connection refused")

    outcome = analyse(scrapes(), bake_seconds=10)
    assert outcome.decision.decision == "roll_back"
    assert outcome.decision.reason.startswith("no figures: connection refused")


def test_opinions_count_for_the_version_that_they_are_of() -> None:
    server = Server()

    def one() -> None:
        server.answer("m:new", "canary")
        server.feedback.labels("default", "m:new", "canary", "negative").inc()
        server.feedback.labels("default", "m:old", "stable", "positive").inc()
        server.feedback.labels("default", "m:old", "shadow", "negative").inc()

    outcome = analyse(traffic(server, one))
    assert outcome.decision.decision == "roll_back"
    assert "negative feedback share 100.0% (stable 0.0%)" in outcome.decision.reason
    assert (outcome.canary.opinions, outcome.stable.negative) == (8, 0)


# The watch after a promotion.


def promoted(server: Server, status: str = "ok", count: int = 8) -> Iterator[Any]:
    yield server.scrape()
    for _ in range(count):
        server.answer("m:new", status=status)
    while True:
        yield server.scrape()


def test_a_promoted_version_that_does_as_the_former_one_did_is_watched_to_the_end() -> None:
    outcome = watched(promoted(Server()), figures(50))
    assert (outcome.decision.decision, outcome.seconds) == ("promote", 20)


def test_a_promoted_version_that_fails_goes_back_at_once() -> None:
    outcome = watched(promoted(Server(), "error"), figures(50))
    assert (outcome.decision.decision, outcome.seconds) == ("roll_back", 5)


def test_few_requests_after_a_promotion_say_nothing_against_it() -> None:
    outcome = watched(promoted(Server(), "error", count=3), figures(50))
    assert outcome.decision.decision == "promote"
    assert outcome.decision.reason.startswith("nothing speaks against it: too few requests")


def test_a_watch_that_sees_no_metrics_at_its_end_means_back() -> None:
    outcome = watched(lambda: OSError("connection refused"), figures(50))
    assert outcome.decision.reason == "no figures: connection refused after 20 s"
    assert outcome.decision.decision == "roll_back"


def test_a_server_that_began_anew_is_counted_from_nothing() -> None:
    before, after = Server(), Server()
    for _ in range(6):
        before.answer("m:old")
        before.answer("m:new", "canary")

    def scrapes() -> Iterator[Any]:
        yield Server().scrape()
        yield before.scrape()
        for _ in range(5):
            after.answer("m:old")
            after.answer("m:new", "canary", "error")
        while True:
            yield after.scrape()

    outcome = analyse(scrapes())
    assert (outcome.stable.requests, outcome.canary.requests, outcome.canary.failed) == (11, 11, 5)


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=30))
def test_an_increase_is_what_was_added_whatever_restarts_happen_right_before_a_scrape(
    steps: list[tuple[int, bool]],
) -> None:
    increase, value, added = Increase(), 5, 0
    series = ("agentloop_inferences_total", ())
    increase.add({series: float(value)})
    for more, restarted in steps:
        if restarted:
            value = 0
            increase.add({})
        value += more
        added += more
        increase.add({series: float(value)})
    assert increase.total.get(series, 0.0) == added


# The module.


def test_the_module_asks_the_server_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    scrapes = traffic(server, lambda: server.answer("m:new", "canary"))
    monkeypatch.setattr(sources, "fetch", lambda url, ca_file: next(scrapes))
    result = run_module(
        canary_analysis,
        {
            "metrics_url": "http://127.0.0.1:1/metrics",
            "stable": "m:old",
            "canary": "m:new",
            "min_requests": 8,
            "poll_interval": 0.001,
        },
    )
    assert result["changed"] is False
    assert result["decision"] == "promote"
    assert result["metrics"]["canary"]["requests"] == 8
    assert Figures.of(json.loads(json.dumps(result["figures"]["stable"], allow_nan=False))).requests == 8
    assert [check["name"] for check in result["checks"]] == [
        "error_share",
        "length_share",
        "mean_latency",
        "median_latency",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"canary": "m:old"}, "nothing to compare"),
        ({"min_requests": 0}, "at least 1"),
        ({"poll_interval": 0}, "above 0"),
        ({"metrics_url": []}, "name where the figures are"),
        ({"prometheus_url": "file:///etc/passwd"}, "must begin with http"),
        ({"baseline": {"requests": "many"}}, "no figures of a version"),
        ({"baseline": {"mean": 1}}, "no figures of a version"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    given_options = {"metrics_url": "http://x/metrics", "stable": "m:old", "canary": "m:new", **options}
    result = run_module(canary_analysis, given_options)
    assert result["failed"]
    assert message in result["msg"]


def test_the_module_watches_against_the_figures_that_it_gave_before(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    seen = promoted(server, "error")
    monkeypatch.setattr(sources, "fetch", lambda url, ca_file: next(seen))
    given_options = {
        "metrics_url": "http://127.0.0.1:1/metrics",
        "stable": "m:old",
        "canary": "m:new",
        "baseline": canary_analysis.counted(figures(50)),
        "bake_seconds": 30,
        "poll_interval": 0.001,
    }
    result = run_module(canary_analysis, given_options)
    assert result["decision"] == "roll_back"
    assert result["metrics"]["canary"]["failed"] == 8
