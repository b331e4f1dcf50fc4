"""`python -m training reproduce`: the same dataset, the same adapter; or what exactly is not as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.unit.test_curate import frozen, traffic
from tests.unit.test_finetune import base, recipe_file, untouched_base
from training import curate, cycle, finetune, gate_key, reproduce
from training.__main__ import app
from training.curation_rules import Rules

__all__ = ["base", "untouched_base"]

FIRST, SECOND = "20260101T000000Z", "20260102T000000Z"
RULES = Rules(min_examples=1, gate_share=0.3)


def night(cycles: Path, name: str, rows: list[dict[str, Any]], gguf: Path) -> Path:
    """A cycle of the real steps up to the adapter, and a verdict."""
    directory = frozen(cycles / name, rows)
    rules = cycles.parent / "curation.yaml"
    rules.write_text(yaml.safe_dump(RULES.model_dump(mode="json")))
    curate.run(directory, rules, key_file=gate_key.of(cycles.parent / "var"))
    finetune.run(directory, gguf, cycles.parent / "var", recipe_file(cycles.parent, epochs=1))
    cycle.write_json(directory / "gate.json", {"verdict": "pass"})
    cycle.write_manifest(directory)
    return directory


@pytest.fixture(scope="module")
def two_nights(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    place = tmp_path_factory.mktemp("nights")
    gguf = place / "base.gguf"
    gguf.write_bytes(b"stands for the file that the base was made of")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finetune, "hugging_face_folder", lambda gguf, state_dir: base)
        night(place / "cycles", FIRST, traffic(0, 8), gguf)
        night(place / "cycles", SECOND, traffic(8, 6), gguf)
    return place


@pytest.fixture
def second(tmp_path: Path, two_nights: Path) -> Path:
    """The second of two nights, in a copy of them: its dataset is the union with the first's."""
    shutil.copytree(two_nights, tmp_path / "here")
    return tmp_path / "here" / "cycles" / SECOND


def reproduced(directory: Path, *more: str) -> tuple[int, dict[str, Any], str]:
    place = directory.parents[1]
    arguments = ["reproduce", str(directory), "--state-dir", str(place / "var")]
    done = CliRunner().invoke(app, [*arguments, "--base-gguf", str(place / "base.gguf"), "--json", *more])
    assert not (place / "var" / "reproduce").exists() or not list((place / "var" / "reproduce").iterdir())
    return done.exit_code, json.loads(done.stdout) if done.stdout else {}, done.stderr


def test_the_same_inputs_make_the_same_bytes_again(second: Path) -> None:
    before = {path: path.read_bytes() for path in second.parent.rglob("*") if path.is_file()}
    code, found, _ = reproduced(second)
    assert (code, found["same"]) == (0, True), found
    assert set(found["compared"]) == {
        "dataset/train.jsonl",
        "dataset/gate.jsonl",
        "adapter/adapter_model.safetensors",
    }
    assert found["differences"] == [] and found["impossible"] == []
    assert {path: path.read_bytes() for path in second.parent.rglob("*") if path.is_file()} == before


def test_an_input_that_was_erased_is_named_and_nothing_is_trained(
    second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "run", lambda *_: pytest.fail("it trained"))
    train = second / "dataset" / "train.jsonl"
    train.write_text("".join(train.read_text().splitlines(keepends=True)[1:]))
    (second / "snapshot" / "inferences.parquet").write_bytes(b"other")
    manifest = cycle.read_json(second / "manifest.json")
    tombstone = {"id": "e", "at": "2026-01-03T00:00:00+00:00", "counts": {"train": 1}}
    cycle.write_json(second / "manifest.json", manifest | {"erasures": [tombstone]})
    code, found, said = reproduced(second)
    assert (code, found["same"], found["compared"]) == (4, None, {})
    assert "snapshot was changed by an erasure since" in found["impossible"][0]
    assert "no longer there" in found["impossible"][1]
    assert "rows were erased from this cycle at 2026-01-03" in found["differences"][0]
    assert "cannot be made again" in said


def test_the_adapter_is_made_again_from_the_dataset_where_the_snapshot_is_gone(second: Path) -> None:
    (second / "snapshot" / "inferences.parquet").unlink()
    code, found, _ = reproduced(second)
    assert code == 4 and "snapshot is gone" in found["impossible"][0]
    assert found["compared"]["adapter/adapter_model.safetensors"]["same"]
    assert found["same"] is None


def test_another_key_of_the_gate_is_named(second: Path) -> None:
    (second.parents[1] / "var" / "gate.key").write_bytes(b"another one".ljust(32))
    code, found, _ = reproduced(second, "--dataset-only")
    assert (code, found["compared"]) == (4, {})
    assert "gate_key was changed since" in found["impossible"][0]


def test_an_earlier_night_that_was_changed_is_named(second: Path) -> None:
    with (second.parent / FIRST / "dataset" / "gate.jsonl").open("a") as file:
        file.write("{}\n")
    code, found, _ = reproduced(second, "--dataset-only")
    assert code == 4
    assert f"{FIRST}/gate.jsonl was changed since" in found["impossible"][0]


def test_what_does_not_come_out_the_same_is_told_with_what_is_not_as_it_was(second: Path) -> None:
    note = cycle.read_json(second / "steps" / "finetune.json")
    note["versions"] |= {"torch": "1.0"}
    cycle.write_json(second / "steps" / "finetune.json", note | {"processor": "Z80"})
    (second / "adapter" / "adapter_model.safetensors").write_bytes(b"other")
    tuned = cycle.read_json(second / "adapter" / "finetune.json")
    del tuned["threads"]
    cycle.write_json(second / "adapter" / "finetune.json", tuned)
    code, found, said = reproduced(second)
    assert (code, found["same"]) == (3, False)
    assert found["compared"]["dataset/train.jsonl"]["same"]
    assert not found["compared"]["adapter/adapter_model.safetensors"]["same"]
    text = reproduce.told(found)
    assert "adapter/adapter_model.safetensors: NOT the same" in text
    assert "torch was 1.0 at finetune, and is 2" in text
    assert "the processor was Z80 at finetune" in text
    assert "how many threads computed is not recorded" in text
    assert "not the same" in said


def test_another_base_cannot_make_the_same_adapter(second: Path) -> None:
    (second.parents[1] / "base.gguf").write_bytes(b"another")
    code, found, _ = reproduced(second)
    assert code == 4
    assert "is not the base that it was trained from" in found["impossible"][0]


def test_records_of_other_code_are_told(second: Path) -> None:
    record = cycle.read_json(second / "dataset" / "dataset.json")
    options = record["inputs"]["options"] | {"colour": "blue"}
    cycle.write_json(
        second / "dataset" / "dataset.json", record | {"inputs": record["inputs"] | {"options": options}}
    )
    code, found, _ = reproduced(second, "--dataset-only")
    assert code == 4 and "rules of another form then" in found["impossible"][0]
    files = record["inputs"]["files"] | {"moon": "1"}
    cycle.write_json(second / "dataset" / "dataset.json", record | {"inputs": {"files": files}})
    code, found, _ = reproduced(second, "--dataset-only")
    assert code == 4 and "does not know its input 'moon'" in found["impossible"][0]
    cycle.write_json(second / "dataset" / "dataset.json", {})
    code, found, _ = reproduced(second, "--dataset-only")
    assert code == 4 and "does not say what it was made of" in found["impossible"][0]


def test_a_recipe_of_other_code_is_told_and_nothing_is_trained(second: Path) -> None:
    tuned = cycle.read_json(second / "adapter" / "finetune.json")
    tuned["inputs"]["options"] |= {"colour": "blue"}
    cycle.write_json(second / "adapter" / "finetune.json", tuned)
    code, found, _ = reproduced(second)
    assert code == 4 and "the recipe had another form then" in found["impossible"][0]


def test_a_cycle_without_a_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cycles" / FIRST).mkdir(parents=True)
    code, _, said = reproduced(tmp_path / "cycles" / FIRST)
    assert code == 1 and "has no dataset/dataset.json" in said


def test_what_several_processes_trained_is_not_trained_again_by_one(
    second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "run", lambda *_: pytest.fail("it trained"))
    record = second / "adapter" / "finetune.json"
    cycle.write_json(record, cycle.read_json(record) | {"processes": 2})
    code, found, _ = reproduced(second)
    assert code == 4
    assert "2 processes trained it together, whose sums one alone does not repeat" in found["impossible"][0]
