"""Great Expectations on snapshots: what is quarantined, what is refused, and what it writes."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner
from uuid6 import uuid7

from tests.integration.log_by_hand import START, assistant, request, user
from validation import snapshot
from validation.__main__ import app
from validation.check import check
from validation.counting import count
from validation.files import sha256, write_json
from validation.freeze import _counts
from validation.snapshot import SnapshotError
from validation.suite import SUITE, read_suite

SECRET = "the nightingale's password"


@pytest.fixture
def cycle(tmp_path: Path) -> Path:
    folder = tmp_path / "20260131T020000Z"
    folder.mkdir()
    return folder


def row(**other: Any) -> dict[str, Any]:
    """A good row as it is frozen, but for `other`; every text in it is `SECRET`."""
    plain = {
        "request_json": json.dumps(other.pop("request", request(user(SECRET)))),
        "answer_json": json.dumps(other.pop("answer", assistant(SECRET))),
        "feedback_json": json.dumps(other.pop("feedback", [])),
    }
    made: dict[str, Any] = dict.fromkeys(snapshot.LOG_COLUMNS, "") | plain
    made |= {
        "inference_id": str(uuid7()),
        "changed_xid": "700",
        "status": "ok",
        "finish_reason": "stop",
        "input_tokens": 40,
        "output_tokens": 5,
        "queue_ms": 0.5,
        "ttft_ms": 30.0,
        "total_ms": 120.0,
        "started_at": START,
        "ended_at": START + timedelta(seconds=1),
    }
    made |= other
    return made | _counts(made)


def write(cycle: Path, rows: list[dict[str, Any]], schema: pa.Schema = snapshot.SCHEMA) -> None:
    """A snapshot of these rows."""
    folder = cycle / "snapshot"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / snapshot.ROWS)
    files = {snapshot.ROWS: sha256(folder / snapshot.ROWS)}
    write_json(folder / snapshot.RECORD, {"rows": len(rows), "files": files, "watermark_to": "800"})


def expectation(record: Any, name: str) -> dict[str, Any]:
    (found,) = (each for each in record["expectations"] if each["name"] == name)
    return dict(found)


def test_good_rows_are_accepted_and_bad_ones_quarantined_with_their_rule(cycle: Path) -> None:
    backwards = row(ended_at=START - timedelta(seconds=1))
    hallucinated = [row(answer=assistant("", ("teapot", {}))) for _ in range(3)]
    write(cycle, [row() for _ in range(8)] + [backwards, *hallucinated])
    record = check(cycle).record
    assert record["success"], record["reason"]
    assert (record["rows"], record["accepted"], record["quarantined_rows"]) == (12, 8, 4)
    by_id = {each["inference_id"]: (each["rule"], each["detail"]) for each in record["quarantined"]}
    assert by_id == {backwards["inference_id"]: ("times_ordered", "disordered_times: 1")} | {
        each["inference_id"]: ("tool_calls_valid", "invalid_tool_calls: 1") for each in hallucinated
    }
    broken = expectation(record, "times_ordered")
    assert (broken["success"], broken["blocking"]) == (False, False)
    assert broken["observed"] == {"rows": 12, "broken_by": 1}
    assert expectation(record, "roles_alternate")["success"]
    assert expectation(record, "schema")["observed"] == {"columns": len(snapshot.SCHEMA)}
    # Three rows of twelve are bad by the model's fault alone: these do not count towards the limit.
    assert expectation(record, "quarantine_share")["observed"]["value"] == pytest.approx(1 / 12)


def test_an_id_that_two_rows_have_names_neither(cycle: Path) -> None:
    twin = str(uuid7())
    write(cycle, [row() for _ in range(18)] + [row(inference_id=twin), row(inference_id=twin)])
    record = check(cycle).record
    assert (record["accepted"], record["quarantined_rows"]) == (18, 2)
    assert {each["rule"] for each in record["quarantined"]} == {"id_unique"}


def test_too_many_bad_rows_refuse_the_whole_snapshot(cycle: Path) -> None:
    write(cycle, [row() for _ in range(7)] + [row(request=request(user("\x00"))) for _ in range(3)])
    record = check(cycle).record
    assert not record["success"]
    assert "quarantine_share does not hold" in record["reason"]
    assert "0.3" in record["reason"]


def test_too_many_failures_refuse_the_whole_snapshot(cycle: Path) -> None:
    failed = [row(status="error", finish_reason=None) for _ in range(4)]
    write(cycle, [row() for _ in range(6)] + failed)
    record = check(cycle).record
    assert not record["success"]
    assert "failure_share does not hold" in record["reason"]
    assert record["quarantined_rows"] == 0


def test_an_empty_snapshot_is_refused(cycle: Path) -> None:
    write(cycle, [])
    record = check(cycle).record
    assert not record["success"]
    assert "volume does not hold" in record["reason"]


@pytest.mark.parametrize("drift", ["removed", "renamed", "retyped", "added"])
def test_schema_drift_is_refused_and_named(cycle: Path, drift: str) -> None:
    fields = list(snapshot.SCHEMA)
    at = next(i for i, field in enumerate(fields) if field.name == "input_tokens")
    made = row()
    match drift:
        case "removed":
            fields.pop(at)
        case "renamed":
            fields[at] = pa.field("tokens_in", pa.int64())
        case "retyped":
            fields[at] = pa.field("input_tokens", pa.string())
            made["input_tokens"] = "40"
        case "added":
            fields.append(pa.field("mood", pa.string()))
    write(cycle, [made], pa.schema(fields))
    record = check(cycle).record
    assert not record["success"]
    assert (record["rows"], record["accepted"]) == (1, 0)
    assert "schema does not hold" in record["reason"]
    named = {
        "removed": "input_tokens",
        "renamed": "tokens_in",
        "retyped": "input_tokens: string",
        "added": "mood",
    }
    assert named[drift] in record["reason"]
    assert (cycle / "validation" / "data_docs" / "index.html").is_file()


def test_a_snapshot_that_was_changed_since_is_refused(cycle: Path) -> None:
    write(cycle, [row()])
    file = cycle / "snapshot" / snapshot.ROWS
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(SnapshotError, match="not the file that was frozen"):
        check(cycle)
    assert not (cycle / "validation").exists()


def test_missing_and_half_written_snapshots_are_told_apart(cycle: Path) -> None:
    with pytest.raises(SnapshotError, match="there is no snapshot"):
        check(cycle)
    (cycle / "snapshot").mkdir()
    with pytest.raises(SnapshotError, match="half-written"):
        check(cycle)
    (cycle / "snapshot" / snapshot.RECORD).write_text("{")
    with pytest.raises(SnapshotError, match="not JSON"):
        check(cycle)
    (cycle / "snapshot" / snapshot.RECORD).write_text('{"files": {}}')
    with pytest.raises(SnapshotError, match=r"does not name inferences\.parquet"):
        check(cycle)
    (cycle / "snapshot" / snapshot.RECORD).write_text('{"files": {"inferences.parquet": "00"}}')
    with pytest.raises(SnapshotError, match="missing"):
        check(cycle)


def test_nothing_written_holds_a_word_of_a_prompt_or_asks_the_network(cycle: Path) -> None:
    bad = [
        row(request=request(user(SECRET), user(SECRET))),
        row(answer=assistant("", (SECRET, {SECRET: SECRET}))),
    ]
    write(cycle, [row() for _ in range(10)] + bad)
    check(cycle)
    written = [path for path in (cycle / "validation").rglob("*") if path.is_file()]
    assert {path.suffix for path in written} == {".html", ".json"}
    for path in written:
        text = path.read_text(encoding="utf-8")
        assert "nightingale" not in text, path
        assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//|@import|url\(|<script", text), path


def test_the_data_docs_lead_from_their_first_page_to_every_other(cycle: Path) -> None:
    write(cycle, [row()])
    check(cycle)
    docs = cycle / "validation" / "data_docs"
    index = (docs / "index.html").read_text(encoding="utf-8")
    linked = {docs / unquote(link) for link in re.findall(r'href="([^"]+)"', index)}
    assert linked == set(docs.rglob("*.html")) - {docs / "index.html"}
    assert len(linked) == 8, "schema, contract, integrity, safety: what was found and what was expected"


def test_a_second_check_does_nothing_and_another_suite_does(cycle: Path, tmp_path: Path) -> None:
    write(cycle, [row() for _ in range(10)])
    result = cycle / "validation" / "result.json"
    assert check(cycle).new
    written = result.stat().st_mtime_ns
    assert not check(cycle).new
    assert result.stat().st_mtime_ns == written
    strict = tmp_path / "strict.yaml"
    strict.write_text(SUITE.read_text().replace("min_value: 1,", "min_value: 100,"))
    refused = check(cycle, strict)
    assert refused.new
    assert not refused.record["success"]
    result.write_text("{")
    assert check(cycle).new, "a result that cannot be read is made again"
    assert [path.name for path in cycle.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("feature: malformed_id", "feature: mood", "judges 'mood'"),
        ("says: the id is a UUID", "sags: the id is a UUID", "no suite"),
        ("  snapshot:", "  snapshots:", "has snapshots, which is not known"),
        ("safety:", "security:", "its groups are"),
        ("reason: feedback, erasure", "because: feedback, erasure", "no suite"),
        ("measure: ks", "measure: chi2", "judges 'chi2' of 'prompt_length'"),
        ("of: language\n", "of: mood\n", "judges 'psi' of 'mood'"),
        ("of: tool\n", "of: tool\n      rises: true\n", "and `rises` of refusal and feedback"),
        ("rule: id_unique", "rule: id_well_formed", "id_well_formed stands in it more than once"),
        ("contract:", "contract: [", "no suite"),
    ],
)
def test_a_suite_with_a_mistake_says_where(tmp_path: Path, before: str, after: str, says: str) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE.read_text().replace(before, after, 1))
    with pytest.raises(ValueError, match=says):
        read_suite(path)


def test_the_suite_knows_the_schema_that_is_frozen() -> None:
    assert list(read_suite().columns.names) == [f"{field.name}: {field.type}" for field in snapshot.SCHEMA]


def test_the_command_says_what_it_found_and_exits_1_on_a_bad_snapshot(cycle: Path) -> None:
    run = CliRunner().invoke
    write(cycle, [row() for _ in range(10)])
    done = run(app, ["check", "--cycle", str(cycle)])
    assert done.exit_code == 0, done.stderr
    assert "10 of 10 rows accepted" in done.stdout
    again = run(app, ["check", "--cycle", str(cycle), "--json"])
    assert json.loads(again.stdout)["accepted"] == 10

    other = cycle.with_name("20260201T020000Z")
    missing = run(app, ["check", "--cycle", str(other)])
    assert (missing.exit_code, "freeze` first" in missing.stderr) == (1, True)
    other.mkdir()
    write(other, [])
    refused = run(app, ["check", "--cycle", str(other), "--json"])
    assert refused.exit_code == 1
    assert "the snapshot is refused" in refused.stderr
    assert not json.loads(refused.stdout)["success"]
    note = json.loads((other / "steps" / "validate.json").read_text())
    assert (note["outcome"], "volume" in note["reason"]) == ("failed", True)


def test_an_expectation_that_crashes_refuses_the_snapshot(cycle: Path, tmp_path: Path) -> None:
    write(cycle, [row()])
    broken = tmp_path / "broken.yaml"
    broken.write_text(SUITE.read_text().replace("column: failed,", "column: nowhere,"))
    record = check(cycle, broken).record
    assert not record["success"]
    assert "nowhere" in record["reason"]


def test_rows_are_read_in_pieces_and_progress_is_told(cycle: Path) -> None:
    told: list[tuple[int, int]] = []
    write(cycle, [row()] * 600)
    found = count(cycle / "snapshot", read_suite(), lambda done, total: told.append((done, total)))
    assert told == [(0, 600), (250, 600), (500, 600), (600, 600)]
    assert int(found.frame["repeated_id"].sum()) == found.bad == 600
