"""`make learn`: what is asked on which night, what is kept of it, what is shown."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import bench_learn
from demo.failure import LinkError
from demo.learn import __main__ as command
from demo.learn import conductor, figures, picture
from demo.learn.conductor import Order
from demo.learn.diary import Diary, OtherWeekError
from demo.learn.table import table
from demo.learn.week import LONGEST_PROMPT, week
from demo.plan import Plan
from demo.questions import Questions, remember
from demo.screen import Screen
from demo.traffic import answer
from grpc_server.domain.chat_format import render
from grpc_server.domain.types import ChatRequest
from tests.unit.test_sealed import Answers
from training import bfcl_calls, cycle, gate, gate_rules, recipe, sealed, suites
from training.examples import read_barred

BARRED = read_barred()
WEEK = week()
SHORT = week(2, 5)


# The week.


def test_each_question_is_asked_on_one_night_and_later_nights_ask_longer_ones() -> None:
    nights = WEEK
    asked = [item.id for night in nights for item in night]
    assert len(nights) == 7
    assert len(asked) == len(set(asked)) > 1400
    longest = [max(len(render(item.messages, item.tools)) for item in night) for night in nights]
    assert longest == sorted(longest) and longest[-1] <= LONGEST_PROMPT
    assert max(map(len, nights)) - min(map(len, nights)) <= 1


def test_every_sixth_question_is_one_that_no_function_fits_and_is_answered_in_words() -> None:
    for night in WEEK:
        kinds = Counter(item.id.startswith("live_irrelevance") for item in night)
        assert abs(kinds[True] - len(night) / 6) < 2
        assert [item.id.startswith("live_irrelevance") for item in night[:6]].count(True) == 1
    shown = {answer(item).content for item in night if item.id.startswith("live_irrelevance")}
    assert shown == {bfcl_calls.NO_CALL}
    assert all(answer(item).tool_calls for item in night if not item.id.startswith("live_irrelevance"))


def test_the_week_shares_no_question_and_no_function_with_what_is_held_out() -> None:
    asked = [item for night in WEEK for item in night]
    requests = {item.id: ChatRequest(tuple(item.messages), tools=tuple(item.tools)) for item in asked}
    assert not [item_id for item_id, request in requests.items() if request in BARRED]
    assert not {item.id for item in asked} & {item.id for item in bfcl_calls.items("irrelevance")}


def test_a_short_week_asks_the_shortest() -> None:
    nights = week(2, 10)
    assert [len(night) for night in nights] == [12, 12]
    assert max(len(render(item.messages, item.tools)) for night in nights for item in night) < 400
    with pytest.raises(ValueError, match="at most as many nights"):
        week(5000)


def test_what_several_calls_answer_is_not_answered_in_words() -> None:
    with pytest.raises(ValueError, match="parallel_0 is answered by calls"):
        _ = bfcl_calls.items("parallel")[0].answer


# The diary.


def test_a_night_that_was_cut_off_goes_on_with_what_is_left_in_the_same_cycle(tmp_path: Path) -> None:
    diary, (items, _) = Diary(tmp_path / "nights"), SHORT
    first = diary.asks(1, items)
    assert (first.items, first.slowly, first.new) == (items, items, 6)
    for item in items[:4]:
        first.shown(item.id)
    with (tmp_path / "nights/1.asked").open("a") as file:
        file.write(items[4].id)  # and was killed
    began = diary.cycle_of(1)
    again = Diary(tmp_path / "nights")
    assert again.asks(1, items).items == items[4:]
    assert (again.cycle_of(1), again.ended(1), again.cycles()) == (began, False, [])
    again.end(1)
    assert (again.ended(1), again.cycles()) == (True, [began])


def test_a_clock_that_was_set_back_puts_no_night_before_an_earlier_one(tmp_path: Path) -> None:
    diary = Diary(tmp_path)
    cycle.write_json(tmp_path / "1.json", {"night": 1, "cycle_id": "20990101T000000Z", "ended": True})
    assert diary.cycle_of(2) == "20990101T000001Z"


def test_other_nights_are_not_mixed_with_those_that_were_begun(tmp_path: Path) -> None:
    diary = Diary(tmp_path)
    diary.begin(SHORT)
    diary.begin(SHORT)
    with pytest.raises(OtherWeekError, match="has 2 nights of 6 questions, not 3 of 268"):
        diary.begin(WEEK[:3])


# What is shown.


def measured(correct: int, n: int = 100) -> dict[str, Any]:
    share = correct / n
    return {"n": n, "correct": correct, "accuracy": share, "ci_low": share - 0.05, "ci_high": share + 0.05}


def a_night(
    folder: Path, cycle_id: str, champion: int, candidate: int, *, serves: str, verdict: str = "pass"
) -> Path:
    directory = folder / cycle_id
    sides = {"champion": measured(champion), "candidate": measured(candidate)}
    cycle.write_json(
        directory / "evaluation/summary.json",
        {
            "simple_python": sides,
            "gate": sides,
            "irrelevance": {"champion": sides["champion"], "candidate": measured(80)},
        },
    )
    cycle.write_json(directory / "dataset/dataset.json", {"train": 200, "new_train": 200, "excluded": {}})
    cycle.write_json(
        directory / "gate.json",
        {"verdict": verdict, "reason": "so it is", "candidate": {"model_version": f"m:{cycle_id}"}},
    )
    route = [{"model_version": serves, "role": "stable", "weight": 100}]
    cycle.write_json(directory / "demo.json", {"requests": 240, "seconds": 3600, "route_after": route})
    return directory


SCORE = {
    "items": "simple_python 300-399",
    "checker": "bfcl-eval",
    "model_version": "m:1",
    "scored_at": "2026-11-25T06:00:00+00:00",
    **measured(62),
}


def shown_by(found: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table(found))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_figures_tell_each_night_what_serves_after_it_and_the_sealed_score(tmp_path: Path) -> None:
    first = a_night(tmp_path, "20260101T000000Z", 0, 40, serves="m:20260101T000000Z")
    second = a_night(
        tmp_path, "20260102T000000Z", 40, 38, serves="m:20260101T000000Z", verdict="inconclusive"
    )
    third = a_night(tmp_path, "20260103T000000Z", 40, 55, serves="m:20260103T000000Z")
    found = figures.figures([first, second, third], SCORE)
    assert [night["promoted"] for night in found["nights"]] == [True, False, True]
    assert [night["served"]["simple_python"]["correct"] for night in found["nights"]] == [40, 40, 55]
    assert found["never_worse"] is True
    assert (found["served"], found["irrelevance"]) == ("m:20260103T000000Z", 0.8)
    assert (found["holds"], found["goal"], found["sealed"]) == (True, 0.616, SCORE)
    text = shown_by(found)
    for part in (
        "0.40 (0.35 to 0.45)",
        "inconclusive",
        "pass, serves",
        "0.62 (0.57 to 0.67) right, of m:1, scored once, at 2026-11-25T06:00:00+00:00",
        "the goal of 0.616 is reached",
    ):
        assert part in text
    assert "less often" not in text


def test_a_promotion_that_made_it_worse_is_told_and_so_is_a_score_below_the_goal(tmp_path: Path) -> None:
    first = a_night(tmp_path, "20260101T000000Z", 0, 40, serves="m:20260101T000000Z")
    second = a_night(tmp_path, "20260102T000000Z", 40, 39, serves="m:20260102T000000Z")
    found = figures.figures([first, second], SCORE | measured(50))
    assert (found["never_worse"], found["holds"]) == (False, False)
    assert "less often" in shown_by(found) and "is not reached" in shown_by(found)


def test_before_the_first_night_and_after_one_that_was_skipped_there_are_figures_too(tmp_path: Path) -> None:
    none = figures.figures([], None)
    assert (none["nights"], none["served"], none["sealed"], none["holds"]) == ([], None, None, None)
    assert "not scored yet" in shown_by(none)
    route = [{"model_version": "m:base", "role": "stable", "weight": 100}]
    cycle.write_json(tmp_path / "20260101T000000Z/demo.json", {"route_after": route, "seconds": None})
    found = figures.figures([tmp_path / "20260101T000000Z"], None)
    assert (found["nights"][0]["verdict"], found["nights"][0]["promoted"]) == ("skipped", False)
    assert "skipped" in shown_by(found)
    picture.draw(found, tmp_path / "learn.svg")


def test_the_picture_has_every_night_with_its_interval_and_is_the_same_for_the_same_figures(
    tmp_path: Path,
) -> None:
    ids = ("20260101T000000Z", "20260102T000000Z")
    nights = [a_night(tmp_path, each, 30, 33, serves=f"m:{each}") for each in ids]
    found = figures.figures(nights, SCORE)
    picture.draw(found, tmp_path / "one.svg")
    picture.draw(found, tmp_path / "two.svg")
    drawn = (tmp_path / "one.svg").read_text()
    assert drawn == (tmp_path / "two.svg").read_text()
    for part in (
        *picture.TITLES.values(),
        "candidate",
        "serves after the night",
        "simple_python 300-399 (sealed)",
    ):
        assert part in drawn


# The rules of these nights.


def test_the_nights_rules_ask_only_what_their_suites_have_and_spend_no_more_than_a_window() -> None:
    rules = gate_rules.read_rules(conductor.CONFIGS / "gate.yaml")
    asked = {suite.name: suite for suite in suites.read_config(conductor.CONFIGS / "suites.yaml").suites}
    for check in rules.checks:
        assert not isinstance(check, gate_rules.Ratio)
        assert check.suite in asked
        assert getattr(check, "against", "candidate") in ("candidate", *asked[check.suite].subjects)
    budget = rules.error_budget
    spent = 0.0
    for _ in range(7):
        spent += min(budget.alpha_a_night, (budget.alpha_a_window - spent) / 2)
    assert spent == pytest.approx(7 * budget.alpha_a_night)
    assert recipe.read(conductor.CONFIGS / "recipe.yaml").method == "lora"


@pytest.mark.parametrize(("right", "verdict"), [(60, "pass"), (48, "inconclusive"), (20, "fail")])
def test_a_candidate_that_calls_where_no_function_fits_is_held_back(right: int, verdict: str) -> None:
    check = {
        "name": "none",
        "rule": "right_share",
        "suite": "irrelevance",
        "at_least": 0.5,
        "minimum_items": 50,
    }
    better = {
        "name": "better",
        "rule": "superior",
        "suite": "simple_python",
        "against": "champion",
        "minimum_items": 50,
    }
    rules = gate_rules.Rules.model_validate(
        {
            "level": 0.95,
            "error_budget": {"alpha_a_night": 0.05, "window_days": 30, "alpha_a_window": 0.4},
            "checks": [check, better],
        }
    )

    def rows(subject: str, correct: int) -> list[dict[str, Any]]:
        return [
            {
                "item_id": f"i{n}",
                "subject": subject,
                "session_id": "",
                "correct": n < correct,
                "finish_reason": "stop",
            }
            for n in range(100)
        ]

    answers = {
        "simple_python": rows("champion", 0) + rows("candidate", 40),
        "irrelevance": rows("champion", 100) + rows("candidate", right),
    }
    base, made = ({"model_version": name, "sha256": name} for name in ("base", "candidate"))
    decided = gate.judge(rules, answers, base, made)
    assert decided["verdict"] == verdict
    assert f"{right} of 100 answers are right (50% must be)" in decided["checks"][0]["detail"]
    short = gate.judge(rules, answers | {"irrelevance": rows("candidate", 10)[:10]}, base, made)
    assert short["checks"][0]["detail"] == "10 items of irrelevance, 50 needed"


# The command.


@pytest.mark.parametrize("seal", ["300", "399-300", "350-400", "x-y", "1-2-3"])
def test_items_that_are_none_are_refused_by_the_command(seal: str, tmp_path: Path) -> None:
    told = CliRunner().invoke(command.app, ["--seal", seal, "--state-dir", str(tmp_path)])
    assert told.exit_code == 2
    assert "it must be like" in " ".join(told.output.split())
    assert list(tmp_path.iterdir()) == []


def test_a_week_of_other_nights_is_refused_by_the_command(tmp_path: Path) -> None:
    Diary(tmp_path / "nights").begin(SHORT)
    told = CliRunner().invoke(command.app, ["--nights", "3", "--requests", "5", "--state-dir", str(tmp_path)])
    assert told.exit_code == 2
    assert "set another state folder" in " ".join(told.output.replace("│", "").split())


async def test_a_disk_that_is_too_full_for_the_nights_that_are_left_is_told_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conductor, "GIB_A_NIGHT", 10**9)
    plan = Plan(tmp_path / "learn", tmp_path / "learn/cycles", tmp_path / "base.gguf")
    with pytest.raises(LinkError, match="GiB are free"):
        await conductor.conduct(Order(plan, SHORT), Screen(Console(file=io.StringIO())))
    assert not (tmp_path / "learn/nights").exists()


async def test_a_week_that_is_done_and_scored_is_only_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conductor, "FREE_GIB", 0)
    monkeypatch.setattr(conductor, "GIB_A_NIGHT", 0)
    plan = Plan(tmp_path, tmp_path / "cycles", tmp_path / "base.gguf")
    order = Order(plan, SHORT[:1])
    a_night(plan.cycles_dir, order.diary.cycle_of(1), 0, 40, serves=f"m:{order.diary.cycle_of(1)}")
    order.diary.end(1)
    remember(plan.state_dir / "nights/1.asked", "x")
    cycle.write_json(order.sealed_dir / "result.json", SCORE)
    console = Console(file=io.StringIO(), width=200)
    path = await conductor.conduct(order, Screen(console))
    assert json.loads(path.read_text())["sealed"] == SCORE
    assert (tmp_path / "learn.svg").is_file()
    assert "night 1 of 1 is done" in console.file.getvalue()  # type: ignore[attr-defined]


class Turn:
    """In place of a turn of the loop: leaves a cycle, or breaks, the second time."""

    def __init__(self) -> None:
        self.breaks_at = 2
        self.played: list[str] = []

    async def __call__(
        self, plan: Plan, _machine: Any, screen: Screen, choose: Callable[[], Questions]
    ) -> Path:
        chosen = choose()
        self.played.append(plan.cycle_id)
        for item in chosen.items:
            chosen.shown(item.id)
        if len(self.played) == self.breaks_at:
            raise LinkError("night, step finetune", "it ended with exit code 1", "see the log")
        assert plan.night_settings["AGENTLOOP_RECIPE"] == str(conductor.CONFIGS / "recipe.yaml")
        return a_night(plan.cycles_dir, plan.cycle_id, 0, 40, serves=f"gemma-3-270m:{plan.cycle_id}")


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Order:
    monkeypatch.setattr(conductor, "FREE_GIB", 0)
    monkeypatch.setattr(conductor, "GIB_A_NIGHT", 0)
    plan = Plan(tmp_path / "learn", tmp_path / "learn/cycles", tmp_path / "base.gguf", command="make learn")
    return Order(plan, SHORT, range(210, 215))


async def test_a_week_goes_on_at_the_night_that_broke_and_is_scored_at_its_end_once(
    order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn, answers = Turn(), Answers()
    monkeypatch.setattr(conductor, "turn", turn)
    monkeypatch.setattr(sealed, "ask_all", answers)
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(LinkError, match="step finetune"):
        await conductor.conduct(order, Screen(console))
    assert cycle.read_json(order.plan.state_dir / "learn.json")["sealed"] is None
    with pytest.raises(LinkError, match=r"sealed score: .*model\.gguf"):  # the stand-in makes none
        await conductor.conduct(order, Screen(console))
    first, second, again = turn.played
    assert first < second == again
    served = order.plan.cycles_dir / second / "model.gguf"
    served.write_bytes(b"GGUF")
    found = cycle.read_json(await conductor.conduct(order, Screen(console)))
    assert len(turn.played) == 3
    assert (found["sealed"]["correct"], found["sealed"]["sha256"]) == (3, cycle.sha256(served))
    assert found["served"] == found["sealed"]["model_version"] == f"gemma-3-270m:{second}"
    assert cycle.read_json(await conductor.conduct(order, Screen(console))) == found
    assert len(answers.asked) == 5
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"night 1 of 2 is done: {first}" in text
    assert "simple_python 210-214" in text


def test_the_command_does_what_is_ordered_and_prints_the_figures(
    order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordered = []

    async def done(given: Order, screen: Screen) -> Path:
        ordered.append(given)
        cycle.write_json(given.plan.state_dir / "learn.json", {"nights": []})
        return given.plan.state_dir / "learn.json"

    monkeypatch.setattr(command, "conduct", done)
    told = CliRunner().invoke(
        command.app,
        [
            *("--nights", "2", "--requests", "5", "--seal", "210-214", "--json"),
            *("--state-dir", str(order.plan.state_dir)),
        ],
    )
    assert told.exit_code == 0
    assert json.loads(told.output) == {"nights": []}
    (given,) = ordered
    assert (given.week, given.seal, given.plan.state_dir) == (order.week, order.seal, order.plan.state_dir)
    assert given.plan.cycles_dir == order.plan.cycles_dir


def test_the_benchmark_tells_the_curve_the_score_and_its_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTLOOP_LEARN_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="run `make learn` first"):
        bench_learn.run()
    ids = ("20260101T000000Z", "20260102T000000Z")
    right = dict(zip(ids, (40, 38), strict=True))
    nights = [a_night(tmp_path, each, 0, right[each], serves=f"m:{each}") for each in ids]
    cycle.write_json(tmp_path / "learn.json", figures.figures(nights, None))
    with pytest.raises(ValueError, match="no score yet"):
        bench_learn.run()
    cycle.write_json(tmp_path / "learn.json", figures.figures(nights, SCORE))
    told = {line.metric: line for line in bench_learn.run()}
    assert [told[f"right_night_{n}"].value for n in (1, 2)] == [0.4, 0.38]
    assert told["no_call_night_2"].value == 0.8
    assert (told["lost_at_a_promotion"].holds, told["sealed_right"].holds) == (False, True)
    assert (told["sealed_right"].peer_value, told["sealed_low"].value) == (0.616, SCORE["ci_low"])
