"""Regressions: what failed once is asked in every later night, until it is erased."""

import json
from pathlib import Path
from typing import Any

import pytest

from training import cycle, regressions

BASE = {"model_version": "gemma:base"}
PROMOTED = {"model_version": "gemma:20260101T020000Z"}


def night(cycles: Path, name: str, *ids: str) -> Path:
    """A cycle with gate items of these ids."""
    directory = cycles / name
    (directory / "dataset").mkdir(parents=True)
    lines = [
        {"inference_id": each, "session_id": "s", "request": {}, "demonstration": {}, "caller": "x"}
        for each in ids
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "dataset" / "gate.jsonl").write_text(text)
    return directory


def answers(champion: str, candidate: str) -> list[dict[str, Any]]:
    """Rows of items a, b, c …: 1 for each that was right."""
    return [
        {"item_id": "abcdef"[number], "subject": subject, "correct": right == "1"}
        for subject, given in (("champion", champion), ("candidate", candidate))
        for number, right in enumerate(given)
    ]


def kept(directory: Path) -> dict[str, str]:
    lines = (directory / "regressions.jsonl").read_text().splitlines()
    return {line["inference_id"]: line["why"] for line in map(json.loads, lines)}


def test_what_the_untouched_base_does_not_know_is_no_failure_but_what_a_candidate_lost_is(
    tmp_path: Path,
) -> None:
    directory = night(tmp_path, "20260101T020000Z", "a", "b", "c")
    assert regressions.update(directory, {"gate": answers("001", "010")}, BASE) == 1
    assert kept(directory) == {"c": "a candidate lost it"}


def test_what_a_promoted_model_got_wrong_is_a_failure_whoever_gets_it_right_now(tmp_path: Path) -> None:
    directory = night(tmp_path, "20260102T020000Z", "a", "b", "c")
    regressions.update(directory, {"gate": answers("011", "110")}, PROMOTED)
    assert kept(directory) == {"a": "a promoted model got it wrong", "c": "a candidate lost it"}


def test_failures_accumulate_from_judged_cycle_to_judged_cycle(tmp_path: Path) -> None:
    first = night(tmp_path, "20260101T020000Z", "a")
    regressions.update(first, {"gate": answers("1", "0")}, BASE)
    assert regressions.before(night(tmp_path, "20260102T020000Z", "a")) is None, (
        "the first has no verdict yet"
    )
    cycle.write_json(first / "gate.json", {})
    third = night(tmp_path, "20260103T020000Z", "a", "b")
    assert regressions.before(third) == first / "regressions.jsonl"
    assert (
        regressions.update(third, {"regressions": answers("1", "0"), "gate": answers("11", "10")}, BASE) == 2
    )
    assert list(kept(third)) == ["a", "b"]
    lines = [json.loads(line) for line in (third / "regressions.jsonl").read_text().splitlines()]
    assert [line["since"] for line in lines] == [first.name, third.name]
    assert "caller" not in lines[1]


def test_they_are_bounded_and_a_cycle_by_hand_has_none_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regressions, "MOST", 2)
    directory = night(tmp_path, "by hand", *"abc")
    assert regressions.before(directory) is None
    assert regressions.update(directory, {"gate": answers("000", "000")}, PROMOTED) == 2
    assert list(kept(directory)) == ["a", "b"]


def test_a_night_without_gate_items_keeps_what_was_there(tmp_path: Path) -> None:
    directory = tmp_path / "20260101T020000Z"
    directory.mkdir()
    assert regressions.update(directory, {}, BASE) == 0
    assert kept(directory) == {}
