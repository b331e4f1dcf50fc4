"""Freezing a real Postgres: what is learned, and that it is learned once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner
from uuid6 import uuid7

from grpc_server.adapters.local_postgres import LocalPostgres
from tests.integration import log_by_hand as log
from tests.integration.conftest_log import dsn, empty_dsn, postgres
from validation import note
from validation.__main__ import app
from validation.freeze import FreezeError, freeze, last_watermark, local_database
from validation.note import NothingToDoError
from validation.restored import resumed

__all__ = ["dsn", "empty_dsn", "postgres"]

FIRST, SECOND, THIRD = "20260130T020000Z", "20260131T020000Z", "20260201T020000Z"


@pytest.fixture
def cycles(tmp_path: Path) -> Path:
    folder = tmp_path / "cycles of été & co"
    folder.mkdir()
    return folder


def change_view(connection: psycopg.Connection[Any], **shown: str) -> None:
    """Let the view show other expressions for some of its columns."""
    columns = connection.execute("SELECT * FROM learning_log LIMIT 0").description or ()
    listed = ", ".join(f"{shown.get(each.name, each.name)} AS {each.name}" for each in columns)
    connection.execute("ALTER VIEW learning_log RENAME TO whole_log")
    connection.execute(f"CREATE VIEW learning_log AS SELECT {listed} FROM whole_log")
    connection.execute("GRANT SELECT ON learning_log TO agentloop_freeze")


def frozen_ids(cycle: Path) -> list[str]:
    table = pq.read_table(cycle / "snapshot" / "inferences.parquet", columns=["inference_id"])
    return [str(each) for each in table["inference_id"].to_pylist()]


def frozen_rows(cycle: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(cycle / "snapshot" / "inferences.parquet").to_pylist()
    return rows


def test_a_snapshot_holds_the_rows_as_they_were_stored(dsn: str, cycles: Path) -> None:
    with psycopg.connect(dsn) as connection:
        spoken = log.request(log.user("Où est Zoë? 👋"), tools=(log.WEATHER,))
        inference = log.infer(connection, request=spoken, ttft_ms=None)
        log.give_feedback(
            connection, inference, demonstration=log.assistant("", ("weather", {"city": "Oslo"}))
        )
        log.give_feedback(connection, inference, boolean=False)
        aborted = log.infer(connection, status="aborted", answer=None, finish_reason=None)
        log.infer(connection, status="started")
    record = freeze(cycles / FIRST, dsn).record
    assert (record["rows"], record["feedback_rows"], record["watermark_from"]) == (2, 2, "0")
    assert record["cycle_id"] == FIRST
    assert int(record["system_identifier"]) > 0
    assert int(record["database_oid"]) > 0
    rows = {row["inference_id"]: row for row in frozen_rows(cycles / FIRST)}
    assert set(rows) == {str(inference), str(aborted)}
    row = rows[str(inference)]
    assert json.loads(row["request_json"]) == spoken
    assert json.loads(row["answer_json"]) == log.assistant("It rains.")
    assert [each["boolean"] for each in json.loads(row["feedback_json"])] == [None, False]
    assert (row["prompt_chars"], row["answer_chars"], row["messages"], row["tools"]) == (13, 9, 1, 1)
    assert (row["tool_calls"], row["feedback_count"], row["demonstrations"]) == (0, 2, 1)
    assert (row["started_at"], row["ttft_ms"], row["total_ms"]) == (log.START, None, 120.0)
    assert json.loads(rows[str(aborted)]["answer_json"]) == log.assistant("")


def test_late_feedback_is_learned_in_the_next_cycle_and_only_there(dsn: str, cycles: Path) -> None:
    with psycopg.connect(dsn) as connection:
        commented, other = log.infer(connection), log.infer(connection)
    freeze(cycles / FIRST, dsn)
    log.verdict(cycles / FIRST)
    assert frozen_ids(cycles / FIRST) == [str(commented), str(other)]

    with psycopg.connect(dsn) as connection:
        log.give_feedback(connection, commented, boolean=True)
    freeze(cycles / SECOND, dsn)
    log.verdict(cycles / SECOND)
    (row,) = frozen_rows(cycles / SECOND)
    assert (row["inference_id"], row["feedback_count"]) == (str(commented), 1)

    with pytest.raises(NothingToDoError):
        freeze(cycles / THIRD, dsn)
    assert not (cycles / THIRD / "snapshot").exists()


def test_transactions_that_commit_out_of_order_are_neither_lost_nor_taken_twice(
    dsn: str, cycles: Path
) -> None:
    with psycopg.connect(dsn) as early, psycopg.connect(dsn) as late:
        slow = log.infer(early)  # begins first, so that its transaction has the smaller number
        quick = log.infer(late)
        late.commit()
        # `quick` is visible, but `slow`, with a smaller number, is not: a watermark past it would lose it.
        with pytest.raises(NothingToDoError):
            freeze(cycles / FIRST, dsn)
        early.commit()
    freeze(cycles / FIRST, dsn)
    log.verdict(cycles / FIRST)
    assert sorted(frozen_ids(cycles / FIRST)) == sorted([str(slow), str(quick)])
    with pytest.raises(NothingToDoError):
        freeze(cycles / SECOND, dsn)


def test_every_row_is_learned_once_however_transactions_overlap(dsn: str, cycles: Path) -> None:
    """Three writers keep transactions open over several freezes; together they hold each row once."""
    stored, learned = [], []
    writers = [psycopg.connect(dsn) for _ in range(3)]
    for night in range(1, 10):
        for number, writer in enumerate(writers):
            stored.append(str(log.infer(writer)))
            if (night + number) % 3 == 0:
                writer.commit()
        cycle = cycles / f"202602{night:02}T020000Z"
        try:
            freeze(cycle, dsn)
        except NothingToDoError:
            continue
        log.verdict(cycle)
        learned += frozen_ids(cycle)
    for writer in writers:
        writer.commit()
        writer.close()
    assert len(learned) < len(stored)
    freeze(cycles / "20260301T020000Z", dsn)
    learned += frozen_ids(cycles / "20260301T020000Z")
    assert sorted(learned) == sorted(stored)


def test_the_watermark_stays_until_there_is_a_verdict(dsn: str, cycles: Path) -> None:
    with psycopg.connect(dsn) as connection:
        first = log.infer(connection)
    freeze(cycles / FIRST, dsn)  # and then the night failed: no gate.json
    with psycopg.connect(dsn) as connection:
        second = log.infer(connection)
    record = freeze(cycles / SECOND, dsn).record
    assert record["watermark_from"] == "0"
    assert frozen_ids(cycles / SECOND) == [str(first), str(second)]
    log.verdict(cycles / SECOND)
    last = last_watermark(cycles / THIRD)
    assert last is not None
    assert (last.xid, last.record.parents[1].name) == (int(record["watermark_to"]), SECOND)
    assert last_watermark(cycles / SECOND) is None, "a cycle's own verdict does not move where it began"


def test_a_night_whose_clock_was_set_back_loses_nothing_for_the_next(dsn: str, cycles: Path) -> None:
    """The next night builds on the dataset of the night before it by its id: it begins where that ended."""
    asked = []
    for night in (FIRST, THIRD, SECOND):  # the machine of the last one believes that it is yesterday
        with psycopg.connect(dsn) as connection:
            asked.append(str(log.infer(connection)))
        freeze(cycles / night, dsn)
        log.verdict(cycles / night)
    assert frozen_ids(cycles / THIRD) == asked[1:2]
    assert frozen_ids(cycles / SECOND) == asked[1:], "of FIRST's dataset, it has what THIRD alone learned"
    with psycopg.connect(dsn) as connection:
        asked.append(str(log.infer(connection)))
    assert frozen_ids_of(cycles / "20260202T020000Z", dsn) == asked[2:], "THIRD has not learned SECOND's"


def frozen_ids_of(cycle: Path, dsn: str) -> list[str]:
    freeze(cycle, dsn)
    return frozen_ids(cycle)


def test_a_finished_snapshot_is_not_redone_and_an_unfinished_one_is_discarded(dsn: str, cycles: Path) -> None:
    cycle = cycles / FIRST
    half = cycle / "snapshot"
    half.mkdir(parents=True)
    (half / "inferences.parquet").write_bytes(b"PAR1 half a fi")
    (cycle / ".snapshot.killed").mkdir()
    with psycopg.connect(dsn) as connection:
        inference = log.infer(connection)
    first = freeze(cycle, dsn)
    assert first.new
    assert frozen_ids(cycle) == [str(inference)]
    assert not (cycle / ".snapshot.killed").exists()
    with psycopg.connect(dsn) as connection:
        log.infer(connection)
    again = freeze(cycle, "host=/nowhere")
    assert not again.new
    assert again.record == first.record


def test_freezing_reads_in_a_role_that_can_read_nothing_but_the_view(dsn: str, cycles: Path) -> None:
    """A view of its own lists the role that reads: proof that the privilege is given up."""
    with psycopg.connect(dsn) as connection:
        log.infer(connection, caller="whoever")
        change_view(connection, caller="current_user::text")
    freeze(cycles / FIRST, dsn)
    assert [row["caller"] for row in frozen_rows(cycles / FIRST)] == ["agentloop_freeze"]


def test_a_missing_view_is_named_with_what_to_do(empty_dsn: str, cycles: Path) -> None:
    with pytest.raises(FreezeError, match=r"learning_log.*grpc_server migrate"):
        freeze(cycles / FIRST, empty_dsn)
    assert not (cycles / FIRST / "snapshot").exists()


def test_a_view_that_may_not_be_read_is_named_with_the_role(dsn: str, cycles: Path) -> None:
    with psycopg.connect(dsn) as connection:
        log.infer(connection)
        connection.execute("REVOKE SELECT ON learning_log FROM agentloop_freeze")
    with pytest.raises(FreezeError, match=r"may not be read.*agentloop_freeze"):
        freeze(cycles / FIRST, dsn)


def test_a_view_whose_column_changed_its_type_is_refused(dsn: str, cycles: Path) -> None:
    with psycopg.connect(dsn) as connection:
        log.infer(connection)
        change_view(connection, input_tokens="'forty'")
    with pytest.raises(FreezeError, match="another type"):
        freeze(cycles / FIRST, dsn)
    assert list((cycles / FIRST).iterdir()) == []


def test_an_unreachable_database_is_named_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(FreezeError) as refused:
        freeze(tmp_path / FIRST, "postgresql://me:secret@127.0.0.1:1/agentloop")
    assert "host=127.0.0.1 port=1 dbname=agentloop" in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"system_identifier": "123"}, "of cluster 123, up to transaction"),
        ({"database_oid": "7"}, "frozen from database 7 of"),
        ({"watermark_to": "99999999999"}, "it is an older copy"),
    ],
)
def test_another_log_than_last_time_is_refused_with_what_to_do(
    dsn: str, cycles: Path, changed: dict[str, str], said: str
) -> None:
    """Also one whose transactions have greater numbers: its earlier rows would count as learned."""
    with psycopg.connect(dsn) as connection:
        log.infer(connection)
    freeze(cycles / FIRST, dsn)
    log.verdict(cycles / FIRST)
    record = cycles / FIRST / "snapshot" / "snapshot.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | changed))
    with pytest.raises(FreezeError, match=said) as refused:
        freeze(cycles / SECOND, dsn)
    for named in ("AGENTLOOP_STATE_DIR", "AGENTLOOP_CYCLES_DIR", str(cycles)):
        assert named in str(refused.value)
    assert not (cycles / SECOND / "snapshot").exists()


def test_a_log_that_was_restored_is_learned_from_where_it_went_back_to_and_once(
    dsn: str, cycles: Path
) -> None:
    """Its transactions count on from there: by the numbers of before, what it gets would seem learned."""
    with psycopg.connect(dsn) as connection:
        log.infer(connection)
        (name, first), *_ = connection.execute(
            "SELECT current_database(), pg_snapshot_xmax(pg_current_snapshot())::text"
        ).fetchall()
    freeze(cycles / FIRST, dsn)
    log.verdict(cycles / FIRST)
    record = cycles / FIRST / "snapshot" / "snapshot.json"
    before = json.loads(record.read_text()) | {"watermark_to": "99999999999", "timeline": 0}
    record.write_text(json.dumps(before))
    with psycopg.connect(dsn) as connection:
        connection.execute(f"ALTER DATABASE {name} SET agentloop.restored = '1:{first}'")
        again = [str(log.infer(connection)) for _ in range(2)]
    assert frozen_ids_of(cycles / SECOND, dsn)[-2:] == again
    log.verdict(cycles / SECOND)
    with pytest.raises(NothingToDoError):
        freeze(cycles / THIRD, dsn)


def test_what_was_learned_after_a_restore_stays_learned() -> None:
    assert resumed(1000, 1, {}) == 1000
    assert resumed(1000, 1, {2: 900, 3: 950}) == 900, "both came since"
    assert resumed(1000, 2, {2: 900, 3: 950}) == 950
    assert resumed(1000, 3, {2: 900, 3: 950}) == 1000
    assert resumed(800, 1, {2: 900}) == 800


def test_a_role_that_may_only_freeze_can_tell_which_log_it_is(dsn: str, cycles: Path) -> None:
    name = f"nightly_{uuid7().hex}"
    with psycopg.connect(dsn) as connection:
        log.infer(connection)
        connection.execute(f"CREATE ROLE {name} LOGIN IN ROLE agentloop_freeze")
    try:
        own = psycopg.conninfo.make_conninfo(dsn, user=name)
        assert freeze(cycles / FIRST, own).record["rows"] == 1
    finally:
        with psycopg.connect(dsn) as connection:
            connection.execute(f"DROP ROLE {name}")


def test_a_snapshot_that_does_not_say_of_which_log_it_is_stops_the_cycle(cycles: Path) -> None:
    earlier = cycles / FIRST
    (earlier / "snapshot").mkdir(parents=True)
    (earlier / "snapshot" / "snapshot.json").write_text('{"watermark_to": "12"}')
    log.verdict(earlier)
    with pytest.raises(FreezeError, match="system_identifier"):
        last_watermark(cycles / SECOND)


def test_a_lost_watermark_stops_the_cycle_rather_than_guessing(cycles: Path) -> None:
    earlier = cycles / FIRST
    (earlier / "snapshot").mkdir(parents=True)
    (earlier / "snapshot" / "snapshot.json").write_text('{"system_identifier": "1", "database_oid": "2"}')
    log.verdict(earlier)
    with pytest.raises(FreezeError, match="watermark_to"):
        last_watermark(cycles / SECOND)


def test_a_folder_that_is_no_cycle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FreezeError, match="tonight"):
        freeze(tmp_path / "tonight", "host=/nowhere")


FULL_DISK = """
import resource, sys
from pathlib import Path
from validation.freeze import FreezeError, freeze
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    freeze(Path(sys.argv[1]), sys.argv[2])
except FreezeError as error:
    print(error)
"""


def test_a_disk_without_room_leaves_nothing_behind(dsn: str, cycles: Path) -> None:
    """A limit on file sizes stands in for the full disk: the write itself fails, half-way."""
    with psycopg.connect(dsn) as connection:
        for number in range(300):
            said = " ".join(str(hash((number, each))) for each in range(50))
            log.infer(connection, request=log.request(log.user(said)))
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(cycles / FIRST), dsn],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "cannot be written" in done.stdout
    assert "nothing of it was kept" in done.stdout
    assert list((cycles / FIRST).iterdir()) == []


def test_the_command_freezes_prints_json_and_skips_an_empty_night(dsn: str, cycles: Path) -> None:
    runner = CliRunner()
    empty = runner.invoke(app, ["freeze", "--cycle", str(cycles / FIRST), "--database-url", dsn])
    assert empty.exit_code == 99
    assert "nothing was stored since the last verdict" in empty.stderr
    note = json.loads((cycles / FIRST / "steps" / "freeze.json").read_text())
    assert (note["outcome"], "nothing was stored" in note["reason"]) == ("skipped", True)

    with psycopg.connect(dsn) as connection:
        log.infer(connection)
    frozen = runner.invoke(app, ["freeze", "--cycle", str(cycles / FIRST), "--database-url", dsn, "--json"])
    assert frozen.exit_code == 0, frozen.stderr
    assert json.loads(frozen.stdout)["rows"] == 1
    note = json.loads((cycles / FIRST / "steps" / "freeze.json").read_text())
    assert note["outcome"] == "done"
    assert note["seconds"] > 0
    assert note["peak_memory_gb"] > 0.01


def test_the_command_finds_the_database_that_the_server_keeps(
    local_postgres: LocalPostgres, tmp_path: Path
) -> None:
    state = local_postgres.data_dir.parent
    found = psycopg.conninfo.make_conninfo(local_database(state), dbname="postgres")
    with psycopg.connect(found) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    lost = CliRunner().invoke(
        app, ["freeze", "--cycle", str(tmp_path / FIRST), "--state-dir", str(tmp_path), "--database-url", ""]
    )
    assert lost.exit_code == 1
    assert "start the server, or set AGENTLOOP_DATABASE_URL" in lost.stderr


def test_a_cycle_is_frozen_by_one_process_at_a_time(dsn: str, cycles: Path) -> None:
    with note.step(cycles / FIRST, "freeze", []):
        second = CliRunner().invoke(app, ["freeze", "--cycle", str(cycles / FIRST), "--database-url", dsn])
    assert (second.exit_code, "running in another process" in second.stderr) == (1, True)
