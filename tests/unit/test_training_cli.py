"""`python -m training`: what a step prints, and the exit code that scripts and the nightly DAG act on."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.unit.test_curate import frozen, traffic
from tests.unit.test_gate import CANDIDATE, CHAMPION, night
from training import cycle
from training.__main__ import app

runner = CliRunner()
CYCLE = "20260102T000000Z"


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTLOOP_STATE_DIR", str(tmp_path / "state"))


def test_curate_says_what_it_made(tmp_path: Path) -> None:
    directory = frozen(tmp_path / CYCLE, traffic(0, 60))
    done = runner.invoke(app, ["curate", "--cycle", str(directory)])
    assert done.exit_code == 0, done.output
    assert "training examples" in done.stdout and "excluded: none" in done.stdout
    told = runner.invoke(app, ["curate", "--cycle", str(directory), "--json"])
    assert json.loads(told.stdout) == cycle.read_json(directory / "dataset" / "dataset.json")


def test_curate_skips_what_follows_where_there_is_nothing_to_learn(tmp_path: Path) -> None:
    directory = frozen(tmp_path / CYCLE, traffic(0, 5))
    for _ in range(2):  # the second time, too, when there is nothing to do
        done = runner.invoke(app, ["curate", "--cycle", str(directory)])
        assert done.exit_code == 99
        assert "Nothing to learn" in done.stderr and "32 needed" in done.stderr
    rules = tmp_path / "curation.yaml"
    rules.write_text("{min_examples: 2, gate_share: 0}")
    done = runner.invoke(app, ["curate", "--cycle", str(directory), "--rules", str(rules)])
    assert done.exit_code == 0
    rules.write_text("{min_examples: 0, gate_share: 0}")
    done = runner.invoke(app, ["curate", "--cycle", str(directory), "--rules", str(rules)])
    assert done.exit_code == 1 and "min_examples" in done.stderr and "Traceback" not in done.output


def test_curate_explains_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / CYCLE).mkdir()
    done = runner.invoke(app, ["curate", "--cycle", str(tmp_path / CYCLE)])
    assert done.exit_code == 1
    assert "inferences.parquet" in done.stderr and "Traceback" not in done.output


def test_a_folder_that_is_no_cycle_is_refused(tmp_path: Path) -> None:
    done = runner.invoke(app, ["curate", "--cycle", str(tmp_path)])
    assert done.exit_code == 1 and "cycle id" in done.stderr


def test_an_option_out_of_range_is_a_usage_error(tmp_path: Path) -> None:
    assert runner.invoke(app, ["evaluate", "--cycle", str(tmp_path), "--engine", "abacus"]).exit_code == 2
    assert runner.invoke(app, ["gate"]).exit_code == 2


@pytest.mark.parametrize(("candidate", "verdict"), [(30, "pass"), (5, "inconclusive"), (0, "fail")])
def test_gate_ends_well_on_any_verdict(tmp_path: Path, candidate: int, verdict: str) -> None:
    evaluation = tmp_path / CYCLE / "evaluation"
    evaluation.mkdir(parents=True)
    for suite, rows in night(candidate=candidate).items():
        (evaluation / f"{suite}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cycle.write_json(evaluation / "evaluation.json", {"champion": CHAMPION, "candidate": CANDIDATE})
    done = runner.invoke(app, ["gate", "--cycle", str(tmp_path / CYCLE)])
    assert done.exit_code == 0
    assert done.stdout.startswith(f"{verdict}: ")


def test_rules_that_cannot_be_meant_are_explained(tmp_path: Path) -> None:
    (tmp_path / CYCLE / "evaluation").mkdir(parents=True)
    cycle.write_json(tmp_path / CYCLE / "evaluation" / "evaluation.json", {})
    rules = tmp_path / "gate.yaml"
    rules.write_text("level: 3\nchecks: []\n")
    done = runner.invoke(app, ["gate", "--cycle", str(tmp_path / CYCLE), "--rules", str(rules)])
    assert done.exit_code == 1
    assert "level" in done.stderr and "Traceback" not in done.output


def test_evaluate_names_the_model_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / CYCLE).mkdir()
    arguments = ["evaluate", "--cycle", str(tmp_path / CYCLE), "--state-dir", str(tmp_path / "var")]
    done = runner.invoke(app, [*arguments, "--champion", "gemma-3-270m:20260101T000000Z"])
    assert done.exit_code == 1
    assert str(tmp_path / "20260101T000000Z" / "model.gguf") in done.stderr.replace("\n", "")


@pytest.mark.parametrize("step", ["curate", "evaluate", "gate"])
def test_every_step_explains_itself(step: str) -> None:
    done = runner.invoke(app, [step, "--help"])
    assert done.exit_code == 0 and "--cycle" in done.stdout
