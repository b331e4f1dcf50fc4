"""`replay`: a version's answers to past traffic beside those of then, through a real server of its own."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from agentloop.cli import app as client
from grpc_server.domain.plain import message_to_plain, request_to_plain
from grpc_server.domain.types import ChatRequest, Message, Role, Sampling
from tests.fakes import FakeEngine
from tests.integration.test_evaluate import CANDIDATE, CYCLE, directory, engines, place
from training import bfcl, replay, subjects
from training.__main__ import app
from training.subjects import Place, UnknownModelError

__all__ = ["directory", "engines", "place"]

ITEMS = bfcl.evaluation_items()[:12]


def row(number: int, item: bfcl.Item, **changes: Any) -> dict[str, Any]:
    """A question that was answered by its right call, at first, and demonstrated, if its number is even."""
    right = message_to_plain(Message(Role.ASSISTANT, tool_calls=(item.demonstration,)))
    said = message_to_plain(Message(Role.ASSISTANT, "I do not know."))
    shown = [{"id": "f", "created_at": "2026-01-01", "demonstration": right}]
    request = ChatRequest(item.messages, tools=item.tools, sampling=Sampling(max_tokens=32))
    return {
        "inference_id": f"i{number:02}",
        "session_id": f"s{number // 2}",
        "model_version": "gemma-3-270m:base",
        "request_json": json.dumps(request_to_plain(request)),
        "answer_json": json.dumps(right if number < 4 else said),
        "status": "ok",
        "finish_reason": "stop",
        "output_tokens": 9,
        "total_ms": 500.0,
        "feedback_json": json.dumps(shown if number % 2 == 0 else []),
        **changes,
    }


def snapshot(directory: Path, rows: list[dict[str, Any]]) -> None:
    columns = {name: [each[name] for each in rows] for name in replay.COLUMNS}
    (directory / "snapshot").mkdir()
    parquet.write_table(pa.table(columns), directory / "snapshot" / "inferences.parquet")


def rows_of_all_kinds() -> list[dict[str, Any]]:
    odd = {"prompt": "Once upon", "messages": []}
    return [
        *(row(number, item) for number, item in enumerate(ITEMS)),
        row(20, ITEMS[0], status="cancelled", answer_json=None),
        row(21, ITEMS[0], request_json=json.dumps(odd)),
        row(22, ITEMS[0], request_json="[" * 100_000),
        row(23, ITEMS[0], answer_json="\0"),
        row(24, ITEMS[0], request_json=None),
    ]


def test_any_version_is_asked_past_requests_beside_the_answers_then(
    directory: Path, place: Place, engines: list[FakeEngine]
) -> None:
    snapshot(directory, rows_of_all_kinds())
    options = ["--state-dir", str(place.state_dir), "--base-gguf", str(place.base_gguf)]
    done = CliRunner().invoke(
        app, ["replay", "--cycle", str(directory), "--model", CANDIDATE, *options, "--json"]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["requests"], found["refused_now"]) == (12, 0)
    assert found["left_out"] == {"not_answered": 1, "raw_prompt": 1, "unreadable": 3}
    assert found["answered_then_by"] == {"gemma-3-270m:base": 12}
    shown = found["demonstrated"]
    assert (shown["n"], shown["then"]) == (6, 2) and shown["ci_low"] <= shown["difference"] <= shown[
        "ci_high"
    ]
    assert found["then"]["output_tokens_mean"] == 9 and found["then"]["latency_ms_median"] == 500
    lines = [json.loads(line) for line in Path(found["answers"]).read_text().splitlines()]
    assert [line["inference_id"] for line in lines] == [f"i{number:02}" for number in range(12)]
    assert sum(line["same"] for line in lines) == found["same"]
    assert all((line["now"]["right"] is None) == (line["demonstration"] is None) for line in lines)
    assert len(found["cannot_tell"]) == 6
    assert engines[0].models == {}
    again = CliRunner().invoke(app, ["replay", "--cycle", str(directory), "--model", CANDIDATE, *options])
    assert again.exit_code == 0 and len(engines) == 1, "answers are kept"
    for text in (
        "12 requests of",
        "as demonstrated: then 2, now",
        "What this comparison cannot tell",
        "off-policy",
    ):
        assert text in again.stdout
    replay.forget(place.state_dir)
    assert not Path(found["answers"]).exists()
    replay.forget(place.state_dir)


def test_a_snapshot_with_nothing_to_ask_says_why(directory: Path, place: Place) -> None:
    snapshot(directory, [row(0, ITEMS[0], status="error")])
    with pytest.raises(ValueError, match="no request that can be asked: 1 not_answered"):
        replay.run(directory, place, CANDIDATE, progress=lambda done, total: None)


@pytest.mark.parametrize("name", ["", "base", "m:../../etc", "m:latest", "m:20300101T000000Z"])
def test_what_is_no_version_here_is_refused(place: Place, name: str) -> None:
    with pytest.raises(UnknownModelError):
        subjects.version(name, place)
    assert subjects.version("m:base", place).gguf == place.base_gguf


def test_of_many_requests_the_same_few_are_drawn_each_time(directory: Path) -> None:
    snapshot(directory, rows_of_all_kinds())
    path = directory / "snapshot" / "inferences.parquet"
    first = [one.inference_id for one in replay.chosen(path, 4, Counter())]
    assert first == [one.inference_id for one in replay.chosen(path, 4, Counter())]
    assert len(first) == 4 and first == sorted(first) != ["i00", "i01", "i02", "i03"]


def test_the_latest_demonstration_that_is_an_answer_counts() -> None:
    def said(at: str, **message: Any) -> dict[str, Any]:
        return {"created_at": at, "demonstration": {"tool_calls": [], "tool_name": "", **message}}

    told = [said("2", role="assistant", content="b"), said("1", role="assistant", content="a")]
    told += [said("3", role="user", content="c"), {"created_at": "4", "boolean": True}]
    found = replay.demonstrated(json.dumps(told))
    assert found is not None and found.content == "b"
    for text in (None, "", "[", "[3]", '[{"demonstration": 7}]', "[" * 100_000):
        assert replay.demonstrated(text) is None


def test_a_summary_of_requests_that_were_all_refused_has_no_shares() -> None:
    one = replay.asked(row(0, ITEMS[0]))
    assert not isinstance(one, str)
    nothing = {"finish_reason": "refused", "output_tokens": 0, "latency_ms": 0.0}
    line = replay.compared(one, nothing | {"answer": message_to_plain(Message(Role.ASSISTANT))})
    found = replay.summary([line]) | {
        "cycle_id": CYCLE,
        "model_version": "m:1",
        "answers": "a",
        "cannot_tell": [],
    }
    assert (found["refused_now"], found["same_share"], found["demonstrated"]["n"]) == (1, None, 0)
    assert "same answer: 0 (none)" in replay.told(found)


def test_the_client_hands_a_replay_over_to_where_the_nights_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr("agentloop.cli_hand_over.os.execv", lambda program, words: asked.append(words))
    CliRunner().invoke(client, ["replay", "--cycle", "c", "--model", "m:1", "--json"])
    assert asked[0][1:] == ["-m", "training", "replay", "--cycle", "c", "--model", "m:1", "--json"]
    monkeypatch.setattr("agentloop.cli_hand_over.find_spec", lambda name: None)
    done = CliRunner().invoke(client, ["replay", "--cycle", "c", "--model", "m:1"])
    assert done.exit_code == 1 and "where the nights run" in done.stderr
