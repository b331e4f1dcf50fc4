"""What is expected of the next answer, from what the last ones took."""

from __future__ import annotations

import pytest

from grpc_server.domain.service_times import ENOUGH, FRESH_SECONDS, VERSIONS, WINDOW, ServiceTimes
from tests.fakes import FakeClock


def test_the_mean_follows_what_places_were_held_for() -> None:
    times = ServiceTimes(FakeClock().monotonic)
    assert times.mean is None
    times.held(2)
    assert times.mean == 2
    for _ in range(100):
        times.held(4)
    assert times.mean == pytest.approx(4, abs=0.01)


def test_the_least_is_a_quick_first_token_and_as_many_as_a_short_answer_has() -> None:
    times = ServiceTimes(FakeClock().monotonic)
    for tokens in range(10, 10 + WINDOW):
        times.answered("m", 0.5, 0.5 + tokens * 0.1, tokens)
    assert times.least("m", 1000) == pytest.approx(0.5 + 16 * 0.1)
    assert times.least("m", 2) == pytest.approx(0.5 + 2 * 0.1)
    assert times.typical("m", 1000) == pytest.approx(0.5 + 42 * 0.1)
    assert times.least("other", 2) is None


def test_a_few_answers_say_nothing() -> None:
    times = ServiceTimes(FakeClock().monotonic)
    for _ in range(ENOUGH - 1):
        times.answered("m", 1, 2, 1)
    assert times.least("m", 1) is None
    times.answered("m", 1, 2, 1)
    assert times.least("m", 1) == 2


def test_an_answer_without_tokens_is_taken_too() -> None:
    times = ServiceTimes(FakeClock().monotonic)
    for _ in range(ENOUGH):
        times.answered("m", 1, 1, 0)
    assert times.least("m", 100) == 1


def test_what_is_old_is_not_believed_so_that_nobody_is_refused_for_ever() -> None:
    clock = FakeClock()
    times = ServiceTimes(clock.monotonic)
    for _ in range(ENOUGH):
        times.answered("m", 60, 60, 1)
    clock.advance(FRESH_SECONDS)
    assert times.least("m", 1) == 60
    clock.advance(0.1)
    assert times.least("m", 1) is None


def test_an_engine_that_has_become_quick_is_believed_after_a_window() -> None:
    times = ServiceTimes(FakeClock().monotonic)
    for seconds in (9.0, 1.0):
        for _ in range(WINDOW):
            times.answered("m", seconds, seconds, 1)
        assert times.least("m", 1) == seconds


def test_versions_that_are_gone_are_forgotten() -> None:
    times = ServiceTimes(FakeClock().monotonic)
    for number in range(VERSIONS + 1):
        for _ in range(ENOUGH):
            times.answered(f"m:{number}", 1, 1, 1)
    assert times.least("m:0", 1) is None
    assert times.least("m:1", 1) == 1
