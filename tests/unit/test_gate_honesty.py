"""The gate keeps its word on what real models answered; `make bench-gate` has it with 5,000 nights."""

import json
import random

from benchmarks import bench_gate
from training.gate_rules import read_rules

RULES = read_rules()
RECORDED = bench_gate.Recordings()
ALPHA = RULES.error_budget.alpha_a_night


def test_nights_in_which_nothing_changed_are_promoted_no_more_often_than_declared() -> None:
    draw = random.Random(1)
    nights = [bench_gate.judged(RULES, RECORDED.night(draw)) for _ in range(400)]
    promoted = sum(night["verdict"] == "pass" for night in nights)
    claimed = sum(bench_gate._claim(night)["holds"] for night in nights)
    assert promoted <= claimed
    assert claimed <= 10, "of 400 nights 4 are expected; 10 or fewer in 997 of 1,000 such samples"


def test_a_gain_that_the_gate_declares_to_see_it_sees_about_as_often_as_declared() -> None:
    draw = random.Random(2)
    gain = bench_gate.known_gain(RULES, RECORDED, draw)
    assert 0.05 < gain < 0.3
    nights = [
        bench_gate.judged(RULES, bench_gate.with_gain(RECORDED.night(draw), gain, draw)) for _ in range(200)
    ]
    shown = sum(bench_gate._claim(night)["holds"] for night in nights)
    assert shown > 0.7 * len(nights)


def test_a_real_night_that_made_the_model_worse_was_rejected() -> None:
    """The recorded one: 0.33 right where its champion had 0.45."""
    verdict = bench_gate.judged(RULES, RECORDED.as_recorded())
    assert verdict["verdict"] == "fail"
    assert "0.330 against 0.450 on 100 items" in verdict["reason"]


def test_four_claims_at_once_are_wrong_no_more_often_than_one() -> None:
    draw, four = random.Random(3), bench_gate.four_claims(RULES)
    targets = [f"target_{number}" for number in range(4)]
    nights = [bench_gate.judged(four, RECORDED.night(draw, targets)) for _ in range(200)]
    assert sum(any(check["holds"] for check in night["checks"]) for night in nights) <= 7


def test_recorded_answers_hold_no_text_and_no_callers_ids() -> None:
    for line in bench_gate.RECORDED.read_text().splitlines():
        assert set(json.loads(line)) == {"suite", "item_id", "session_id", "right", "cut"}
        assert len(line) < 300


def test_the_bound_of_a_rate_is_above_it_and_one_where_all_succeed() -> None:
    assert 0.0005 < bench_gate.upper(0, 5000) < 0.0007  # the rule of three
    assert bench_gate.upper(25, 5000) > 0.005
    assert bench_gate.upper(5, 5) == 1
