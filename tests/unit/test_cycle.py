"""A cycle's directory: outputs appear whole, finished work is recognised, and what a step took is noted."""

import json
import multiprocessing
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import cycle


@given(st.datetimes(min_value=datetime(2000, 1, 1), max_value=datetime(2100, 1, 1)))
def test_a_cycle_id_reads_back_as_the_second_it_was_made_of(moment: datetime) -> None:
    moment = moment.replace(tzinfo=UTC)
    assert cycle.started_at(cycle.cycle_id(moment)) == moment.replace(microsecond=0)


@pytest.mark.parametrize("name", ["", "today", "20260131T020000", "20260131T020000Z ", "20261331T020000Z"])
def test_what_is_not_a_cycle_id_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        cycle.started_at(name)


def test_earlier_cycles_are_those_with_a_verdict_oldest_first(tmp_path: Path) -> None:
    for name in ("20260103T000000Z", "20260101T000000Z", "20260102T000000Z", "20260105T000000Z", "notes"):
        (tmp_path / name).mkdir()
    for name in ("20260103T000000Z", "20260101T000000Z", "20260105T000000Z", "notes"):
        (tmp_path / name / "gate.json").write_text("{}")
    (tmp_path / "20260104T000000Z").mkdir()

    found = cycle.judged_before(tmp_path / "20260104T000000Z")

    assert [each.name for each in found] == ["20260101T000000Z", "20260103T000000Z"]


def test_json_is_sorted_indented_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.json"
    cycle.write_json(path, {"b": 1, "a": "é"})
    assert path.read_text() == '{\n  "a": "é",\n  "b": 1\n}\n'
    assert cycle.read_json(path) == {"a": "é", "b": 1}


def test_a_number_that_is_not_json_is_refused_and_the_former_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    cycle.write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError):
        cycle.write_json(path, {"loss": float("nan")})
    assert cycle.read_json(path) == {"loss": 1.0}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["[1]", "not json", ""])
def test_a_file_that_holds_no_object_is_named_in_the_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"record\.json"):
        cycle.read_json(path)


def test_a_directory_appears_only_when_its_block_ends_well(tmp_path: Path) -> None:
    target = tmp_path / "dataset"
    with cycle.new_directory(target) as building:
        (building / "train.jsonl").write_text("1")
        assert not target.exists()
    assert (target / "train.jsonl").read_text() == "1"

    with pytest.raises(RuntimeError), cycle.new_directory(target) as building:
        (building / "train.jsonl").write_text("half")
        raise RuntimeError("power cut")
    assert (target / "train.jsonl").read_text() == "1"
    assert list(tmp_path.iterdir()) == [target]


def test_a_new_directory_replaces_the_former_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "dataset"
    for name in ("first", "second"):
        with cycle.new_directory(target) as building:
            (building / name).write_text("")
    assert [each.name for each in target.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [target]


def test_work_is_done_only_for_the_same_files_and_options(tmp_path: Path) -> None:
    source, record = tmp_path / "a", tmp_path / "record.json"
    source.write_text("one")
    inputs = cycle.inputs_of({"a": source}, {"cap": 3, "where": tmp_path})
    assert not cycle.done(record, inputs)
    cycle.write_json(record, {"inputs": inputs})
    assert cycle.done(record, inputs)
    assert not cycle.done(record, inputs, [tmp_path / "model.gguf"])
    assert not cycle.done(record, cycle.inputs_of({"a": source}, {"cap": 4, "where": tmp_path}))
    source.write_text("two")
    assert not cycle.done(record, cycle.inputs_of({"a": source}, {"cap": 3, "where": tmp_path}))
    record.write_text("{")
    assert not cycle.done(record, inputs)


def test_the_hash_of_a_file_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert cycle.sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_step_notes_its_time_memory_versions_and_seed(tmp_path: Path) -> None:
    with cycle.step(tmp_path, "curate", seed=7, packages=("scipy", "no-such-package")):
        held = bytearray(64_000_000)
        held[::4096] = b"x" * len(held[::4096])
    note = cycle.read_json(tmp_path / "steps" / "curate.json")
    assert datetime.fromisoformat(note["started_at"]) <= datetime.fromisoformat(note["ended_at"])
    assert 0 <= note["seconds"] < 60
    assert 0.064 < note["peak_memory_gb"] < 64
    assert note["seed"] == 7
    assert note["versions"]["no-such-package"] == "not installed"
    assert note["versions"]["scipy"][0].isdigit()


def test_a_step_that_fails_is_noted_with_its_reason_and_can_run_again(tmp_path: Path) -> None:
    note = tmp_path / "steps" / "curate.json"
    with pytest.raises(RuntimeError), cycle.step(tmp_path, "curate"):
        raise RuntimeError("no space left")
    assert cycle.read_json(note)["outcome"] == "failed"
    assert cycle.read_json(note)["reason"] == "RuntimeError: no space left"
    with cycle.step(tmp_path, "curate"):
        pass
    assert cycle.read_json(note)["outcome"] == "done" and cycle.read_json(note)["reason"] == ""


def test_a_step_removes_what_a_killed_attempt_of_it_left_and_nothing_else(tmp_path: Path) -> None:
    left = [tmp_path / ".quantize.x1" / "merged" / "weights", tmp_path / ".model.gguf.x2" / "former"]
    others = [tmp_path / ".dataset.x3" / "train.jsonl", tmp_path / "quantize.json", tmp_path / "model.gguf"]
    for file in (*left, *others):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("half")
    (tmp_path / ".quantize.json.x4").write_text("{")
    with cycle.step(tmp_path, "quantize", outputs=["model.gguf", "quantize.json", "quantize"]):
        pass
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        ".dataset.x3",
        "model.gguf",
        "quantize.json",
        "steps",
    ]
    assert all(file.is_file() for file in others)


TOLD_TO_END = """
import os, signal, sys, tempfile
from pathlib import Path
from training import cycle
here = Path(sys.argv[1])
with (
    cycle.step(here, "quantize"),
    tempfile.TemporaryDirectory(dir=here, prefix=".quantize."),
    cycle.new_directory(here / "adapter") as building,
):
    (building / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
"""


def test_a_step_that_is_told_to_end_leaves_nothing_half_written_and_says_so(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", TOLD_TO_END, str(tmp_path)], timeout=60)
    assert ended.returncode == 128 + signal.SIGTERM
    assert [each.name for each in tmp_path.iterdir()] == ["steps"]
    note = cycle.read_json(tmp_path / "steps" / "quantize.json")
    assert (note["outcome"], note["reason"]) == ("failed", "it was told to end (SIGTERM)")


def test_a_step_leaves_the_handling_of_sigterm_as_it_was(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with cycle.step(tmp_path, "curate"):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def _enter(where: Path, outcome: "multiprocessing.Queue[str]") -> None:
    try:
        with cycle.step(where, "curate"):
            outcome.put("ran")
    except cycle.StepRunningError as error:
        outcome.put(str(error))


def test_the_same_step_does_not_run_twice_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")  # a fork has of this process's threads only their locks
    outcome: multiprocessing.Queue[str] = context.Queue()
    with cycle.step(tmp_path, "curate"):
        other = context.Process(target=_enter, args=(tmp_path, outcome))
        other.start()
        said = outcome.get(timeout=60)
        other.join()
    assert "curate" in said and "another process" in said


def test_the_manifest_holds_every_file_what_it_was_made_of_and_what_it_took(tmp_path: Path) -> None:
    here = tmp_path / "20260101T000000Z"
    with cycle.step(here, "curate", seed=1):
        cycle.write_json(here / "dataset" / "dataset.json", {"inputs": {"files": {"x": "0"}}, "train": 2})
    (here / "dataset" / "broken.json").write_text("{")
    (here / ".half").write_text("not yet")

    manifest = cycle.write_manifest(here)

    assert manifest == json.loads((here / "manifest.json").read_text())
    assert set(manifest["files"]) == {"dataset/broken.json", "dataset/dataset.json", "steps/curate.json"}
    assert manifest["files"]["dataset/broken.json"] == {
        "bytes": 1,
        "sha256": "021fb596db81e6d02bf3d2586ee3981fe519f275c0ac9ca76bbcf2ebb4097d96",
    }
    assert manifest["inputs"] == {"dataset/dataset.json": {"files": {"x": "0"}}}
    assert manifest["steps"]["curate"]["seed"] == 1
    assert manifest["peak_memory_gb"] == manifest["steps"]["curate"]["peak_memory_gb"] > 0
    assert cycle.write_manifest(here)["files"] == manifest["files"]


class Gpus:
    """Two GPUs that count their energy, as NVML tells it: in millijoules."""

    class NVMLError(Exception):
        pass

    def __init__(self, count: int = 2, *, driver: bool = True, counts: bool = True) -> None:
        self.count, self.driver, self.counts, self.ended = count, driver, counts, 0
        self.spent = 1_000.0

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.driver:
            raise self.NVMLError

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.ended += 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> float:  # noqa: N802
        if not self.counts:
            raise self.NVMLError
        self.spent += 500
        return self.spent


def test_a_step_notes_the_processor_and_the_energy_of_the_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = Gpus()
    monkeypatch.setitem(sys.modules, "pynvml", gpus)
    directory = tmp_path / "20260101T000000Z"
    with cycle.step(directory, "finetune"):
        pass
    note = cycle.read_json(directory / "steps" / "finetune.json")
    assert note["gpu_energy_joules"] == 2.0 and gpus.ended == 2
    assert note["processor"] == cycle.processor() != ""


@pytest.mark.parametrize("gpus", [Gpus(driver=False), Gpus(0), Gpus(counts=False)])
def test_without_a_gpu_that_counts_no_energy_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: Gpus
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", gpus)
    with cycle.step(tmp_path / "20260101T000000Z", "finetune"):
        pass
    note = cycle.read_json(tmp_path / "20260101T000000Z" / "steps" / "finetune.json")
    assert note["gpu_energy_joules"] is None
