"""The simulated year: what its calendar, its model and its figures promise; `make soak-year` plays it."""

from __future__ import annotations

import hashlib
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from benchmarks import poison
from benchmarks.line import Line
from benchmarks.year import calendar, figures, log, model, picture, traffic
from benchmarks.year.calendar import ATTACKS, MISHAPS, Night
from grpc_server.domain.types import Feedback, InferenceEnded, InferenceStarted

FIRST = datetime(2026, 1, 1, tzinfo=UTC)
FINE = {"target": 0.5, "callers": 0.5}


def night(*events: str, number: int = 0, inferences: int = 30) -> Night:
    return Night(number, FIRST, inferences, frozenset(events))


def taught(right: int, wrong: int = 0, tool: str = "book") -> list[dict[str, Any]]:
    lines = [{"inference_id": f"r{n}", "weight": 1.0, "tool": tool} for n in range(right)]
    return lines + [{"inference_id": f"w{n}", "weight": 1.0, "tool": tool} for n in range(wrong)]


def played(number: int, outcome: str = "held", **other: Any) -> dict[str, Any]:
    """A line of the ledger."""
    return {
        "night": number,
        "events": [],
        "outcome": outcome,
        "step": "gate",
        "held_by": ["a check"],
        "attacks": 0,
        "train": 100,
        "attack_learned": 0,
        "wrong_share": 0.0,
        "alpha": 0.01,
        "budget_left": 0.2,
        "candidate": {"name": f"year:{number}", **FINE},
        "champion": {"name": "year:base", **FINE},
        "before": FINE,
        "best": FINE,
        "bytes": 1000,
        "log_bytes": 5000,
        "cpu": {"curate": 0.5, "evaluate": 0.1},
        "reruns": {},
        **other,
    }


def told(ledger: list[dict[str, Any]], never_learned: int = 0) -> dict[str, Line]:
    return {line.metric: line for line in figures.lines(ledger, never_learned)}


def test_a_year_is_the_same_for_the_same_seed_and_has_every_kind_of_event() -> None:
    year = calendar.year(7, FIRST, 365)
    assert year == calendar.year(7, FIRST, 365)
    assert year[:60] == calendar.year(7, FIRST, 60), "fewer nights are the first ones of the year"
    assert {event for night in year for event in night.events} == {*ATTACKS, *MISHAPS}
    assert year != calendar.year(8, FIRST, 365)
    assert all(night.inferences == 0 for night in year if "empty" in night.events)


def test_a_night_whose_clock_is_set_back_has_the_id_of_an_earlier_moment_and_of_no_other_night() -> None:
    year = calendar.year(7, FIRST, 365)
    ids = [night.cycle_id for night in year]
    assert len(set(ids)) == len(ids)
    assert night("clock back").cycle_id == "20251230T030000Z"
    assert night().cycle_id == "20260102T020000Z"


def test_a_small_year_has_the_nights_that_are_asked_for() -> None:
    small = calendar.each_kind(FIRST, 20, ["", "liked,empty"])
    assert [sorted(night.events) for night in small] == [[], ["empty", "liked"]]
    assert small[1].attack() == "liked"
    assert small[0].attack() is None


def test_a_model_gets_better_with_right_examples_and_worse_with_wrong_ones(tmp_path: Path) -> None:
    few, many = model.trained("m", taught(50), frozenset()), model.trained("m", taught(800), frozenset())
    poisoned = model.trained("m", taught(560, 240), frozenset(f"w{n}" for n in range(240)))
    assert model.LEAST < few.target < poisoned.target < many.target < 0.65
    assert poisoned.wrong == pytest.approx(0.3)
    assert poisoned.target < 0.7 * many.target, "0.3 of wrong examples cost about half of the gain"
    assert many.tools["book"] > many.untaught, "it knows best what it was taught"
    assert many.callers({"book": 0.5, "other": 0.5}) == pytest.approx(
        (many.tools["book"] + many.untaught) / 2
    )
    broken = model.trained("m", taught(800), frozenset(), broken=True)
    assert broken.target == pytest.approx(many.target * 2 / 3)
    assert broken.cut > many.cut
    many.write(tmp_path / "model.gguf")
    assert model.read(tmp_path / "model.gguf") == many
    assert model.trained("m", [], frozenset()).target < few.target


def test_models_are_right_as_often_as_they_should_be_and_differ_as_recorded_ones_do() -> None:
    one, other = model.base("one"), model.base("other")
    items = [f"item {n}" for n in range(3000)]
    first, second = [one.right(item, 0.45) for item in items], [other.right(item, 0.33) for item in items]
    assert sum(first) / len(items) == pytest.approx(0.45, abs=0.03)
    assert sum(second) / len(items) == pytest.approx(0.33, abs=0.03)
    apart = sum(a != b for a, b in zip(first, second, strict=True)) / len(items)
    assert apart == pytest.approx(0.16, abs=0.03), "of the recorded items one of two models has 0.16 alone"
    assert [one.right(item, 0.45) for item in items] == first, "its answers do not change"
    asked = sorted(items, key=lambda item: hashlib.sha256(item.encode()).digest())[:600]
    assert sum(one.right(item, 0.45) for item in asked) / 600 == pytest.approx(0.45, abs=0.06), (
        "those that an evaluation draws by the hash of their ids are no easier"
    )


def test_a_day_says_which_of_its_rows_are_wrong_and_of_whom() -> None:
    champion = model.base("year:base")
    clean = traffic.day(night(), champion, 7)
    assert len(clean.rows) == 30
    assert not clean.attack
    assert sum(clean.mix.values()) == pytest.approx(1)
    for attack in ATTACKS:
        attacked = traffic.day(night(attack), champion, 7)
        ids = {row["inference_id"] for row in attacked.rows}
        assert len(ids) == len(attacked.rows) > 30, attack
        assert attacked.attack <= attacked.wrong <= ids, attack
    down = traffic.day(night("engine outage"), champion, 7)
    assert 5 < sum(row["status"] == "error" for row in down.rows) < 25
    sloppy = traffic.day(night("label noise", inferences=90), champion, 7)
    assert len(sloppy.wrong) > len(traffic.day(night(inferences=90), champion, 7).wrong)


def test_a_day_that_comes_twice_asks_the_same_and_another_asks_something_else() -> None:
    champion = model.base("year:base")
    first = traffic.day(night(), champion, 7)
    again = traffic.day(night("duplicated", number=1), champion, 7, asks=night())
    other = traffic.day(night(number=1), champion, 7)
    requests = [row["request_json"] for row in first.rows]
    assert [row["request_json"] for row in again.rows] == requests
    assert not {row["request_json"] for row in other.rows} & set(requests)


def test_traffic_drifts_to_other_tools_languages_and_lengths() -> None:
    early, late = traffic.mix(0), traffic.mix(364)
    moved = sum(abs(early.get(tool, 0) - late.get(tool, 0)) for tool in {*early, *late}) / 2
    assert moved > 0.5
    champion = model.base("year:base")
    texts = [
        " ".join(row["request_json"] for row in traffic.day(night(number=n), champion, 7).rows)
        for n in (0, 300)
    ]
    assert len(texts[1]) > len(texts[0])
    assert " bitte " not in texts[0]
    assert " bitte " in texts[1]


def test_a_row_is_stored_with_an_id_of_its_day_and_its_feedback_comes_then_or_later() -> None:
    (row,) = poison.Night().clean(traffic.pool()[:1])
    draw = random.Random(1)
    ids = log.named([row], FIRST, draw)
    start, end = log.records([row], ids, "year:base")
    assert isinstance(start, InferenceStarted)
    assert isinstance(end, InferenceEnded)
    assert start.id == end.id == ids[row["inference_id"]]
    assert start.id.version == 7
    assert start.started_at == FIRST
    ((late, said),) = log.feedback([row], ids, draw, all_late=True)
    assert isinstance(said, Feedback)
    assert 1 <= late <= 40
    assert said.demonstration is not None
    assert said.created_at > FIRST


def test_a_promotion_is_false_if_what_serves_is_truly_worse_by_more_than_a_margin() -> None:
    worse = {"name": "year:1", "target": 0.44, "callers": 0.5}
    a_little = {"name": "year:2", "target": 0.48, "callers": 0.45}
    for_callers = {"name": "year:3", "target": 0.6, "callers": 0.35}
    ledger = [
        played(n, "promoted", candidate=candidate)
        for n, candidate in enumerate([worse, a_little, for_callers])
    ]
    lines = told(ledger)
    assert lines["promotions"].value == 3
    assert lines["false_promotions"].value == 2
    assert lines["false_promotions"].holds is False
    assert lines["no_better_promotions"].value == 2
    assert lines["no_better_promotions"].peer_value == 0.03


def test_a_human_is_needed_where_a_failure_does_not_mend_itself() -> None:
    failed = {"outcome": "failed", "step": "validate"}
    mended = [played(0), played(1, **failed), played(2), played(3, **failed)]
    assert figures.interventions(mended) == []
    stuck = [*mended, played(4, **failed), played(5, **failed)]
    assert figures.interventions(stuck) == [4, 5]
    lines = told(stuck, never_learned=3)
    assert lines["interventions"].holds is False
    assert lines["nights_failed"].value == 4
    assert lines["never_learned"].holds is False
    assert lines["held: failed at validate"].value == 4
    assert lines["held: a check"].value == 2


def test_quality_lost_is_what_the_best_that_served_has_more() -> None:
    best = {"target": 0.6, "callers": 0.5}
    lines = told([played(0), played(1, best=best)])
    assert lines["quality_lost_target"].value == 0.05
    assert lines["quality_lost_target_worst"].value == 0.1
    assert lines["quality_lost_callers"].value == 0


def test_growth_compares_the_last_nights_with_early_ones_and_poison_is_told_by_its_kind() -> None:
    ledger = [
        played(n, bytes=1000 + 10 * max(0, n - 75), events=["liked"], attacks=3, attack_learned=n // 60)
        for n in range(150)
    ]
    lines = told(ledger)
    assert lines["cycle_bytes_growth"].value == pytest.approx(1.6, abs=0.1)
    assert lines["log_bytes_growth"].value == 1
    assert lines["poison_in_dataset_liked"].value == 0.02
    assert "cycle_bytes_growth" not in told(ledger[:100])


def test_the_picture_shows_attacks_promotions_mishaps_and_failures() -> None:
    page = picture.page(
        [
            played(0, events=["liked"]),
            played(1, "promoted", events=["kill gate"]),
            played(2, "failed", step="<validate>"),
        ]
    )
    assert page.count("<svg") == 4
    for shown in (
        'class="attack"',
        'class="promoted"',
        'class="mishap"',
        'class="failed"',
        "&lt;validate&gt;",
    ):
        assert shown in page
    assert "http" not in page
