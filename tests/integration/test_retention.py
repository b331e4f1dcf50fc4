"""Retention: old months go whole, with what belongs to them, and nothing that was not learned."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from typer.testing import CliRunner

from grpc_server.adapters import retention
from grpc_server.adapters.learned import Learned, learned
from grpc_server.adapters.partitions import ensure_partitions, first_id, month, name_of
from grpc_server.adapters.retention import retain
from grpc_server.domain.errors import Precondition, StoreUnavailable
from grpc_server.log_cli import app
from tests.integration import log_by_hand as log
from tests.integration.conftest_log import dsn, postgres

__all__ = ["dsn", "postgres"]

NOW = datetime.now(UTC)


def id_in(ago: int, number: int = 1) -> UUID:
    """An id of the month so many months ago."""
    return UUID(int=first_id(month(NOW, -ago)).int | (7 << 76) | (2 << 62) | number)


def name(ago: int) -> str:
    return name_of(month(NOW, -ago))


@pytest.fixture
def old(dsn: str) -> str:
    """Three rows in each of the last five months and of this one, each with feedback."""
    ensure_partitions(dsn, now=month(NOW, -5), months=5)
    with psycopg.connect(dsn) as connection:
        for ago in range(6):
            for number in range(3):
                identity = id_in(ago, number)
                log.infer(connection, id=identity, started_at=month(NOW, -ago))
                log.give_feedback(connection, identity, boolean=True)
        for ago in (5, 1):
            connection.execute(
                "INSERT INTO dead_letter VALUES (gen_random_uuid(), %s, 'Feedback', '', '{}')",
                (month(NOW, -ago),),
            )
    return dsn


def query(dsn: str, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn) as connection:
        return connection.execute(sql, values).fetchall()


def counts(dsn: str) -> tuple[int, int, int]:
    tables = ("inference", "feedback", "dead_letter")
    inferences, feedback, letters = (query(dsn, f"SELECT count(*) FROM {one}")[0][0] for one in tables)
    return inferences, feedback, letters


def months(dsn: str) -> list[str]:
    found = query(dsn, "SELECT relname FROM pg_class WHERE relname ~ '^inference_2[0-9_]+$' ORDER BY 1")
    return [row[0] for row in found if row[0] < name(0)]


def all_learned(dsn: str) -> Learned:
    ((system, oid, xid),) = query(
        dsn,
        "SELECT system_identifier::text, "
        "(SELECT oid::text FROM pg_database WHERE datname = current_database()), "
        "pg_snapshot_xmin(pg_current_snapshot())::text::bigint FROM pg_control_system()",
    )
    return Learned(xid, system, oid)


def test_old_months_go_with_their_feedback_and_dead_letters(old: str) -> None:
    done = retain(old, 2, all_learned(old))
    assert [(one.name, one.reason) for one in done.months] == [(name(ago), "") for ago in (5, 4, 3)]
    assert (done.feedback, done.dead_letters, done.unpartitioned) == (9, 1, 0)
    assert months(old) == [name(2), name(1)]
    assert counts(old) == (9, 9, 1)
    ((kind, actor, detail),) = query(old, "SELECT kind, actor, detail FROM event WHERE kind = 'log_retained'")
    assert (kind, actor, detail["feedback"]) == ("log_retained", "retention", 9)
    again = retain(old, 2, all_learned(old))
    assert (again.months, again.feedback, again.dead_letters) == ((), 0, 0)
    assert len(query(old, "SELECT FROM event WHERE kind = 'log_retained'")) == 1


def test_a_dry_run_tells_the_same_and_changes_nothing(old: str) -> None:
    before = counts(old)
    told = retain(old, 2, all_learned(old), dry_run=True)
    assert [(one.name, one.rows, one.reason) for one in told.months] == [
        (name(ago), 3, "") for ago in (5, 4, 3)
    ]
    assert (told.feedback, told.dead_letters) == (9, 1)
    assert counts(old) == before
    assert len(months(old)) == 5


def test_what_no_night_has_learned_stays_unless_it_is_forced(old: str) -> None:
    known = all_learned(old)
    with psycopg.connect(old) as connection:
        log.give_feedback(connection, id_in(4), demonstration=log.assistant("So."))  # late
        connection.execute(
            "UPDATE inference SET changed_xid = pg_current_xact_id() WHERE id = %s", (id_in(3),)
        )
    done = retain(old, 1, known)
    kept = {one.name for one in done.months if one.reason}
    assert kept == {name(4), name(3)}
    assert months(old) == [name(4), name(3), name(1)]
    assert done.feedback == 6  # of the two months that went
    assert retain(old, 1, None).months[0].reason == "no night has learned all of it yet"
    assert [one.reason for one in retain(old, 1, None, force=True).months] == ["", ""]
    assert months(old) == [name(1)]


def test_an_inference_that_never_ended_keeps_no_month(old: str) -> None:
    known = all_learned(old)
    with psycopg.connect(old) as connection:
        log.infer(connection, id=id_in(5, 9), status="started", answer=None, ended_at=None)
    assert retain(old, 4, known).months[0].reason == ""


def test_a_log_of_another_database_says_nothing_of_this_one(old: str) -> None:
    known = all_learned(old)
    with pytest.raises(Precondition, match="AGENTLOOP_CYCLES_DIR"):
        retain(old, 2, Learned(known.xid, known.system_identifier, "1"))


def test_old_rows_without_a_month_go_too(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "SLICE_ROWS", 4)
    with psycopg.connect(dsn) as connection:
        for number in range(10):
            log.infer(connection, id=id_in(40, number), started_at=month(NOW, -40))
        log.give_feedback(connection, id_in(40, 3), score=0.5)
    known = all_learned(dsn)
    with psycopg.connect(dsn) as connection:
        log.give_feedback(connection, id_in(40, 7), score=0.5)  # late: still to learn
        log.infer(connection, id=id_in(40, 11), started_at=month(NOW, -40))
        log.infer(connection, id=id_in(41, 1))  # of an odd clock: it started this month
    assert retain(dsn, 2, known, dry_run=True).unpartitioned == 9
    assert retain(dsn, 2, known).unpartitioned == 9
    assert {row[0] for row in query(dsn, "SELECT id FROM inference")} == {
        id_in(40, 7),
        id_in(40, 11),
        id_in(41, 1),
    }
    assert len(query(dsn, "SELECT FROM feedback")) == 1


def test_a_month_that_a_killed_run_had_detached_is_dropped_by_the_next(old: str) -> None:
    with psycopg.connect(old, autocommit=True) as connection:
        connection.execute(f"ALTER TABLE inference DETACH PARTITION {name(5)}")
    done = retain(old, 2, all_learned(old))
    assert [one.name for one in done.months] == [name(5), name(4), name(3)]
    assert counts(old) == (9, 9, 1)


def test_a_long_reader_delays_retention_and_is_not_blocked_by_it(
    old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "LOCK_SECONDS", 0.05)
    monkeypatch.setattr(retention, "LOCK_TRIES", 2)
    monkeypatch.setattr(retention, "BETWEEN_TRIES_SECONDS", 0.01)
    known = all_learned(old)
    with psycopg.connect(old) as reader:
        reader.execute("SELECT count(*) FROM inference")
        done = retain(old, 4, known)
        assert [one.reason for one in done.months] == ["it is in use: a long transaction reads the log"]
        assert reader.execute("SELECT count(*) FROM inference").fetchone() == (18,)
    assert retain(old, 4, known).months[0].reason == ""


def test_notes_of_what_was_erased_age_too(old: str) -> None:
    with psycopg.connect(old) as connection:
        for finished in ("now()", "NULL"):
            connection.execute(
                "WITH made AS (INSERT INTO erasure (kind, salt, digest, before, requested_by, finished_at) "
                f"VALUES ('caller', '', '', now(), 'me', {finished}) RETURNING id) "
                "INSERT INTO erased SELECT one, id, true FROM made, unnest(%s::uuid[]) AS one",
                ([id_in(5, 1 if finished == "NULL" else 2), id_in(5, 3), id_in(1)],),
            )
    retain(old, 2, all_learned(old))
    left = query(old, "SELECT inference_id FROM erased ORDER BY inference_id")
    kept = [id_in(5, 1), id_in(5, 3)]  # of the erasure that is not finished
    assert left == [(one,) for one in sorted([*kept, id_in(1), id_in(1)])]  # and of months that are kept


def test_it_stops_between_two_steps_when_it_is_told_to(old: str) -> None:
    assert retain(old, 2, all_learned(old), stop=lambda: True).months == ()
    assert counts(old) == (18, 18, 2)


def test_two_at_once_do_not_work_against_each_other(old: str) -> None:
    with psycopg.connect(old) as other:
        other.execute("SELECT pg_advisory_lock(%s)", (retention.RETENTION_LOCK,))
        with pytest.raises(Precondition, match="another process"):
            retain(old, 2, all_learned(old))


def test_a_wrong_clock_drops_nothing(old: str) -> None:
    with pytest.raises(Precondition, match="Set the clock right"):
        retain(old, 2, None, force=True, now=NOW + timedelta(days=3650))
    assert counts(old) == (18, 18, 2)


def test_a_database_that_is_down_or_a_number_of_none_is_told_in_words(dsn: str) -> None:
    with pytest.raises(StoreUnavailable, match="old months were not dropped"):
        retain("postgresql://postgres@127.0.0.1:9/agentloop", 2, None)
    with pytest.raises(ValueError, match="months is 0"):
        retain(dsn, 0, None)


# What the nights have learned


def cycle(folder: Path, name: str, watermark: object, *, verdict: bool = True) -> None:
    (folder / name / "snapshot").mkdir(parents=True)
    told = {"watermark_to": watermark, "system_identifier": "7", "database_oid": "5"}
    (folder / name / "snapshot" / "snapshot.json").write_text(json.dumps(told))
    if verdict:
        log.verdict(folder / name)


def test_only_cycles_with_a_verdict_have_learned(tmp_path: Path) -> None:
    assert learned(tmp_path / "none") is None
    cycle(tmp_path, "20260130T020000Z", "90")
    cycle(tmp_path, "20260131T020000Z", "100")
    cycle(tmp_path, "20260201T020000Z", "200", verdict=False)
    cycle(tmp_path, "notes", "300")
    assert learned(tmp_path) == Learned(100, "7", "5")


def test_a_record_that_cannot_be_read_is_no_licence_to_delete(tmp_path: Path) -> None:
    cycle(tmp_path, "20260130T020000Z", None)
    with pytest.raises(Precondition, match=r"snapshot\.json does not say"):
        learned(tmp_path)


# By hand


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AGENTLOOP_STATE_DIR", str(tmp_path / "var"))
    monkeypatch.setenv("AGENTLOOP_CYCLES_DIR", str(tmp_path / "cycles"))
    return tmp_path


def test_an_operator_sees_what_would_go_then_lets_it_go(
    old: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTLOOP_DATABASE_URL", old)
    letter = place / "var" / "spool" / "dead" / "1.json"
    letter.parent.mkdir(parents=True)
    letter.write_text("{}")
    os.utime(letter, (0, 0))
    run = CliRunner().invoke
    told = json.loads(run(app, ["retain", "--months", "3", "--dry-run", "--json"]).stdout)
    assert [one["kept_because"] for one in told["kept"]] == ["no night has learned all of it yet"] * 2
    assert told["spooled_dead_letters"] == 1
    assert letter.exists()
    shown = run(app, ["retain", "--months", "3", "--force"])
    assert shown.exit_code == 0, shown.output
    assert f"{name(5)}: went, about 0 rows" in shown.stdout
    assert "0 inferences outside of these months, 6 feedback, 2 dead letters" in shown.stdout
    assert not letter.exists()
    assert months(old) == [name(3), name(2), name(1)]
    assert "stays" in run(app, ["retain", "--months", "1"]).stdout


def test_what_cannot_be_done_is_told_with_an_exit_code(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTLOOP_DATABASE_URL", "postgresql://postgres@127.0.0.1:9/agentloop")
    run = CliRunner().invoke
    failed = run(app, ["retain", "--months", "3"])
    assert (failed.exit_code, "error: old months" in failed.stderr) == (1, True)
    assert run(app, ["retain", "--months", "0"]).exit_code == 2
    monkeypatch.setenv("AGENTLOOP_PARALLEL", "none")
    assert run(app, ["retain", "--months", "3"]).exit_code == 2
