"""How the newest night went, as a server's metrics tell it, whatever its files are like."""

from __future__ import annotations

import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from grpc_server import background, night_figures
from grpc_server.adapters.nights import MAX_BYTES, RESULTS, Nights, nights
from grpc_server.background import in_rounds
from grpc_server.night_figures import NightFigures
from tests.integration import night_by_hand
from training import cycle

ENDED = datetime(2026, 1, 31, 2, 20, tzinfo=UTC)


def ended(directory: Path, at: str = ENDED.isoformat()) -> Path:
    """A night whose report, its last step, has ended."""
    cycle.write_json(directory / "steps" / "report.json", {"outcome": "done", "ended_at": at})
    return directory


def result(folder: Path) -> str:
    last = nights(folder).last
    assert last is not None
    return last.result


def shown(folder: Path) -> dict[tuple[str, tuple[str, ...]], float]:
    registry = CollectorRegistry()
    NightFigures(folder, registry).round()
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {(s.name, tuple(s.labels.values())): s.value for family in families for s in family.samples}


def test_a_night_that_went_through_is_told_with_its_figures(tmp_path: Path) -> None:
    directory = ended(night_by_hand.make(tmp_path))
    cycle.write_json(directory / "gate.json", gate() | {"decided_at": "2026-01-31T02:15:00"})
    figures = shown(tmp_path)
    assert figures["agentloop_night_ended_timestamp_seconds", ()] == ENDED.timestamp()
    assert figures["agentloop_night_judged_timestamp_seconds", ()] == ENDED.timestamp() - 300
    assert figures["agentloop_night_step_seconds", ("finetune",)] == 322
    assert figures["agentloop_night_step_peak_memory_bytes", ("finetune",)] == 5.1e9
    assert figures["agentloop_night_score", ("candidate", "simple_python")] == 0.45
    assert figures["agentloop_night_score", ("champion", "simple_python")] == 0.25
    assert figures["agentloop_night_examples", ()] == 192
    assert figures["agentloop_night_training_tokens_per_second", ()] == 231.5
    assert figures["agentloop_night_loss", ("first",)] > figures["agentloop_night_loss", ("last",)] > 0
    results = {labels[0]: value for (name, labels), value in figures.items() if name.endswith("_result")}
    assert results == {each: float(each == "promoted") for each in RESULTS}


def gate() -> dict[str, Any]:
    check = {"against": "champion", "suite": "simple_python", "candidate": 0.45, "champion": 0.25}
    return {"verdict": "pass", "checks": [check, {"suite": "simple_python", "candidate": 0.02}, "no check"]}


@pytest.mark.parametrize("end", ["promoted", "rolled_back", "not_started"])
def test_the_rollout_says_how_a_night_ended(tmp_path: Path, end: str) -> None:
    ended(night_by_hand.make(tmp_path, rolled=end))
    assert result(tmp_path) == end


@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
def test_a_night_whose_gate_said_no_was_held(tmp_path: Path, verdict: str) -> None:
    ended(night_by_hand.make(tmp_path, until="register", verdict=verdict))
    assert result(tmp_path) == "held"


def test_a_candidate_that_passed_and_was_not_rolled_out_stopped_the_night(tmp_path: Path) -> None:
    ended(night_by_hand.make(tmp_path, until="register"))
    assert result(tmp_path) == "stopped"


def test_a_step_that_failed_or_was_killed_stopped_the_night(tmp_path: Path) -> None:
    directory = ended(night_by_hand.make(tmp_path, until="curate"))
    (directory / "steps" / ".finetune.lock").touch()
    assert result(tmp_path) == "stopped"
    cycle.write_json(directory / "steps" / "finetune.json", {"outcome": "failed"})
    assert result(tmp_path) == "stopped"
    (ended(tmp_path / "20260201T020000Z") / "steps").mkdir(exist_ok=True)  # not even the first step began
    assert result(tmp_path) == "stopped"


def test_a_night_with_nothing_to_learn_is_no_failure(tmp_path: Path) -> None:
    directory = ended(night_by_hand.make(tmp_path, until="curate"))
    assert result(tmp_path) == "skipped"  # curate told the scheduler to stop there
    cycle.write_json(directory / "steps" / "freeze.json", {"outcome": "skipped"})
    assert result(tmp_path) == "skipped"


def test_a_warm_up_has_no_snapshot_and_is_judged_from_its_training_on(tmp_path: Path) -> None:
    directory = tmp_path / night_by_hand.CYCLE
    cycle.write_json(directory / "snapshot" / "sets.json", {})
    ended(directory)
    assert result(tmp_path) == "stopped"
    for step in ("finetune", "quantize", "evaluate", "gate", "register"):
        cycle.write_json(directory / "steps" / f"{step}.json", {"outcome": "done"})
    cycle.write_json(directory / "gate.json", {"verdict": "fail"})
    assert result(tmp_path) == "held"


def test_a_night_that_is_at_work_does_not_hide_the_one_before(tmp_path: Path) -> None:
    ended(night_by_hand.make(tmp_path))
    (tmp_path / "20260201T020000Z" / "snapshot").mkdir(parents=True)
    last = nights(tmp_path).last
    assert last is not None
    assert last.cycle_id == night_by_hand.CYCLE


def test_unlearning_is_no_night_that_was_due(tmp_path: Path) -> None:
    cycle.write_json(ended(tmp_path / "20260201T120000Z") / "unlearn.json", {})
    assert nights(tmp_path) == Nights()


def test_where_there_was_no_night_nothing_is_shown(tmp_path: Path) -> None:
    assert nights(tmp_path / "none") == Nights()
    (tmp_path / "notes.txt").touch()
    assert shown(tmp_path) == {}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\0\0", b'{"ended_at": 7}', b'{"ended_at": "soon"}', b"[" * 200_000],
    ids=["empty", "half", "list", "nul", "number", "no moment", "deep"],
)
def test_a_report_that_cannot_be_read_is_none(tmp_path: Path, content: bytes) -> None:
    directory = night_by_hand.make(tmp_path)
    (directory / "steps" / "report.json").write_bytes(content)
    assert nights(tmp_path).last is None


def test_a_huge_record_is_not_read_and_wrong_numbers_are_left_out(tmp_path: Path) -> None:
    directory = ended(night_by_hand.make(tmp_path))
    with (directory / "gate.json").open("wb") as file:
        os.truncate(file.fileno(), MAX_BYTES + 1)
    wrong = '{"outcome": "done", "seconds": 1e999, "peak_memory_gb": true}'
    (directory / "steps" / "freeze.json").write_text(wrong)
    (directory / "adapter" / "finetune.json").write_text(json.dumps({"examples": 10**400}))
    found = nights(tmp_path)
    assert found.judged is None
    assert found.last is not None
    assert "freeze" not in found.last.seconds
    assert "freeze" not in found.last.peak_memory_bytes
    assert (found.last.examples, found.last.scores) == (None, {})


def test_a_folder_that_cannot_be_read_leaves_the_figures_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended(night_by_hand.make(tmp_path))
    registry = CollectorRegistry()
    figures = NightFigures(tmp_path, registry)
    figures.round()
    before = generate_latest(registry)

    def fails(folder: Path) -> Nights:
        raise OSError(f"{folder}: stale file handle")

    monkeypatch.setattr(night_figures, "nights", fails)
    assert figures.round() == night_figures.EVERY_SECONDS
    assert "the cycles were not read" in caplog.text
    assert generate_latest(registry) == before


async def test_rounds_are_made_until_the_end_and_one_that_hangs_is_left_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(background, "END_SECONDS", 0.01)
    looked, hangs = threading.Event(), threading.Event()

    def look() -> float:
        looked.set()
        hangs.wait()
        return 60.0

    try:
        async with in_rounds(look, "test"):
            assert looked.wait(10)
    finally:
        hangs.set()
