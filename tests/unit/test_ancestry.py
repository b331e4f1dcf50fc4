"""The gate judges only a candidate of the dataset that is there: what was erased must not come to serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.unit.test_gate import CANDIDATE, evaluated
from training import ancestry, cycle, erase, gate
from training.__main__ import app

ONE, OTHER = ("018f0000-0000-7000-8000-00000000000" + digit for digit in "12")
ERASURE = erase.Erasure("0197f2a0-0000-4000-8000-000000000001", erase.Subject(inference=ONE), "me")


@pytest.fixture
def night(tmp_path: Path) -> Path:
    """A cycle from curation to evaluation, as the steps leave it."""
    directory = evaluated(tmp_path)
    (directory / "dataset").mkdir()
    lines = "".join(f'{{"inference_id": "{each}"}}\n' for each in (ONE, OTHER))
    (directory / "dataset" / "train.jsonl").write_text(lines)
    (directory / "adapter").mkdir()
    finetune(directory, b"weights")
    quantize(directory, CANDIDATE["sha256"])
    return directory


def finetune(directory: Path, weights: bytes) -> None:
    """What the step leaves."""
    adapter = directory / "adapter"
    (adapter / "adapter_model.safetensors").write_bytes(weights)
    (adapter / "adapter_config.json").write_text("{}")
    files = {"train.jsonl": directory / "dataset" / "train.jsonl"}
    cycle.write_json(adapter / "finetune.json", {"inputs": cycle.inputs_of(files)})


def quantize(directory: Path, sha256: str) -> None:
    """What the step leaves."""
    adapter = directory / "adapter"
    files = {
        "adapter": adapter / "adapter_model.safetensors",
        "adapter_config": adapter / "adapter_config.json",
    }
    cycle.write_json(directory / "quantize.json", {"sha256": sha256, "inputs": cycle.inputs_of(files)})


def test_a_candidate_of_the_dataset_that_is_there_is_judged(night: Path) -> None:
    assert gate.run(night)["verdict"] == "pass"


def test_after_an_erasure_between_two_steps_the_gate_names_each_step_to_run_again(night: Path) -> None:
    erase.run(night.parent, ERASURE)
    refused = rf"erased, last at {ERASURE.at[:10]}.*training finetune --cycle .*clear the task finetune"
    with pytest.raises(ancestry.OtherDatasetError, match=refused):
        gate.run(night)
    assert not (night / "gate.json").exists() and not (night / "regressions.jsonl").exists()
    assert cycle.read_json(night / "steps" / "gate.json")["outcome"] == "failed"

    finetune(night, b"weights without it")
    with pytest.raises(ancestry.OtherDatasetError, match="training quantize"):
        gate.run(night)
    quantize(night, "e" * 64)
    with pytest.raises(ancestry.OtherDatasetError, match="training evaluate"):
        gate.run(night)

    asked = cycle.read_json(night / "evaluation" / "evaluation.json")
    asked["candidate"]["sha256"] = "e" * 64
    cycle.write_json(night / "evaluation" / "evaluation.json", asked)
    assert gate.run(night)["verdict"] == "pass"


def test_rows_erased_while_the_gate_judges_are_seen(night: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = gate.judge

    def slowly(*given: Any) -> dict[str, Any]:
        with (night / "dataset" / "train.jsonl").open("a") as train:
            train.write("\n")
        return judge(*given)

    monkeypatch.setattr(gate, "judge", slowly)
    with pytest.raises(ancestry.OtherDatasetError, match="not what the candidate learned from, so there"):
        gate.run(night)


def test_a_verdict_from_before_the_erasure_stands(night: Path) -> None:
    decided = gate.run(night)
    erase.run(night.parent, ERASURE)
    assert gate.run(night) == decided
    assert cycle.read_json(night / "manifest.json")["erasures"][0]["learned_by"] == CANDIDATE["model_version"]


def test_the_command_says_it_in_a_line(night: Path) -> None:
    (night / "dataset" / "train.jsonl").unlink()
    told = CliRunner().invoke(app, ["gate", "--cycle", str(night)])
    assert told.exit_code == 1
    assert "OtherDatasetError: dataset/train.jsonl is not what the candidate learned" in told.output


@pytest.mark.parametrize("record", [{}, {"inputs": 3}, {"inputs": {"files": ["train.jsonl"]}}])
@pytest.mark.parametrize(
    ("name", "step"), [("adapter/finetune.json", "finetune"), ("quantize.json", "quantize")]
)
def test_a_record_that_does_not_say_what_it_was_made_of_is_refused(
    night: Path, record: dict[str, Any], name: str, step: str
) -> None:
    cycle.write_json(night / name, {"sha256": CANDIDATE["sha256"], **record})
    with pytest.raises(ancestry.OtherDatasetError, match=f"training {step}"):
        ancestry.check(night, CANDIDATE)


def test_a_candidate_that_was_never_quantized_here_is_refused(night: Path) -> None:
    (night / "quantize.json").unlink()
    with pytest.raises(ancestry.OtherDatasetError, match="training quantize"):
        ancestry.check(night, CANDIDATE)


def test_half_a_record_is_an_error_that_names_the_file(night: Path) -> None:
    (night / "adapter" / "finetune.json").write_text('{"inputs": {"fil')
    with pytest.raises(ValueError, match=r"finetune\.json is not JSON"):
        ancestry.check(night, CANDIDATE)


def test_weights_that_retention_took_are_not_asked_for(night: Path) -> None:
    (night / "adapter" / "adapter_model.safetensors").unlink()
    ancestry.check(night, CANDIDATE)
