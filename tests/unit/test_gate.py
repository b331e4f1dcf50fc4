"""The gate: it passes what is shown to be better, rejects what is shown to be worse, and holds otherwise."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from training import budget, cycle, gate, gate_rules
from training.budget import Budget
from training.checks import Suites
from training.gate_rules import ErrorBudget
from training.suites import read_config

CHAMPION = {"model_version": "gemma:base", "sha256": "c" * 64}
CANDIDATE = {"model_version": "gemma:20260101T000000Z", "sha256": "d" * 64}
RULES = gate_rules.read_rules()


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


def judged(suites: Suites) -> dict[str, Any]:
    return gate.judge(RULES, suites, CHAMPION, CANDIDATE)


def test_a_candidate_that_learned_the_task_passes() -> None:
    decided = judged(night())
    assert decided["verdict"] == "pass"
    assert all(check["holds"] or check["passed_over"] for check in decided["checks"])
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


def test_answers_to_callers_that_do_not_end_fail_a_night_whose_calls_end() -> None:
    suites = night()
    suites["gate"] = rows("champion", share(0, 40)) + rows("candidate", share(10, 40), cut=30)
    decided = judged(suites)
    assert decided["verdict"] == "fail"
    assert "ends its answers to what callers asked: 30 of 40 answers are cut" in decided["reason"]


def test_a_margin_that_the_interval_crosses_holds_the_champion() -> None:
    assert judged(night(guarded=(20, 18)))["verdict"] == "inconclusive"


def test_learning_no_more_than_the_format_does_not_pass() -> None:
    decided = judged(night(candidate=12, base=12))
    assert decided["verdict"] == "inconclusive"
    assert "held to the schema" in decided["reason"]


def changed(rules: gate_rules.Rules, rule: str, **update: Any) -> gate_rules.Rules:
    """The rules with other values in each check of that rule."""
    checks = tuple(check.model_copy(update=update) if check.rule == rule else check for check in rules.checks)
    return rules.model_copy(update={"checks": checks})


def test_a_guard_may_have_a_level_of_its_own() -> None:
    night_before = night(candidate=36, base=28)
    assert judged(night_before)["verdict"] == "pass"
    decided = gate.judge(changed(RULES, "not_inferior", level=0.999), night_before, CHAMPION, CANDIDATE)
    assert decided["verdict"] == "inconclusive"
    assert "99.9 % interval" in decided["reason"]


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
        update={
            "checks": tuple(
                check.model_copy(update={"blocking": "callers" not in check.name}) for check in RULES.checks
            )
        }
    )
    decided = gate.judge(lenient, night(guarded=(30, 10)), CHAMPION, CANDIDATE)
    assert decided["verdict"] == "pass"
    broken = [check["suite"] for check in decided["checks"] if check["refuted"]]
    assert broken == ["gate", "gate"]  # against the champion, and against the best ever, who is the champion


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


def evaluated(where: Path) -> Path:
    directory = where / "20260102T000000Z"
    evaluation = directory / "evaluation"
    evaluation.mkdir(parents=True)
    for suite, found in night().items():
        (evaluation / f"{suite}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    cycle.write_json(evaluation / "evaluation.json", {"champion": CHAMPION, "candidate": CANDIDATE})
    return directory


def test_the_verdict_is_a_file_written_once_for_the_same_evaluation_and_rules(tmp_path: Path) -> None:
    directory = evaluated(tmp_path)
    decided = gate.run(directory)
    assert decided["verdict"] == "pass"
    assert gate.run(directory) == decided  # the time of the decision, too

    stricter = tmp_path / "gate.yaml"
    stricter.write_text(gate_rules.RULES.read_text().replace("minimum_items: 50", "minimum_items: 101"))
    assert gate.run(directory, stricter)["verdict"] == "inconclusive"


def test_a_cycle_without_an_evaluation_cannot_be_judged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        gate.run(tmp_path)


BUDGET = "error_budget: {alpha_a_night: 0.01, window_days: 30, alpha_a_window: 0.36}\n"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (
            BUDGET
            + "level: 2\nchecks: [{name: a, rule: length_share, suite: s, bound: 1, minimum_items: 1}]",
            "level",
        ),
        (
            BUDGET + "level: 0.9\nchecks: []",
            "checks",
        ),
        (
            BUDGET + "level: 0.9\nchecks: [{name: a, rule: vote, suite: s}]",
            "vote",
        ),
        (
            BUDGET + "level: 0.9\nchecks: [{name: a, rule: superior, suite: s, against: champion, margn: 1}]",
            "margn",
        ),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused_by_name(tmp_path: Path, wrong: str, named: str) -> None:
    rules = tmp_path / "gate.yaml"
    rules.write_text(wrong)
    with pytest.raises(ValidationError, match=named):
        gate_rules.read_rules(rules)


def test_a_candidate_that_changes_nothing_of_a_full_guard_suite_is_no_worse() -> None:
    cap = next(suite.cap for suite in read_config().suites if suite.name == "gate")
    assert cap is not None
    equal = night() | {"gate": rows("champion", share(40, cap)) + rows("candidate", share(40, cap))}
    guards = [check for check in judged(equal)["checks"] if check["suite"] == "gate"]
    assert len(guards) == 3 and all(guard["holds"] for guard in guards)


# Claims: exact, a family, within a budget; and what it would take.


def test_four_answers_gained_and_none_lost_are_no_proof() -> None:
    """By the interval they were: it is an approximation, and the chance of this by luck alone is 1 in 16."""
    decided = judged(night(champion=30, candidate=34, guarded=(12, 12)))
    claim = decided["checks"][0]
    assert claim["ci_low"] > 0
    assert claim["p_value"] == pytest.approx(1 / 16)
    assert decided["verdict"] == "inconclusive"


def test_an_inconclusive_night_says_how_many_more_items_would_decide_and_what_tonight_could_show() -> None:
    decided = judged(night(champion=30, candidate=35, guarded=(12, 12)))
    claim = decided["checks"][0]
    assert claim["more_items"] > 100
    assert f"about {claim['more_items']:,} more items of simple_python" in decided["reason"]
    assert 0.05 < claim["detectable"] < 0.2
    assert f"a difference of {claim['detectable']:.3f} would have been shown" in decided["reason"]


def test_where_nothing_speaks_for_the_candidate_no_number_of_items_is_told() -> None:
    decided = judged(night(champion=30, candidate=30, guarded=(12, 12)))
    assert decided["checks"][0]["more_items"] is None
    assert "it would take" not in decided["reason"].rpartition("would have been shown")[2]


def test_a_suite_that_is_short_says_how_many_items_it_lacks() -> None:
    short = night() | {"gate": rows("champion", share(0, 5)) + rows("candidate", share(5, 5))}
    assert "10 more items of gate" in judged(short)["reason"]


def test_with_too_few_items_to_show_anything_that_is_said() -> None:
    few = changed(RULES, "superior", minimum_items=1)
    tiny = {"simple_python": rows("champion", [False] * 3) + rows("candidate", [True] * 3)}
    claim = gate.judge(few, tiny, CHAMPION, CANDIDATE)["checks"][0]
    assert claim["detectable"] is None and "too few to show any difference" in claim["detail"]


def test_a_check_that_may_be_short_is_passed_over_until_its_suite_has_grown() -> None:
    rules = changed(RULES, "not_inferior", may_be_short=True)
    suites = night()
    del suites["gate"]
    decided = gate.judge(rules, suites, CHAMPION, CANDIDATE)
    assert decided["verdict"] == "pass"
    passed_over = [check["suite"] for check in decided["checks"] if check["passed_over"]]
    assert passed_over == ["gate", "gate", "regressions", "gate"]
    assert "gate" not in decided["reason"]


def two_targets(first: int, second: int) -> dict[str, Any]:
    """The verdict on two claims; of 100 items each, so many became right and none wrong."""
    target = RULES.checks[0]
    rules = RULES.model_copy(
        update={"checks": (target, target.model_copy(update={"name": "better at chess", "suite": "chess"}))}
    )
    suites = {
        "simple_python": rows("champion", share(0, 100)) + rows("candidate", share(first, 100)),
        "chess": rows("champion", share(0, 100)) + rows("candidate", share(second, 100)),
    }
    return gate.judge(rules, suites, CHAMPION, CANDIDATE)


def test_of_two_claims_one_is_enough_but_it_must_be_twice_as_sure() -> None:
    assert two_targets(7, 0)["verdict"] == "inconclusive"  # p 1/128, enough for one claim alone
    decided = two_targets(8, 0)  # p 1/256
    assert decided["verdict"] == "pass"
    assert decided["family"] == ["better than the champion", "better at chess"]
    assert [check["holds"] for check in decided["checks"]] == [True, False]
    assert decided["checks"][0]["p_adjusted"] == pytest.approx(2 / 256)
    assert [check["holds"] for check in two_targets(8, 7)["checks"]] == [True, True]  # Holm's second step


def test_a_second_claim_that_is_shown_to_be_wrong_fails_the_night() -> None:
    target = RULES.checks[0]
    rules = RULES.model_copy(
        update={"checks": (target, target.model_copy(update={"name": "better at chess", "suite": "chess"}))}
    )
    suites = night() | {"chess": rows("champion", share(60, 100)) + rows("candidate", share(30, 100))}
    assert gate.judge(rules, suites, CHAMPION, CANDIDATE)["verdict"] == "fail"


# The best ever.


def test_losses_too_small_for_one_night_do_not_add_up_against_the_best_ever() -> None:
    best = {"model_version": "gemma:20250101T000000Z", "sha256": "b" * 64}
    suites = night(guarded=(20, 20))  # no worse than tonight's champion …
    suites["gate"] += rows("best_ever", share(30, 40))  # … who is worse than who served a month ago
    decided = gate.judge(RULES, suites, CHAMPION, CANDIDATE, best_ever={"gate": best})
    assert decided["verdict"] == "fail"
    assert "no worse than the best ever on what callers showed" in decided["reason"]
    assert decided["best_ever"]["gate"] == best
    assert decided["best_ever"]["simple_python"] == CHAMPION


def test_a_best_ever_that_was_not_asked_is_not_taken_for_the_champion() -> None:
    best = {"gate": {"model_version": "gemma:20250101T000000Z", "sha256": "b" * 64}}
    decided = gate.judge(RULES, night(), CHAMPION, CANDIDATE, best_ever=best)
    assert decided["verdict"] == "inconclusive"
    assert "40 items were asked of only one of the two" in decided["reason"]


# The error budget.

DECLARED = ErrorBudget(alpha_a_night=0.01, window_days=30, alpha_a_window=0.05)


def judged_night(cycles: Path, name: str, **record: Any) -> None:
    (cycles / name).mkdir(parents=True)
    cycle.write_json(cycles / name / "gate.json", record)


def test_nights_of_the_window_spend_the_budget_and_earlier_ones_do_not(tmp_path: Path) -> None:
    for day in range(1, 4):
        judged_night(tmp_path, f"2026010{day}T020000Z", alpha=0.01)
    judged_night(tmp_path, "20260104T020000Z", alpha=0.0)  # tested nothing
    judged_night(tmp_path, "20260105T020000Z", verdict="fail")  # says nothing of what it spent
    (tmp_path / "20260106T020000Z").mkdir()
    (tmp_path / "20260106T020000Z" / "gate.json").write_text("{half")
    found = budget.tonight(tmp_path / "20260107T020000Z", DECLARED)
    assert found.spent == pytest.approx(0.05) and found.nights == 5
    assert found.alpha == 0
    later = budget.tonight(tmp_path / "20260203T010000Z", DECLARED)
    assert later.spent == pytest.approx(0.02)
    assert later.alpha == 0.01
    assert budget.tonight(tmp_path / "by hand", DECLARED).spent == 0


def test_a_night_takes_at_most_half_of_what_is_left() -> None:
    assert Budget(DECLARED).alpha == 0.01
    assert Budget(DECLARED, 0.04).alpha == pytest.approx(0.005)
    assert Budget(DECLARED, 1.0).alpha == 0


def test_whatever_is_run_again_the_window_is_never_overspent() -> None:
    spent = 0.0
    for _ in range(1000):
        spent += Budget(DECLARED, spent).alpha
    assert spent <= DECLARED.alpha_a_window


def test_a_night_without_budget_holds_and_says_why() -> None:
    decided = gate.judge(RULES, night(), CHAMPION, CANDIDATE, Budget(RULES.error_budget, 9.0))
    assert decided["verdict"] == "inconclusive"
    assert "the error budget is spent" in decided["reason"]


def test_a_night_that_tests_nothing_spends_nothing() -> None:
    spends = [
        judged(night())["alpha"],
        judged({})["alpha"],
        gate.judge(RULES, night(), CHAMPION, {**CANDIDATE, "sha256": CHAMPION["sha256"]})["alpha"],
    ]
    assert spends == [0.01, 0.0, 0.0]


def test_the_verdict_tells_how_many_wrong_promotions_a_year_are_allowed_for() -> None:
    told = judged(night())["error_budget"]
    assert told["wrong_promotions_a_year_at_most"] == pytest.approx(3.65)
    assert told["left"] == pytest.approx(0.35)


def test_what_earlier_nights_spent_is_an_input_of_the_verdict(tmp_path: Path) -> None:
    directory = evaluated(tmp_path)
    first = gate.run(directory)
    judged_night(tmp_path, "20260101T020000Z", alpha=0.01)
    assert (
        gate.run(directory)["error_budget"]["spent_before"] == 0.01 != first["error_budget"]["spent_before"]
    )


def test_a_budget_smaller_than_two_nights_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"alpha_a_window is 0\.01"):
        ErrorBudget(alpha_a_night=0.01, window_days=30, alpha_a_window=0.01)


def test_two_checks_of_one_name_are_refused() -> None:
    with pytest.raises(ValidationError, match="two checks have the name 'better than the champion'"):
        gate_rules.Rules.model_validate(RULES.model_dump() | {"checks": [RULES.checks[0].model_dump()] * 2})


# Past failures, and figures that are no answers.


def test_past_failures_that_come_back_hold_or_fail_a_night() -> None:
    suites = night() | {"regressions": rows("champion", share(30, 30)) + rows("candidate", share(10, 30))}
    decided = judged(suites)
    assert decided["verdict"] == "fail"
    assert "no past failure comes back" in decided["reason"]


FULL = gate_rules.read_rules(gate_rules.RULES.with_name("gate-full.yaml"))
FIGURES = {
    "base_constrained": {"perplexity": 30.0},
    "champion": {"perplexity": 30.0, "first_token_ms": 200.0, "tokens_per_s": 40.0},
    "candidate": {"perplexity": 40.0, "first_token_ms": 210.0, "tokens_per_s": 41.0},
}


def full_night(**figures: dict[str, float]) -> dict[str, Any]:
    suites = night() | {"parallel": rows("champion", share(0, 100)) + rows("candidate", share(2, 100))}
    return gate.judge(FULL, suites, CHAMPION, CANDIDATE, measured=FIGURES | figures)


def test_a_candidate_that_knows_its_language_and_is_as_fast_passes_the_full_gate() -> None:
    decided = full_night()
    assert decided["verdict"] == "pass", decided["reason"]
    (language,) = [check for check in decided["checks"] if check["name"] == "still knows its language"]
    assert language["holds"] and "1.33 of it (0 to 3 may be)" in language["detail"]


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        ({"perplexity": 4000.0}, "still knows its language: perplexity is 4000"),
        ({"first_token_ms": 900.0}, "its first token is as soon"),
        ({"tokens_per_s": 9.0}, "as fast"),
    ],
)
def test_a_candidate_with_a_figure_out_of_bounds_fails(figure: dict[str, float], said: str) -> None:
    decided = full_night(candidate=FIGURES["candidate"] | figure)
    assert decided["verdict"] == "fail" and said in decided["reason"]


def test_a_figure_that_was_not_measured_holds_the_champion() -> None:
    decided = full_night(candidate={})
    assert decided["verdict"] == "inconclusive" and "was not measured of both" in decided["reason"]
