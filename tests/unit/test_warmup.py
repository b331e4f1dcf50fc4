"""A warm-up: the first cycle's dataset from imported sets, by curation, and then a cycle like any other."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentloop.night import Night
from grpc_server.domain.plain import request_from_plain
from tests.unit.test_curate import frozen, traffic
from training import bfcl, curate, cycle, erase, warmup
from training.__main__ import app
from training.datasets import importing
from training.neighbours import Neighbours, question

runner = CliRunner()
FIRST, SECOND = "20260101T000000Z", "20260102T000000Z"


@pytest.fixture(scope="session")
def leaderboard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real questions of the leaderboard, imported."""
    files = [bfcl.data_folder() / f"BFCL_v4_{category}.json" for category in ("simple_python", "live_simple")]
    sets = tmp_path_factory.mktemp("sets")
    importing.run(files, sets, name="bfcl")
    return sets / "bfcl"


def openai_set(folder: Path, name: str, *answers: str, size: int = 1) -> Path:
    """An imported set of questions that have nothing in common."""
    path = folder / f"{name}.jsonl"
    with path.open("w") as file:
        for number, answer in enumerate(answers):
            asked = hashlib.sha256(f"{name} {number}".encode()).hexdigest()
            said = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer * size}]
            file.write(json.dumps({"messages": said}) + "\n")
    importing.run([path], folder / "sets")
    return folder / "sets" / name


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_dataset_comes_of_an_imported_set_as_it_does_of_the_log(leaderboard: Path, tmp_path: Path) -> None:
    directory = tmp_path / FIRST
    found = warmup.run(directory, [leaderboard])
    train, gate = (lines(directory / "dataset" / name) for name in ("train.jsonl", "gate.jsonl"))
    assert found["enough"] and len(train) == found["train"] > 200 and len(gate) == found["gate"] > 15
    assert found["sets"] == [
        {
            "name": "bfcl",
            "formats": ["bfcl"],
            "examples": found["sets"][0]["examples"],
            "taken": found["rows"],
        }
    ]
    judged = Neighbours(question(request_from_plain(line["request"])) for line in gate)
    assert not any(judged.near(line["question"]) for line in train)
    assert not {line["session_id"] for line in train} & {line["session_id"] for line in gate}


def test_run_again_it_does_nothing_and_other_sets_make_it_anew(tmp_path: Path) -> None:
    one, other = openai_set(tmp_path, "one", "a", "b"), openai_set(tmp_path, "other", "c")
    directory = tmp_path / FIRST
    warmup.run(directory, [one])
    before = (directory / "dataset" / "train.jsonl").stat()
    warmup.run(directory, [one])
    assert (directory / "dataset" / "train.jsonl").stat() == before
    warmup.run(directory, [one, other])
    assert (directory / "dataset" / "train.jsonl").stat() != before


def test_sets_take_turns_so_that_a_small_one_is_whole_and_none_counts_twice(tmp_path: Path) -> None:
    small = openai_set(tmp_path, "small", *"ab")
    large = openai_set(tmp_path, "large", *(f"answer {number}" for number in range(50)))
    files = {
        "small": small / "examples.jsonl",
        "large": large / "examples.jsonl",
        "again": small / "examples.jsonl",
    }
    taken = warmup.sample(files, 10)
    assert {name: len(found) for name, found in taken.items()} == {"small": 2, "large": 8, "again": 0}
    assert warmup.sample(files, 10) == taken
    assert sum(map(len, warmup.sample(files, 1000).values())) == 52
    doubled = tmp_path / "doubled.jsonl"
    doubled.write_text((small / "examples.jsonl").read_text() * 30)
    assert len(warmup.sample({"doubled": doubled}, 10)["doubled"]) == 2


def test_what_is_too_long_to_be_learned_takes_no_place(tmp_path: Path) -> None:
    long, short = openai_set(tmp_path, "long", "word ", size=1000), openai_set(tmp_path, "short", "a")
    files = {"long": long / "examples.jsonl", "short": short / "examples.jsonl"}
    assert {name: len(found) for name, found in warmup.sample(files, 1).items()} == {"long": 0, "short": 1}


def test_the_next_night_learns_the_log_with_what_the_warm_up_taught(
    leaderboard: Path, tmp_path: Path
) -> None:
    first = tmp_path / FIRST
    warmed = warmup.run(first, [leaderboard])
    cycle.write_json(first / "gate.json", {"verdict": "pass"})
    found = curate.run(frozen(tmp_path / SECOND, traffic(0, 60)))
    assert found["new_train"] > 0
    assert found["train"] >= warmed["train"] and found["cycles"] == [FIRST, SECOND]
    ids = [line["inference_id"] for line in lines(tmp_path / SECOND / "dataset" / "train.jsonl")]
    assert ids == sorted(ids) and ids[0].startswith("00000000-0000-7"), "public examples are the oldest"


def test_a_set_can_be_erased_like_a_caller(tmp_path: Path) -> None:
    one, other = openai_set(tmp_path, "one", *"abc"), openai_set(tmp_path, "other", *"de")
    cycles = tmp_path / "cycles"
    warmup.run(cycles / FIRST, [one, other])
    erase.run(cycles, erase.Erasure("e1", erase.Subject(caller="dataset:one"), by="ops"))
    kept = lines(cycles / FIRST / "dataset" / "train.jsonl") + lines(
        cycles / FIRST / "dataset" / "gate.jsonl"
    )
    assert len(kept) == 2
    assert cycle.read_json(cycles / FIRST / "snapshot" / "sets.json")["rows"] == 2


def test_the_report_of_a_warm_up_goes_on_after_its_dataset(leaderboard: Path, tmp_path: Path) -> None:
    warmup.run(tmp_path / FIRST, [leaderboard])
    steps = {step.name: step for step in Night(tmp_path / FIRST).steps}
    assert [steps[name].state for name in ("freeze", "validate", "curate")] == ["done"] * 3
    assert steps["freeze"].title == "Imported sets"
    assert steps["finetune"].state == "unfinished"


@pytest.mark.parametrize("names", [[], ["one", "one"]])
def test_sets_are_named_once_and_there_is_at_least_one(tmp_path: Path, names: list[str]) -> None:
    one = openai_set(tmp_path, "one", "a")
    with pytest.raises(ValueError, match="name at least one, and each once"):
        warmup.run(tmp_path / FIRST, [one for _ in names])


def test_a_folder_that_is_no_set_and_a_set_that_was_damaged_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no imported set; make one with `python -m training import`"):
        warmup.run(tmp_path / FIRST, [tmp_path])
    one = openai_set(tmp_path, "one", "a", "b")
    (one / "examples.jsonl").write_text((one / "examples.jsonl").read_text()[:-20])
    with pytest.raises(ValueError, match=r"examples.jsonl, line 2, is not JSON; import that set again"):
        warmup.run(tmp_path / FIRST, [one])
    assert not (tmp_path / FIRST / "snapshot").exists()


def test_a_cycle_of_the_log_is_not_warmed_up(tmp_path: Path) -> None:
    directory = frozen(tmp_path / FIRST, traffic(0, 5))
    (directory / "snapshot" / "snapshot.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a snapshot of the log"):
        warmup.run(directory, [openai_set(tmp_path, "one", "a")])


def test_the_command_takes_sets_from_its_options_or_the_environment(
    leaderboard: Path, tmp_path: Path
) -> None:
    one = openai_set(tmp_path, "one", "a")
    cycle_option = ["--cycle", str(tmp_path / FIRST)]
    done = runner.invoke(
        app, ["warmup", *cycle_option], env={"AGENTLOOP_WARMUP_FROM": f"{leaderboard}:{one}"}
    )
    assert done.exit_code == 0, done.output
    assert "of bfcl, 1 of 1 of one." in done.stdout
    few = runner.invoke(app, ["warmup", "--from", str(one), "--cycle", str(tmp_path / SECOND), "--json"])
    assert few.exit_code == 99 and "Nothing to learn" in few.stderr
    assert runner.invoke(app, ["warmup", *cycle_option]).exit_code == 2
