"""The gate: it passes what is shown to be better, rejects what is shown to be worse, and holds otherwise."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from training import cycle, gate
from training.suites import read_config

CHAMPION = {"model_version": "gemma:base", "sha256": "c" * 64}
CANDIDATE = {"model_version": "gemma:20260101T000000Z", "sha256": "d" * 64}
RULES = gate.read_rules()


def rows(
    subject: str, right: Sequence[bool], *, cut: int = 0, sessions: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    return [
        {
            "item_id": f"item_{number}",
            "subject": subject,
            "session_id": sessions[number] if sessions else "",
            "correct": correct,
            "finish_reason": "length" if number < cut else "tool_calls",
        }
        for number, correct in enumerate(right)
    ]


def share(right: int, n: int) -> list[bool]:
    return [number < right for number in range(n)]


def night(
    *, champion: int = 0, candidate: int = 30, base: int = 6, guarded: tuple[int, int] = (0, 10), cut: int = 0
) -> dict[str, list[dict[str, Any]]]:
    """An evaluation of 100 target and 40 gate items, by the number of right answers."""
    return {
        "simple_python": rows("champion", share(champion, 100))
        + rows("candidate", share(candidate, 100), cut=cut)
        + rows("base_constrained", share(base, 100)),
        "gate": rows("champion", share(guarded[0], 40)) + rows("candidate", share(guarded[1], 40)),
    }


def judged(suites: gate.Suites) -> dict[str, Any]:
    return gate.judge(RULES, suites, CHAMPION, CANDIDATE)


def test_a_candidate_that_learned_the_task_passes() -> None:
    decided = judged(night())
    assert decided["verdict"] == "pass"
    assert all(check["holds"] for check in decided["checks"])
    assert "0.300 against 0.000 on 100 items of simple_python" in decided["reason"]
    assert decided["champion"] == CHAMPION and decided["candidate"] == CANDIDATE


def test_a_candidate_that_is_shown_to_be_worse_fails() -> None:
    decided = judged(night(champion=60, candidate=30))
    assert decided["verdict"] == "fail"
    assert "better than the champion" in decided["reason"]


def test_a_candidate_that_answers_like_the_champion_is_held() -> None:
    decided = judged(night(champion=30, candidate=30, guarded=(12, 12)))
    assert decided["verdict"] == "inconclusive"
    assert not any(check["refuted"] for check in decided["checks"])


def test_one_right_answer_more_is_not_enough() -> None:
    assert judged(night(champion=30, candidate=31, guarded=(12, 12)))["verdict"] == "inconclusive"


def test_better_on_the_target_but_worse_on_what_callers_showed_fails() -> None:
    decided = judged(night(guarded=(30, 10)))
    assert decided["verdict"] == "fail"
    assert "no worse on what callers showed" in decided["reason"]


def test_a_margin_that_the_interval_crosses_holds_the_champion() -> None:
    assert judged(night(guarded=(20, 18)))["verdict"] == "inconclusive"


def test_learning_no_more_than_the_format_does_not_pass() -> None:
    decided = judged(night(candidate=12, base=12))
    assert decided["verdict"] == "inconclusive"
    assert "held to the schema" in decided["reason"]


def test_a_check_may_have_a_level_of_its_own() -> None:
    night_before = night(candidate=36, base=28)
    assert judged(night_before)["verdict"] == "pass"
    strict = RULES.model_copy(
        update={"checks": tuple(check.model_copy(update={"level": 0.999}) for check in RULES.checks)}
    )
    decided = gate.judge(strict, night_before, CHAMPION, CANDIDATE)
    assert decided["verdict"] == "inconclusive"
    assert "99.9% interval" in decided["reason"] or "100% interval" in decided["reason"]


def test_a_candidate_that_does_not_end_its_answers_fails() -> None:
    decided = judged(night(cut=90))
    assert decided["verdict"] == "fail"
    assert "90 of 100 answers are cut" in decided["reason"]


def test_a_few_cut_answers_too_many_hold_the_champion() -> None:
    assert judged(night(cut=16))["verdict"] == "inconclusive"


def test_the_champion_itself_is_no_candidate() -> None:
    decided = gate.judge(RULES, night(), CHAMPION, {**CANDIDATE, "sha256": CHAMPION["sha256"]})
    assert decided["verdict"] == "inconclusive"
    assert "byte for byte" in decided["reason"]


@pytest.mark.parametrize("suite", ["simple_python", "gate"])
def test_a_missing_suite_is_inconclusive(suite: str) -> None:
    suites = night()
    del suites[suite]
    decided = judged(suites)
    assert decided["verdict"] == "inconclusive"
    assert f"0 items of {suite}" in decided["reason"]


def test_a_short_suite_is_inconclusive() -> None:
    suites = night()
    suites["gate"] = rows("champion", share(0, 5)) + rows("candidate", share(5, 5))
    assert "5 items of gate, 15 needed" in judged(suites)["reason"]


def test_items_that_only_one_was_asked_are_not_compared() -> None:
    suites = night()
    suites["simple_python"] = [row for row in suites["simple_python"] if row["item_id"] != "item_7"] + rows(
        "champion", share(0, 8)
    )[7:]
    decided = judged(suites)
    assert decided["verdict"] == "inconclusive"
    assert "1 items were asked of only one of the two" in decided["reason"]


def test_items_of_one_session_count_less() -> None:
    suites = night(guarded=(0, 40))
    suites["gate"] = [{**row, "session_id": "one long session"} for row in suites["gate"]]
    check = judged(suites)["checks"][1]
    assert check["n"] == 40 and check["effective_n"] == 1


def test_a_check_that_does_not_block_changes_no_verdict() -> None:
    lenient = RULES.model_copy(
        update={"checks": tuple(c.model_copy(update={"blocking": c.suite != "gate"}) for c in RULES.checks)}
    )
    decided = gate.judge(lenient, night(guarded=(30, 10)), CHAMPION, CANDIDATE)
    assert decided["verdict"] == "pass"
    assert [check["refuted"] for check in decided["checks"]] == [False, True, False, False]


@given(*(st.integers(0, 100) for _ in range(3)), st.integers(0, 40), st.integers(0, 40), st.integers(0, 100))
def test_a_pass_means_that_no_point_estimate_is_worse(
    champion: int, candidate: int, base: int, guarded: int, shown: int, cut: int
) -> None:
    decided = judged(
        night(champion=champion, candidate=candidate, base=base, guarded=(guarded, shown), cut=cut)
    )
    if decided["verdict"] == "pass":
        assert candidate > champion and candidate > base and cut <= 15 and shown >= guarded - 2
    if decided["verdict"] == "fail":
        assert candidate < champion or candidate < base or cut > 15 or shown < guarded


def _evaluated(where: Path) -> Path:
    directory = where / "20260102T000000Z"
    evaluation = directory / "evaluation"
    evaluation.mkdir(parents=True)
    for suite, found in night().items():
        (evaluation / f"{suite}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    cycle.write_json(evaluation / "evaluation.json", {"champion": CHAMPION, "candidate": CANDIDATE})
    return directory


def test_the_verdict_is_a_file_written_once_for_the_same_evaluation_and_rules(tmp_path: Path) -> None:
    directory = _evaluated(tmp_path)
    decided = gate.run(directory)
    assert decided["verdict"] == "pass"
    assert gate.run(directory) == decided  # the time of the decision, too

    stricter = tmp_path / "gate.yaml"
    stricter.write_text(gate.RULES.read_text().replace("minimum_items: 50", "minimum_items: 101"))
    assert gate.run(directory, stricter)["verdict"] == "inconclusive"


def test_a_cycle_without_an_evaluation_cannot_be_judged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        gate.run(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("level: 2\nchecks: [{name: a, rule: length_share, suite: s, bound: 1, minimum_items: 1}]", "level"),
        ("level: 0.9\nchecks: []", "checks"),
        ("level: 0.9\nchecks: [{name: a, rule: vote, suite: s}]", "vote"),
        (
            "level: 0.9\nchecks: [{name: a, rule: superior, suite: s, against: champion, margn: 1}]",
            "margn",
        ),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused_by_name(tmp_path: Path, wrong: str, named: str) -> None:
    rules = tmp_path / "gate.yaml"
    rules.write_text(wrong)
    with pytest.raises(ValidationError, match=named):
        gate.read_rules(rules)


def test_a_candidate_that_changes_nothing_of_a_full_guard_suite_is_no_worse() -> None:
    cap = next(suite.cap for suite in read_config().suites if suite.name == "gate")
    assert cap is not None
    equal = night() | {"gate": rows("champion", share(40, cap)) + rows("candidate", share(40, cap))}
    (guard,) = [check for check in judged(equal)["checks"] if check["name"].startswith("no worse")]
    assert guard["holds"]
