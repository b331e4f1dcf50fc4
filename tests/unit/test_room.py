"""`room`: a night begins where its disks have room for it, and no other night is at work."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentloop.night import Night
from tests.unit.test_gguf_layout import written
from training import cycle, recipe, room
from training.__main__ import app

FIRST, SECOND = "20260130T020000Z", "20260131T020000Z"
GB = 10**9
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return written(tmp_path / "base.gguf")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    found = {"bytes": 100 * GB}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, found["bytes"]))
    return found


def command(tmp_path: Path, *more: str) -> Any:
    options = ["--cycle", str(tmp_path / "cycles" / SECOND), "--state-dir", str(tmp_path / "var")]
    return CliRunner().invoke(app, ["room", *options, "--base-gguf", str(tmp_path / "base.gguf"), *more])


def test_a_night_that_has_room_begins_and_tells_what_is_wanted_on_each_disk(
    tmp_path: Path, base: Path, free: dict[str, int]
) -> None:
    done = command(tmp_path, "--json")
    assert done.exit_code == 0, done.output
    (disk,) = json.loads(done.stdout)["disks"]
    assert disk["folders"] == [str(tmp_path / "cycles"), str(tmp_path / "var")]
    assert disk["free_bytes"] == 100 * GB > disk["wanted_bytes"] > 2**30
    assert "GB free" in command(tmp_path).stdout
    assert cycle.read_json(tmp_path / "cycles" / SECOND / "steps" / "room.json")["outcome"] == "done"


def test_a_disk_that_is_short_is_named_with_what_is_wanted_and_the_report_says_it(
    tmp_path: Path, base: Path, free: dict[str, int]
) -> None:
    free["bytes"] = GB
    done = command(tmp_path)
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert "has 1.0 GB free, and a night wants" in done.stderr and "training retain --dry-run" in done.stderr
    freeze = Night(tmp_path / "cycles" / SECOND).steps[0]
    assert (freeze.name, freeze.state) == ("freeze", "failed") and "1.0 GB free" in freeze.reason
    assert command(tmp_path, "--reserve", "1MB").exit_code == 0


def test_where_even_the_note_finds_no_room_the_reason_is_said_all_the_same(
    tmp_path: Path, base: Path, free: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    free["bytes"] = 0

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cycle, "write_json", full)
    assert "has 0.0 GB free, and a night wants" in command(tmp_path).stderr
    free["bytes"] = 100 * GB
    assert "No space left on device" in command(tmp_path).stderr


@pytest.mark.parametrize(
    ("reserve", "said"), [("a lot", "is no size"), ("-1", "is no size"), ("9" * 30, "is no size")]
)
def test_a_reserve_that_is_no_size_is_a_usage_error(
    tmp_path: Path, base: Path, reserve: str, said: str
) -> None:
    done = command(tmp_path, "--reserve", reserve)
    assert done.exit_code == 2 and said in done.stderr


def test_a_base_that_is_not_there_or_no_gguf_is_said_before_the_night_begins(tmp_path: Path) -> None:
    assert command(tmp_path).exit_code == 1
    (tmp_path / "base.gguf").write_bytes(b"\0" * 100)
    assert "no GGUF" in command(tmp_path).stderr


def test_more_is_wanted_for_larger_nights_whole_models_and_a_first_conversion(
    tmp_path: Path, free: dict[str, int]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"0" * 1000)
    state, tonight = tmp_path / "var", tmp_path / "cycles" / SECOND

    def wanted(recipe_file: Path = recipe.DEFAULT) -> int:
        (disk,) = room.run(tonight, base, state, 0, recipe_file)["disks"]
        return int(disk["wanted_bytes"])

    first = wanted()
    whole = tmp_path / "whole.yaml"
    whole.write_text(recipe.DEFAULT.read_text().replace("method: qlora", "method: full"))
    assert wanted(whole) - first == 6000
    (state / "cache" / "hf" / "abc").mkdir(parents=True)
    (state / "cache" / "hf" / "abc" / "config.json").write_text("{}")
    assert first - wanted() == 1000
    earlier = tmp_path / "cycles" / FIRST / "snapshot"
    earlier.mkdir(parents=True)
    (earlier / "rows").write_bytes(b"0" * 500)
    assert wanted() == first - 1000 + 500


def test_two_disks_are_looked_at_one_by_one(
    tmp_path: Path, base: Path, free: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = room._disks({tmp_path: 5, Path("/proc"): 7}, 1)
    assert [(disk.folders, disk.wanted) for disk in found] == [((tmp_path,), 6), ((Path("/proc"),), 8)]


def test_a_backfilled_night_before_the_last_verdict_has_nothing_to_learn(
    tmp_path: Path, base: Path, free: dict[str, int]
) -> None:
    later = tmp_path / "cycles" / "20260201T020000Z"
    cycle.write_json(later / "gate.json", {})
    assert command(tmp_path, "--run-type", "backfill").exit_code == 0, "an unlearning has frozen nothing"
    cycle.write_json(later / "snapshot" / "snapshot.json", {})
    done = command(tmp_path, "--run-type", "backfill")
    assert done.exit_code == 99 and f"the later cycle {later.name} has a verdict" in done.stderr
    assert command(tmp_path, "--run-type", "scheduled").exit_code == 0, "its clock may have been set back"


def test_a_night_does_not_begin_beside_another_that_is_at_work(
    tmp_path: Path, base: Path, free: dict[str, int]
) -> None:
    steps = tmp_path / "cycles" / FIRST / "steps"
    steps.mkdir(parents=True)
    with (steps / ".finetune.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = command(tmp_path)
        assert done.exit_code == 1
        assert f"cycle {FIRST} is at work (finetune)" in done.stderr
        cycle.write_json(steps.parent / "gate.json", {})  # it has learned what it had to
        assert command(tmp_path).exit_code == 0
    (steps.parent / "gate.json").unlink()
    assert command(tmp_path).exit_code == 0, "one that was killed is not at work"
