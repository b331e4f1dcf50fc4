"""Quotas: never more than the limit in any minute, everything given back, whatever the clock does."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpc_server.domain.errors import Exhausted
from grpc_server.domain.types import Caller, Limits
from grpc_server.quotas import Held, Quotas, Window
from tests.fakes import FakeClock


def caller(key_id: str = "k", **limits: Any) -> Caller:
    return Caller(key_id, "billing", frozenset(), limits=Limits(**limits))


class Setup:
    def __init__(self, max_callers: int = 100) -> None:
        self.clock = FakeClock()
        self.quotas = Quotas(monotonic=self.clock.monotonic, max_callers=max_callers)

    def run(self, who: Caller, tokens: int = 1, used: int | None = None) -> None:
        """One request from beginning to end."""
        with self.quotas.hold(who, tokens) as held:
            held.used = tokens if used is None else used

    def refusal(self, who: Caller, tokens: int = 1) -> Exhausted:
        with pytest.raises(Exhausted) as refused:
            self.quotas.hold(who, tokens)
        return refused.value


@pytest.fixture
def setup() -> Setup:
    return Setup()


def test_requests_of_a_minute_are_counted_and_come_free_when_it_is_over(setup: Setup) -> None:
    who = caller(requests_per_minute=3)
    for _ in range(3):
        setup.run(who)
    refused = setup.refusal(who)
    assert str(refused) == (
        "requests_per_minute of this caller is 3, 3 are in use, and this request needs 1; try again in 61 s"
    )
    assert (refused.retry_after_seconds, refused.subject) == (61, "caller:billing")
    setup.clock.advance(60.9)
    assert setup.refusal(who).retry_after_seconds == pytest.approx(0.1)
    setup.clock.advance(0.1)
    setup.run(who)


def test_who_waits_as_long_as_told_is_let_in(setup: Setup) -> None:
    who = caller(tokens_per_minute=100)
    for tokens in (50, 30, 20):
        setup.run(who, tokens)
        setup.clock.advance(7.3)
    seconds = setup.refusal(who, 70).retry_after_seconds
    assert seconds is not None
    setup.clock.advance(seconds - 0.001)
    setup.refusal(who, 70)
    setup.clock.advance(0.001)
    setup.run(who, 70)


def test_tokens_are_reserved_while_it_runs_and_settled_when_it_ends(setup: Setup) -> None:
    who = caller(tokens_per_minute=100)
    with setup.quotas.hold(who, 80) as held:
        assert "80 are in use" in str(setup.refusal(who, 21))
        held.used = 30
    setup.run(who, 70)
    setup.refusal(who, 1)


def test_what_was_used_beyond_the_reservation_counts_too(setup: Setup) -> None:
    who = caller(tokens_per_minute=100)
    setup.run(who, 10, used=130)
    setup.refusal(who, 1)
    setup.clock.advance(61)
    setup.run(who, 100)


def test_a_request_that_never_ran_gives_its_tokens_back(setup: Setup) -> None:
    who = caller(tokens_per_minute=100)
    with pytest.raises(KeyError), setup.quotas.hold(who, 100):
        raise KeyError
    setup.run(who, 100)


def test_tokens_of_a_long_stream_are_not_given_back_to_another_minute(setup: Setup) -> None:
    who = caller(tokens_per_minute=100)
    with setup.quotas.hold(who, 100) as held:
        setup.clock.advance(61)
        setup.run(who, 60)
        held.used = 20
    setup.refusal(who, 41)
    setup.run(who, 40)


def test_a_request_that_can_never_fit_says_so_and_names_no_time(setup: Setup) -> None:
    refused = setup.refusal(caller(tokens_per_minute=100), 101)
    assert refused.retry_after_seconds is None
    assert "this request may use 101 tokens, and tokens_per_minute of this caller is 100" in str(refused)


def test_servers_behind_one_balancer_let_no_more_through_together_than_the_limit() -> None:
    clock = FakeClock()
    servers = [Quotas(monotonic=clock.monotonic, servers=3) for _ in range(3)]
    who = caller(requests_per_minute=10, tokens_per_minute=100, concurrent_streams=7)
    held: list[Held] = []
    refused: list[str] = []
    for _ in range(5):
        for server in servers:
            try:
                held.append(server.hold(who, 10))
            except Exhausted as error:
                refused.append(str(error))
    assert len(held) == 6, "2 streams of 7 on each"
    assert "concurrent_streams of this caller is 7, of which 2 on each of 3 servers" in refused[0]
    for one in held:
        one.used = 10
        one.__exit__()
    for server in servers:
        with server.hold(who, 10):
            pass
        with pytest.raises(
            Exhausted, match="requests_per_minute of this caller is 10, of which 3 on each of 3"
        ):
            server.hold(who, 1)
    with pytest.raises(
        Exhausted, match=r"may use 34 tokens, and .* is 100, of which 33 on each of 3 servers"
    ):
        Quotas(monotonic=clock.monotonic, servers=3).hold(who, 34)


def test_a_limit_smaller_than_the_number_of_servers_shuts_nobody_out() -> None:
    clock, who = FakeClock(), caller(concurrent_streams=1)
    with Quotas(monotonic=clock.monotonic, servers=3).hold(who, 1):
        pass


def test_so_many_streams_run_at_once_and_no_more(setup: Setup) -> None:
    who = caller(concurrent_streams=2)
    first, second = setup.quotas.hold(who, 1), setup.quotas.hold(who, 1)
    refused = setup.refusal(who)
    assert "concurrent_streams of this caller is 2, and as many run" in str(refused)
    assert refused.retry_after_seconds == 1
    for held in (first, second):
        held.__exit__()
    with setup.quotas.hold(who, 1), setup.quotas.hold(who, 1):
        setup.refusal(who)


def test_what_is_refused_counts_for_nothing(setup: Setup) -> None:
    who = caller(requests_per_minute=5, tokens_per_minute=10, concurrent_streams=1)
    with setup.quotas.hold(who, 10):
        for _ in range(50):
            setup.refusal(who)
    for _ in range(3):
        setup.run(who, 1)
        setup.refusal(who, 10)
    setup.run(who, 1)


def test_callers_do_not_share_and_those_without_limits_cost_nothing(setup: Setup) -> None:
    for number in range(50):
        setup.run(caller(f"k{number}", requests_per_minute=1))
        setup.run(Caller(f"free{number}", "free", frozenset()), 10**9)
    assert setup.quotas.callers == 50


def test_a_limit_that_changes_counts_what_was_used_before(setup: Setup) -> None:
    setup.run(caller(requests_per_minute=5))
    setup.refusal(caller(requests_per_minute=1))
    setup.run(caller(requests_per_minute=2))


def test_a_clock_set_back_is_a_clock_that_stands_still(setup: Setup) -> None:
    who = caller(requests_per_minute=2)
    setup.run(who)
    setup.clock.advance(-5000)
    setup.run(who)
    setup.refusal(who)
    setup.clock.advance(5000 + 61)
    setup.run(who)


def test_callers_that_are_idle_are_forgotten_and_those_that_stream_are_not(setup: Setup) -> None:
    streaming = setup.quotas.hold(caller("streaming", concurrent_streams=1), 1)
    for number in range(90):
        setup.run(caller(f"k{number}", requests_per_minute=1))
    setup.clock.advance(61)
    for _ in range(100):
        setup.run(caller("last", concurrent_streams=1))
    assert setup.quotas.callers == 2
    setup.refusal(caller("streaming", concurrent_streams=1))
    streaming.__exit__()


def test_more_callers_than_it_can_keep_are_refused_and_none_escapes_its_limit() -> None:
    setup = Setup(max_callers=10)
    for number in range(10):
        setup.run(caller(f"k{number}", requests_per_minute=1))
    refused = setup.refusal(caller("eleventh", requests_per_minute=1))
    assert (refused.subject, refused.retry_after_seconds) == ("server", 60)
    for number in range(10):
        setup.refusal(caller(f"k{number}", requests_per_minute=1))
    setup.clock.advance(61)
    setup.run(caller("eleventh", requests_per_minute=1))


steps = st.lists(
    st.tuples(
        st.floats(0, 40, allow_nan=False),  # seconds that pass first
        st.integers(1, 60),  # tokens reserved
        st.integers(0, 100),  # percent of them used
        st.integers(0, 5),  # how many other requests begin before this one ends
    ),
    max_size=60,
)


@given(steps=steps, limit=st.integers(1, 100), start=st.floats(0, 1e6))
def test_no_minute_wherever_it_begins_has_more_than_the_limit_and_all_is_given_back(
    steps: list[tuple[float, int, int, int]], limit: int, start: float
) -> None:
    clock = FakeClock()
    clock.seconds = start
    quotas = Quotas(monotonic=clock.monotonic)
    who = caller(requests_per_minute=limit, tokens_per_minute=limit)
    let_through: list[list[float]] = []  # [when, tokens]
    running: list[tuple[int, Held, list[float], int]] = []
    for index, (pause, tokens, percent, later) in enumerate(steps):
        clock.advance(pause)
        for due in [one for one in running if one[0] <= index]:
            running.remove(due)
            due[1].used = due[3]
            due[1].__exit__()
            due[2][1] = due[3]
        try:
            held = quotas.hold(who, tokens)
        except Exhausted:
            continue
        entry = [clock.seconds, float(tokens)]
        let_through.append(entry)
        running.append((index + later, held, entry, tokens * percent // 100))
        for begun, _ in let_through:
            minute = [entry for entry in let_through if begun <= entry[0] <= begun + 60]
            assert len(minute) <= limit
            # What is still reserved counts in full, what has ended as used.
            assert sum(entry[1] for entry in minute) <= limit
    for _, held, _, _ in running:
        held.__exit__()
    clock.advance(62)
    with quotas.hold(who, limit):
        pass


@given(amounts=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 50)), max_size=80))
def test_a_window_never_grows_beyond_its_slots(amounts: list[tuple[int, int]]) -> None:
    window = Window()
    for second, amount in sorted(amounts):
        window.drop_old(second)
        window.add(second, amount)
        assert len(window._slots) <= 61
        assert window.total == sum(slot[1] for slot in window._slots)
