"""What only the last line of `make learn` may read, and that it reads it once."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from demo.learn.week import week
from grpc_server.domain.plain import message_to_plain
from grpc_server.domain.types import Message, Role, ToolCall
from training import bfcl, bfcl_calls, curate, cycle, sealed, suites
from training.asking import Question
from training.data import make_barred
from training.datasets import importing
from training.subjects import Place, Subject

HOME = Path(__file__).resolve().parents[2]
FOLDERS = ("agentloop", "benchmarks", "dags", "demo", "grpc_server", "scripts", "training", "validation")
MAY_READ = {"training/sealed.py", "training/data/make_barred.py"}
STAND_IN = range(210, 215)


@pytest.fixture(scope="module")
def unreadable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The leaderboard's files, in which each sealed line has its id, and then no JSON."""
    real, folder = bfcl.data_folder(), tmp_path_factory.mktemp("leaderboard")
    shutil.copytree(real, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("unused_datasets"))
    name = "BFCL_v4_simple_python.json"
    for path in (folder / name, folder / "possible_answer" / name):
        lines = path.read_text().splitlines()
        path.write_text("".join(f"{_broken(line)}\n" for line in lines))
    return folder


def _broken(line: str) -> str:
    found = re.match(r'\{"id": "simple_python_(\d+)",', line)
    assert found
    return f"{found[0]} sealed" if int(found[1]) in bfcl.SEALED else line


def test_nothing_that_reads_the_leaderboard_parses_a_sealed_line(
    unreadable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bfcl, "data_folder", lambda: unreadable)
    every = {one.id for category in bfcl.TRAFFIC_CATEGORIES for one in bfcl.items(category)}
    every |= {one.id for one in bfcl.evaluation_items()} | {one.id for one in bfcl.traffic()}
    every |= {one.id for category in bfcl_calls.CATEGORIES for one in bfcl_calls.items(category)}
    every |= {one.id for night in week() for one in night}
    every |= {json.loads(line)["id"] for line in bfcl.read_lines("simple_python", None)}
    every |= set(bfcl.read_answers("simple_python", range(400)))
    for config in (HOME / "training/configs").rglob("suites*.yaml"):
        assert any(curate.evaluated(config).values())
        for suite in suites.read_config(config).suites:
            if suite.source in ("leaderboard", "reviewed"):
                every |= {one.id for one in suites.items(suite, tmp_path, 64)}
    told = importing.run([unreadable / "BFCL_v4_simple_python.json"], tmp_path / "sets")
    assert told["held_out"] == 200
    assert not every & {f"simple_python_{number}" for number in bfcl.SEALED}
    assert "simple_python_299" in every


def test_the_two_that_may_read_the_sealed_lines_would_have_met_them(
    unreadable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bfcl, "data_folder", lambda: unreadable)
    with pytest.raises(json.JSONDecodeError):
        make_barred.main(tmp_path / "barred.json")
    with pytest.raises(json.JSONDecodeError):
        list(map(json.loads, bfcl.read_lines("simple_python", None, unsealed=True)))


def test_only_those_two_ask_for_what_is_sealed_and_only_one_file_opens_the_leaderboard() -> None:
    asking, opening = set(), set()
    for folder in (HOME / name for name in FOLDERS):
        for path in folder.rglob("*.py"):
            text, name = path.read_text(encoding="utf-8"), path.relative_to(HOME).as_posix()
            if "unsealed" in text and name != "training/bfcl.py":
                asking.add(name)
            if "BFCL_v4_" in text:
                opening.add(name)
    assert asking == MAY_READ
    assert opening == {"training/bfcl.py"}


# The score, on items that are not sealed.


class Answers:
    """In place of the model: right answers to all, but one in words and one call that is wrong."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fails_after: int | None = None

    async def __call__(
        self, questions: Sequence[Question], _config: Any, place: Place, progress: Any
    ) -> Mapping[str, Any]:
        place.state_dir.mkdir(parents=True, exist_ok=True)
        given = {}
        for number, question in enumerate(questions):
            if number == self.fails_after:
                raise OSError("no space left on device")
            self.asked.append(question.item.id)
            call = bfcl.item(question.item.id).demonstration
            said = {
                0: Message(Role.ASSISTANT, "I do not know."),
                1: Message(Role.ASSISTANT, tool_calls=(ToolCall(call.name, {"x": 1}),)),
            }.get(number, Message(Role.ASSISTANT, tool_calls=(call,)))
            given[question.key] = {"key": question.key, "answer": message_to_plain(said)}
            progress(number + 1, len(questions))
        return given


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    made = Answers()
    monkeypatch.setattr(sealed, "ask_all", made)
    return made


SUBJECT = Subject("candidate", "gemma-3-270m:20260101T000000Z", Path("model.gguf"), "a" * 64)
OTHER = Subject("candidate", "gemma-3-270m:20260102T000000Z", Path("model.gguf"), "b" * 64)


def place(tmp_path: Path) -> Place:
    return Place(tmp_path, tmp_path / "cycles", tmp_path / "base.gguf")


async def test_the_score_is_the_official_checkers_and_says_of_what_and_when(
    tmp_path: Path, answers: Answers
) -> None:
    folder = tmp_path / "sealed"
    assert sealed.result(folder) is None
    found = await sealed.score(folder, SUBJECT, place(tmp_path), numbers=STAND_IN)
    assert (found["n"], found["correct"], found["correct_by_our_scorer"]) == (5, 3, 3)
    assert found["ci_low"] < found["accuracy"] == 0.6 < found["ci_high"]
    assert found["items"] == "simple_python 210-214"
    assert found["wrong"] == ["simple_python_210", "simple_python_211"]
    assert (found["model_version"], found["sha256"]) == (SUBJECT.model_version, SUBJECT.sha256)
    assert found["opened_at"] <= found["scored_at"]
    assert found["checker"] == "bfcl-eval 2026.3.23, ast_checker"
    assert sealed.result(folder) == found
    assert sorted(path.name for path in folder.iterdir()) == ["opened.json", "result.json"]


async def test_a_second_score_is_refused_and_the_first_stands(tmp_path: Path, answers: Answers) -> None:
    first = await sealed.score(tmp_path / "sealed", SUBJECT, place(tmp_path), numbers=STAND_IN)
    for subject in (SUBJECT, OTHER):
        with pytest.raises(sealed.SealBrokenError, match=r"were scored at .* 0\.600; that stands"):
            await sealed.score(tmp_path / "sealed", subject, place(tmp_path), numbers=STAND_IN)
    assert sealed.result(tmp_path / "sealed") == first
    assert len(answers.asked) == 5


async def test_a_scoring_that_broke_off_goes_on_for_that_version_and_those_items_alone(
    tmp_path: Path, answers: Answers
) -> None:
    answers.fails_after = 2
    with pytest.raises(OSError, match="no space"):
        await sealed.score(tmp_path / "sealed", SUBJECT, place(tmp_path), numbers=STAND_IN)
    answers.fails_after = None
    opened = cycle.read_json(tmp_path / "sealed/opened.json")
    for subject, numbers in ((OTHER, STAND_IN), (SUBJECT, range(220, 225))):
        with pytest.raises(sealed.SealBrokenError, match=r"the seal was broken at 20.* only that can"):
            await sealed.score(tmp_path / "sealed", subject, place(tmp_path), numbers=numbers)
    found = await sealed.score(tmp_path / "sealed", SUBJECT, place(tmp_path), numbers=STAND_IN)
    assert found["opened_at"] == opened["opened_at"]
