"""`agent-loop cycles`: what the nights made, whatever state their files are in."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from agentloop import night as records
from agentloop.cli import app
from agentloop.night import Night, cycles_in, lines_of, moment, started_at
from tests.integration import night_by_hand
from tests.integration.night_by_hand import CYCLE
from training import cycle

LATER = "20260201T020000Z"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGENTLOOP_CYCLES_DIR", raising=False)
    monkeypatch.setenv("COLUMNS", "220")


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["cycles", *map(str, arguments)])


def listed(folder: Path, *more: str) -> list[dict[str, Any]]:
    done = call("list", "--cycles", folder, "--json", *more)
    assert done.exit_code == 0, done.output
    found: list[dict[str, Any]] = json.loads(done.stdout)["cycles"]
    return found


def lines(directory: Path, name: str, ids: list[str]) -> None:
    text = "".join(json.dumps({"inference_id": each}) + "\n" for each in ids)
    (directory / "dataset" / name).write_text(text)


def two_nights(folder: Path) -> tuple[Path, Path]:
    one = night_by_hand.make(folder)
    other = folder / LATER
    shutil.copytree(one, other)
    lines(one, "train.jsonl", ["a", "b", "c"])
    lines(other, "train.jsonl", ["b", "c", "d", "e"])
    tuned = cycle.read_json(other / "adapter" / "finetune.json")
    tuned["config"]["learning_rate"] = 1e-4
    cycle.write_json(other / "adapter" / "finetune.json", tuned | {"loss_last": 0.1})
    return one, other


def test_a_list_has_verdict_rollout_accuracies_examples_and_time_the_newest_first(tmp_path: Path) -> None:
    two_nights(tmp_path)
    newest, oldest = listed(tmp_path)
    assert (newest["cycle_id"], oldest["cycle_id"]) == (LATER, CYCLE)
    assert (oldest["verdict"], oldest["result"], oldest["suite"]) == ("pass", "promoted", "simple_python")
    assert (oldest["champion"], oldest["candidate"]) == (0.0, 0.37)
    assert (oldest["train"], oldest["new_train"], oldest["gate"]) == (192, 192, 38)
    assert oldest["seconds"] == pytest.approx(790.5)
    assert oldest["problems"] == [] and oldest["running"] == []
    done = call("list", "--cycles", tmp_path)
    assert done.exit_code == 0
    for text in (CYCLE, "pass", "promoted", "37.0 %", "192", "13.2 min"):
        assert text in done.stdout
    assert listed(tmp_path, "--limit", "1")[0]["cycle_id"] == LATER
    assert "1 older ones" in call("list", "--cycles", tmp_path, "--limit", "1").stdout


def test_a_narrow_terminal_shows_ids_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_nights(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    shown = call("list", "--cycles", tmp_path).stdout
    assert CYCLE in shown and LATER in shown


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b'{"verdict": "pa',
        b"[1, 2]",
        b"\x00\xff\xfe",
        b"[" * 100_000,
        b'{"verdict": 7, "checks": {"a": 1}, "candidate": "x"}',
        b'{"checks": [3, {"suite": ["x"]}], "verdict": null}',
    ],
)
def test_a_damaged_cycle_tells_so_and_hides_no_other(tmp_path: Path, damage: bytes) -> None:
    one, other = two_nights(tmp_path)
    for name in ("gate.json", "dataset/dataset.json", "steps/finetune.json", "rollout.json", "manifest.json"):
        (one / name).write_bytes(damage)
    newest, damaged = listed(tmp_path)
    assert newest["verdict"] == "pass" and newest["problems"] == []
    assert damaged["verdict"] is None
    if not damage.startswith(b"{"):
        assert any(each.startswith("gate.json cannot be read") for each in damaged["problems"])
    for command in (["list"], ["show", CYCLE], ["diff", CYCLE, LATER]):
        done = call(*command, "--cycles", tmp_path)
        assert done.exit_code == 0, done.output
        assert call(*command, "--cycles", tmp_path, "--json").exit_code == 0
    assert other.is_dir()


def test_a_cycle_that_is_at_work_says_which_step(tmp_path: Path) -> None:
    directory = night_by_hand.make(tmp_path, until="curate")
    with (directory / "steps" / ".finetune.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (found,) = listed(tmp_path)
        assert found["running"] == ["finetune"]
        assert found["stopped_because"] == "it is at work now"
        assert "at work: finetune" in call("list", "--cycles", tmp_path).stdout
    (found,) = listed(tmp_path)
    assert found["running"] == [] and "killed" in found["stopped_because"]
    assert "ended at finetune" in call("list", "--cycles", tmp_path).stdout


def test_where_the_kernel_tells_no_locks_nothing_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "Path", lambda _: tmp_path / "none")
    assert records._held() == set()


def test_what_is_no_cycle_is_passed_over_and_no_folder_is_an_error(tmp_path: Path) -> None:
    for name in ("notes", "20261331T020000Z", "20260131T020000"):
        (tmp_path / name).mkdir()
    assert listed(tmp_path) == [] and cycles_in(tmp_path / "none") == []
    for arguments in (["list"], ["show", "last"]):
        done = call(*arguments, "--cycles", tmp_path / "none")
        assert done.exit_code == 4 and "AGENTLOOP_CYCLES_DIR" in done.stderr
    assert call("show", "last", "--cycles", tmp_path).exit_code == 4
    assert call("show", LATER, "--cycles", tmp_path).exit_code == 4
    assert call("show", "yesterday", "--cycles", tmp_path).exit_code == 2


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Path) -> list[Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("agentloop.cli_cycles.cycles_in", refused)
    done = call("list", "--cycles", tmp_path)
    assert done.exit_code == 1 and "Permission denied" in done.stderr


def test_a_cycle_is_shown_step_by_step_with_figures_and_places(tmp_path: Path) -> None:
    directory = night_by_hand.make(tmp_path)
    done = call("show", directory, "--json")
    found = json.loads(done.stdout)
    by_name = {step["step"]: step for step in found["steps"]}
    assert list(by_name) == list(records.STEPS)
    assert by_name["curate"]["figures"]["excluded.no_demonstration"] == 22
    assert by_name["finetune"]["figures"]["loss_last"] == 0.14
    assert by_name["evaluate"]["figures"]["simple_python.candidate.accuracy"] == 0.37
    assert by_name["quantize"]["output"] == str(directory / "quantize.json")
    assert found["checks"]["better than the champion"].startswith("holds: 0.370 against 0.000")
    shown = call("show", "last", "--cycles", tmp_path)
    assert shown.exit_code == 0
    for text in ("Fine-tuning", "loss_last 0.14", str(directory / "rollout.json"), "gate: ends its answers"):
        assert text in shown.stdout


def test_tombstones_are_counted_and_shown(tmp_path: Path) -> None:
    directory = night_by_hand.make(tmp_path)
    cycle.write_json(directory / "manifest.json", {"erasures": [{"id": "e-1", "counts": {"train": 3}}, 7]})
    (found,) = listed(tmp_path)
    assert found["erasures"] == 1
    assert "erased in part: 1" in call("list", "--cycles", tmp_path).stdout
    assert json.loads(call("show", CYCLE, "--cycles", tmp_path, "--json").stdout)["tombstones"] == [
        {"id": "e-1", "counts": {"train": 3}}
    ]


def test_two_cycles_side_by_side_show_what_differs(tmp_path: Path) -> None:
    two_nights(tmp_path)
    found = json.loads(call("diff", CYCLE, LATER, "--cycles", tmp_path, "--json").stdout)
    assert found["dataset"]["train"] == {"count": [3, 4], "new": 2, "removed": 1, "same": 2}
    assert found["config"] == {"finetune.learning_rate": [2e-4, 1e-4]}
    assert found["metrics"] == {"finetune.loss_last": [0.14, 0.1]}
    assert found["checks"] == {}
    done = call("diff", CYCLE, LATER, "--cycles", tmp_path)
    assert done.exit_code == 0
    for text in ("learning_rate", "0.0002", "1 only here", "2 only here"):
        assert text in done.stdout


def test_a_dataset_that_cannot_be_read_ends_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_nights(tmp_path)

    def refused(*_: Night) -> dict[str, Any]:
        raise PermissionError(13, "Permission denied", "train.jsonl")

    monkeypatch.setattr("agentloop.cycle_summary.difference", refused)
    done = call("diff", CYCLE, LATER, "--cycles", tmp_path)
    assert done.exit_code == 1 and "Permission denied" in done.stderr


def test_nothing_in_a_file_drives_the_terminal(tmp_path: Path) -> None:
    directory = night_by_hand.make(tmp_path, verdict="fail", until="gate")
    gate = cycle.read_json(directory / "gate.json") | {"verdict": "\x1b[2Jfail [bold]"}
    gate["checks"][0]["detail"] = "\x1b[31mred"
    cycle.write_json(directory / "gate.json", gate)
    for command in (["list"], ["show", CYCLE]):
        done = call(*command, "--cycles", tmp_path)
        assert done.exit_code == 0 and "\x1b" not in done.output
    assert "[bold]" in call("list", "--cycles", tmp_path).stdout


def test_a_record_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = night_by_hand.make(tmp_path)
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1000)
    night = Night(directory)
    assert night.gate == {}
    assert any(each.startswith("gate.json cannot be read: it has") for each in night.problems)


def test_a_record_that_the_system_refuses_is_a_problem_of_its_cycle(tmp_path: Path) -> None:
    directory = night_by_hand.make(tmp_path)
    (directory / "gate.json").unlink()
    (directory / "gate.json").symlink_to("gate.json")
    assert Night(directory).gate == {}


def test_lines_are_read_one_by_one_and_one_that_is_no_object_is_told(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n\n[2]\n\xff\n{"b": 2}\n{"c": ')
    assert list(lines_of(path)) == [(1, {"a": 1}), (3, None), (4, None), (5, {"b": 2}), (6, None)]


def test_times_are_read_as_far_as_they_are_times() -> None:
    assert moment("2026-01-31T02:00:00") == started_at("20260131T020000Z")
    assert moment("2026-01-31T03:00:00+01:00") == started_at("20260131T020000Z")
    assert (moment("soon"), moment(7), moment(None)) == (None, None, None)
