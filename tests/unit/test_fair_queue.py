"""Turns in the queue: fair between callers, bounded, and nothing is kept of those who left."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpc_server.domain.fair_queue import REMEMBERED, FairQueue, NoRoomError


def order(queue: FairQueue[str]) -> list[str]:
    return [queue.pop() for _ in range(len(queue))]


def test_the_requests_of_one_caller_keep_their_order() -> None:
    queue = FairQueue[str](9, 9)
    for item in "abc":
        queue.push("one", item, 5)
    assert order(queue) == ["a", "b", "c"]
    with pytest.raises(IndexError):
        queue.pop()


def test_a_flood_delays_another_caller_by_one_turn() -> None:
    queue = FairQueue[str](99, 99)
    for number in range(50):
        queue.push("flood", f"flood {number}", 10)
    queue.push("late", "late 0", 10)
    queue.push("late", "late 1", 10)
    assert [item for item in order(queue) if item.startswith("late")] == ["late 0", "late 1"]
    again = FairQueue[str](99, 99)
    for number in range(50):
        again.push("flood", f"flood {number}", 10)
    again.pop()
    again.push("late", "late", 10)
    assert again.pop() == "late"


def test_turns_are_shared_by_tokens_and_not_by_requests() -> None:
    queue = FairQueue[str](999, 999)
    for number in range(100):
        queue.push("long", f"long {number}", 400)
        queue.push("short", f"short {number}", 100)
    first = Counter(queue.pop().split()[0] for _ in range(50))
    assert first == {"long": 10, "short": 40}


def test_a_caller_who_was_away_has_saved_up_nothing() -> None:
    queue = FairQueue[str](99, 99)
    for number in range(20):
        queue.push("busy", f"busy {number}", 10)
    for _ in range(10):
        queue.pop()
        queue.end("busy", 10, 10)
    for number in range(10):
        queue.push("new", f"new {number}", 10)
    assert Counter(queue.pop().split()[0] for _ in range(10)) == {"new": 5, "busy": 5}


def test_what_was_given_without_a_wait_counts_too() -> None:
    queue = FairQueue[str](99, 99)
    queue.begin("first", 100)
    queue.push("first", "first", 1)
    queue.push("second", "second", 1)
    assert order(queue) == ["second", "first"]


def test_a_request_that_took_less_than_expected_counts_as_what_it_took() -> None:
    queue = FairQueue[str](99, 99)
    for caller in ("one", "two"):
        queue.begin(caller, 100)
        queue.push(caller, caller, 1)
    queue.end("two", 100, 10)
    assert order(queue) == ["two", "one"]
    queue.end("nobody", 5, 5)
    assert queue.remembered == 2


def test_a_newcomer_does_not_pay_for_what_others_were_expected_to_take() -> None:
    queue = FairQueue[str](99, 99)
    for _ in range(4):
        queue.begin("flood", 1000)
    queue.push("new", "new", 1000)
    for _ in range(4):
        queue.end("flood", 1000, 10)
    queue.push("flood", "flood", 1000)
    assert order(queue) == ["new", "flood"]


def test_one_caller_may_not_have_more_than_its_part() -> None:
    queue = FairQueue[str](10, 2)
    queue.push("one", "a", 1)
    queue.push("one", "b", 1)
    with pytest.raises(NoRoomError) as refused:
        queue.push("one", "c", 1)
    assert refused.value.own
    assert queue.push("two", "d", 1) is None


def test_in_a_full_queue_the_last_of_the_longest_gives_way() -> None:
    queue = FairQueue[str](4, 4)
    for item in "abc":
        queue.push("long", item, 1)
    queue.push("short", "x", 1)
    assert queue.push("new", "n", 1) == "c"
    with pytest.raises(NoRoomError) as refused:  # two each would be one more than "long" has
        queue.push("short", "y", 1)
    assert not refused.value.own
    assert len(queue) == 4
    assert sorted(order(queue)) == ["a", "b", "n", "x"]


def test_a_queue_of_no_size_has_no_room() -> None:
    with pytest.raises(NoRoomError):
        FairQueue[str](0, 1).push("one", "a", 1)


def test_a_caller_can_be_told_how_many_are_ahead_of_it() -> None:
    queue = FairQueue[str](99, 99)
    assert queue.ahead_of("one") == 0
    for number in range(5):
        queue.push("flood", f"{number}", 1)
    assert queue.ahead_of("one") == 1  # as it came first to the same count
    assert queue.ahead_of("flood") == 5
    queue.pop()
    assert queue.ahead_of("one") == 0
    queue.push("one", "a", 1)
    assert queue.ahead_of("one") == 3
    queue.begin("away", 1000)
    assert queue.ahead_of("away") == 2


def test_of_a_million_callers_little_is_kept() -> None:
    queue = FairQueue[str](4, 4)
    for number in range(3 * REMEMBERED):
        queue.begin(f"caller {number}", 1000 + number)
    assert queue.remembered <= REMEMBERED
    queue.forget()
    assert queue.remembered == 0


def test_nobody_is_forgotten_while_requests_wait() -> None:
    queue = FairQueue[str](4, 4)
    queue.push("one", "a", 1)
    queue.forget()
    assert order(queue) == ["a"]


CALLERS = st.sampled_from("ABCDE")
STEP = st.one_of(
    st.tuples(st.just("push"), CALLERS, st.integers(0, 500)),
    st.tuples(st.just("pop"), CALLERS, st.just(0)),
    st.tuples(st.just("discard"), CALLERS, st.just(0)),
    st.tuples(st.just("begin"), CALLERS, st.integers(0, 500)),
    st.tuples(st.just("end"), CALLERS, st.integers(0, 500)),
)


@given(st.lists(STEP, max_size=200))
def test_whatever_happens_no_request_is_lost_or_taken_twice_and_bounds_hold(
    steps: list[tuple[str, str, int]],
) -> None:
    queue = FairQueue[int](8, 4)
    waiting: dict[int, str] = {}
    for number, (what, caller, tokens) in enumerate(steps):
        mine = [item for item, owner in waiting.items() if owner == caller]
        if what == "push":
            try:
                lost = queue.push(caller, number, tokens)
            except NoRoomError as error:
                assert len(mine) == 4 if error.own else len(waiting) == 8
                continue
            waiting[number] = caller
            if lost is not None:
                assert waiting.pop(lost) != caller
        elif what == "pop" and waiting:
            item = queue.pop()
            assert item == min(i for i, owner in waiting.items() if owner == waiting[item])
            del waiting[item]
        elif what == "discard":
            item = mine[-1] if mine else -1
            assert queue.discard(caller, item) is bool(mine)
            waiting.pop(item, None)
        elif what == "begin":
            queue.begin(caller, tokens)
        elif what == "end":
            queue.end(caller, tokens, tokens // 2)
        assert len(queue) == len(waiting) <= 8
        assert len(queue._order) == len(set(waiting.values()))
    assert {queue.pop() for _ in range(len(queue))} == set(waiting)
    queue.forget()
    assert queue.remembered == 0
