"""What the morning's page draws and links, and that a record of another form leaves the rest standing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentloop.night import Night
from tests.integration import night_by_hand
from training import cycle, report
from training.report_figures import canary, drifts


def with_record(folder: Path, name: str, **changes: Any) -> Night:
    directory = night_by_hand.make(folder)
    cycle.write_json(directory / name, cycle.read_json(directory / name) | changes)
    return Night(directory)


def outcome(name: str, **observed: Any) -> dict[str, Any]:
    return {"name": name, "says": "as before", "blocking": False, "success": True, "observed": observed}


def test_drift_stands_beside_its_limit_and_what_was_not_judged_says_why(tmp_path: Path) -> None:
    moved = outcome("tool_mix", value=0.5, limit=0.25) | {"success": False}
    refused = moved | {"blocking": True}
    told = [outcome("prompt_length", value=0.05, limit=0.25), moved, refused]
    told += [outcome("language", not_judged="too few rows"), outcome("rows", value=7), {"observed": 3}, 7]  # type: ignore[list-item]
    night = with_record(tmp_path, "validation/result.json", expectations=told)
    calm, watched, bad, unknown = drifts(night)
    assert (calm.tone, calm.value, calm.width, calm.limit_at) == ("good", "0.050 of 0.250", 10.0, 50.0)
    assert (watched.tone, watched.width, watched.limit_at) == ("held", 100.0, 50.0)
    assert (bad.tone, unknown.tone, unknown.says) == ("bad", "quiet", "too few rows")
    page = report.render(night)
    assert "How far the traffic moved" in page and "0.500 of 0.250" in page
    assert drifts(with_record(tmp_path / "other", "validation/result.json", expectations={"a": 1})) == []


def test_the_canary_stands_beside_the_stable_version(tmp_path: Path) -> None:
    night = Night(night_by_hand.make(tmp_path))
    failed, cut, latency = canary(night)
    assert (failed.stable, failed.canary_width) == ("0.0 %", 0.0)
    assert (cut.stable, cut.canary, cut.stable_width) == ("97.0 %", "2.0 %", 97.0)
    assert (latency.name, latency.canary, latency.stable_width) == ("latency, median", "620 ms", 100.0)
    assert "Canary beside the stable version" in report.render(night)


@pytest.mark.parametrize("steps", [None, 7, [], [3], [{"metrics": {"a": {}, "b": {}}}]])
def test_a_rollout_that_compared_nothing_draws_nothing(tmp_path: Path, steps: Any) -> None:
    assert canary(with_record(tmp_path, "rollout.json", steps=steps)) == []
    odd = [{"metrics": {"stable": {"error_share": "x", "length_share": -1}, "canary": {"error_share": 1}}}]
    assert canary(with_record(tmp_path / "odd", "rollout.json", steps=odd)) == []


def test_links_lead_to_what_is_there(tmp_path: Path) -> None:
    night = Night(night_by_hand.make(tmp_path))
    assert [link.name for link in report.links(night)] == ["Data docs", "Manifest"]
    for name in ("dataset/card.md", "MODEL_CARD.md"):
        (night.directory / name).write_text("card")
    night.registry["experiment_id"] = "1 & 2"
    found = {link.name: link.href for link in report.links(night)}
    assert list(found) == ["Data docs", "Dataset card", "Model card", "Manifest", "MLflow"]
    assert found["MLflow"] == f"http://127.0.0.1:5000/#/experiments/1%20%26%202/runs/{'1f' * 16}"


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("gate.json", {"verdict": 7, "checks": {"a": 1}, "reason": None}),
        ("gate.json", {"checks": [3, {"suite": 4, "difference": "x"}]}),
        ("dataset/dataset.json", {"rows": "many", "excluded": [1], "new_train": None}),
        ("validation/result.json", {"expectations": [{"success": False, "observed": {}}, 7]}),
        ("evaluation/summary.json", {"simple_python": {"candidate": {"n": 3}}, "gate": 7}),
        ("quantize.json", {"size_bytes": "x"}),
        ("rollout.json", {"result": "promoted"}),
        ("registry.json", {"run_id": 7}),
        ("steps/finetune.json", {"started_at": "soon", "seconds": "long", "outcome": "failed"}),
    ],
)
def test_a_record_of_older_or_other_code_leaves_the_rest_of_the_page(
    tmp_path: Path, name: str, record: dict[str, Any]
) -> None:
    directory = night_by_hand.make(tmp_path)
    cycle.write_json(directory / name, record)
    with (directory / "evaluation" / "simple_python.jsonl").open("a") as file:
        file.write('{"item_id": "x"}\n')
    with (directory / "dataset" / "gate.jsonl").open("a") as file:
        file.write('{"inference_id": "x", "request": {"messages": []}}\n')
    page = report.render(Night(directory))
    assert "How the night went" in page and "</html>" in page
