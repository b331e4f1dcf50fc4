"""Erasure: what a caller said is nowhere any more, all else is where it was, and the tombstones say so."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from grpc_server import erase_cli
from grpc_server.adapters import erasure as rows
from grpc_server.adapters.postgres import PostgresStore
from grpc_server.adapters.spool import FileSpool
from grpc_server.domain.errors import StoreUnavailable
from grpc_server.drain import Drain
from tests import records as make
from tests.coverage_files import untraced
from tests.integration import log_by_hand as log
from tests.integration.conftest_log import dsn, postgres, store
from tests.live_server import ROOT
from training import asking, curate, cycle, erase, report
from training.__main__ import app as training
from validation.freeze import freeze
from validation.note import NothingToDoError
from validation.snapshot import verified

__all__ = ["dsn", "postgres", "store"]

FIRST, SECOND, THIRD = "20260130T020000Z", "20260131T020000Z", "20260201T020000Z"
SECRET = "Zanzibar"
chance = random.Random(7)


def words() -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(chance.choices(letters, k=7)) for _ in range(8))


def ask(connection: psycopg.Connection[Any], caller: str, session: str, text: str) -> UUID:
    inference = log.infer(
        connection, caller=caller, session_id=session, request=log.request(log.user(text), tools=())
    )
    log.give_feedback(connection, inference, caller=caller, demonstration=log.assistant(f"About {text}"))
    return inference


def night(folder: Path, name: str, dsn: str) -> Path:
    """A night up to its verdict, by its real steps where they are quick."""
    directory = folder / name
    freeze(directory, dsn)
    cycle.write_json(directory / "validation" / "result.json", {"success": True, "quarantined": []})
    rules = folder / "curation.yaml"
    rules.write_text("{min_examples: 1, gate_share: 0.4}")
    curate.run(directory, rules)
    evaluation = directory / "evaluation"
    evaluation.mkdir()
    items = [json.loads(line) for line in (directory / "dataset" / "gate.jsonl").read_text().splitlines()]
    lines = [{"item_id": one["inference_id"], "answer": one["demonstration"]} for one in items]
    (evaluation / "gate.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    failed = (directory / "dataset" / "gate.jsonl").read_text()
    (directory / "regressions.jsonl").write_text(failed)
    (directory / "steps").mkdir(exist_ok=True)
    (directory / "model.gguf").write_bytes(b"GGUF")
    cycle.write_json(directory / "gate.json", {"candidate": {"model_version": f"gemma-3-270m:{name}"}})
    cycle.write_manifest(directory)
    return directory


class Place:
    """Two callers' log and two nights that learned from it."""

    def __init__(self, folder: Path, dsn: str) -> None:
        self.dsn, self.cycles, self.spool = dsn, folder / "cycles", folder / "var" / "spool"
        self.cycles.mkdir()
        with psycopg.connect(dsn) as connection:
            for number in range(12):
                ask(connection, "travel", f"t{number}", words())
                ask(connection, "bank", f"b{number}", f"{SECRET} {words()}")
            # A caller may say of another's inference what it should have been.
            self.corrected = ask(connection, "travel", "t-late", words())
            log.give_feedback(connection, self.corrected, caller="bank", demonstration=log.assistant(SECRET))
        self.first = night(self.cycles, FIRST, dsn)
        with psycopg.connect(dsn) as connection:
            ask(connection, "travel", "t-second", words())
        self.second = night(self.cycles, SECOND, dsn)

    def holding(self, text: str = SECRET) -> list[str]:
        """Every file, and table, that has the text."""
        found = [
            str(path.relative_to(self.cycles))
            for path in self.cycles.rglob("*")
            if path.is_file() and path.suffix != ".parquet" and text.encode() in path.read_bytes()
        ]
        for path in self.cycles.rglob("*.parquet"):
            if text in str(pq.read_table(path).to_pylist()):
                found.append(path.name)
        with psycopg.connect(self.dsn) as connection:
            for table in ("inference", "feedback", "dead_letter", "erasure", "erased", "event"):
                query = f"SELECT count(*) FROM {table} t WHERE t::text LIKE %s"
                (row,) = connection.execute(query, (f"%{text}%",)).fetchall()
                found += [table] if row[0] else []
        return found

    def lines(self, directory: Path, name: str) -> int:
        return len((directory / "dataset" / name).read_text().splitlines())


@pytest.fixture
def place(tmp_path: Path, dsn: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("AGENTLOOP_STATE_DIR", str(tmp_path / "var"))
    monkeypatch.setenv("AGENTLOOP_CYCLES_DIR", str(tmp_path / "cycles"))
    monkeypatch.setenv("AGENTLOOP_DATABASE_URL", dsn)
    monkeypatch.setattr(subprocess, "run", in_this_process(subprocess.run))
    return Place(tmp_path, dsn)


def in_this_process(real: Callable[..., Any]) -> Callable[..., Any]:
    """`python -m training erase` without the seconds that a process takes to start."""

    def run(command: list[str], **options: Any) -> Any:
        if command[1:4] != ["-m", "training", "erase"]:
            return real(command, **options)
        done = CliRunner().invoke(training, command[3:])
        return subprocess.CompletedProcess(command, done.exit_code, done.stdout, done.stderr)

    return run


def run(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(erase_cli.app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_a_caller_said_is_nowhere_any_more_and_the_tombstones_say_who_learned_it(place: Place) -> None:
    assert len(place.holding()) > 6
    kept = place.lines(place.second, "train.jsonl") + place.lines(place.second, "gate.jsonl")
    told = run("--caller", "bank", "--by", "the data protection officer")
    assert place.holding() == []
    assert told["rows"] == {"dead_letter": 0, "feedback": 13, "inference": 12}
    assert told["learned_by"] == [f"gemma-3-270m:{FIRST}", f"gemma-3-270m:{SECOND}"]
    with psycopg.connect(place.dsn) as connection:
        assert connection.execute("SELECT count(*) FROM inference").fetchone() == (14,)
        assert connection.execute("SELECT count(*) FROM feedback").fetchone() == (14,)
        ((by, counts),) = connection.execute("SELECT requested_by, counts FROM erasure").fetchall()
        assert (by, counts["rows"]["inference"]) == ("the data protection officer", 12)
        assert connection.execute("SELECT count(*) FROM event WHERE kind = 'erased'").fetchone() == (1,)
    for directory in (place.first, place.second):
        manifest = json.loads((directory / "manifest.json").read_text())
        (tombstone,) = manifest["erasures"]
        assert tombstone["kind"] == "caller"
        assert tombstone["learned_by"] == f"gemma-3-270m:{directory.name}"
        assert "bank" not in json.dumps(tombstone)
        for part in ("train", "gate"):
            assert len(set(tombstone["ids"][part])) == tombstone["counts"].get(part, 0)
        for name, file in manifest["files"].items():
            assert cycle.sha256(directory / name) == file["sha256"]
        verified(directory / "snapshot")
        dataset = json.loads((directory / "dataset" / "dataset.json").read_text())
        assert dataset["train"] == place.lines(directory, "train.jsonl")
        assert dataset["gate"] == place.lines(directory, "gate.jsonl") > 0
        assert set(dataset["shares"]["caller"]) == {"travel"}
        assert "bank" not in (directory / "dataset" / "card.md").read_text()
    record = json.loads((place.first / "snapshot" / "snapshot.json").read_text())
    assert (record["rows"], record["feedback_rows"]) == (13, 13)
    # Of travel all is there, but for the example that bank's words were the answer of.
    left = place.lines(place.second, "train.jsonl") + place.lines(place.second, "gate.jsonl")
    assert 12 <= left < kept
    assert place.holding("travel") != []


def test_a_later_night_does_not_bring_it_back(place: Place) -> None:
    run("--caller", "bank")
    with pytest.raises(NothingToDoError):
        freeze(place.cycles / THIRD, place.dsn)
    with psycopg.connect(place.dsn) as connection:
        ask(connection, "travel", "t-third", words())
    night(place.cycles, THIRD, place.dsn)
    assert place.holding() == []


def test_a_dry_run_tells_the_same_and_changes_nothing(place: Place) -> None:
    before = {path: path.read_bytes() for path in place.cycles.rglob("*") if path.is_file()}
    would = run("--caller", "bank", "--dry-run")
    assert {path: path.read_bytes() for path in place.cycles.rglob("*") if path.is_file()} == before
    assert len(place.holding()) > 6
    did = run("--caller", "bank")
    assert would["rows"] == did["rows"]
    assert (would["cycles"], would["learned_by"]) == (did["cycles"], did["learned_by"])


def test_one_session_goes_alone(place: Place) -> None:
    told = run("--session", "b3")
    assert told["rows"] == {"dead_letter": 0, "feedback": 1, "inference": 1}
    assert [one["cycle_id"] for one in told["cycles"]] == [FIRST, SECOND]
    with psycopg.connect(place.dsn) as connection:
        assert connection.execute("SELECT count(*) FROM inference WHERE caller = 'bank'").fetchone() == (11,)
    ids = [
        row["session_id"] for row in pq.read_table(place.first / "snapshot/inferences.parquet").to_pylist()
    ]
    assert "b3" not in ids
    assert "b4" in ids


def test_one_inference_goes_alone_with_all_feedback_on_it(place: Place) -> None:
    would = run("--inference", str(place.corrected).upper(), "--dry-run")
    told = run("--inference", str(place.corrected))
    assert told["rows"] == would["rows"] == {"dead_letter": 0, "feedback": 2, "inference": 1}
    assert [one["cycle_id"] for one in told["cycles"]] == [FIRST, SECOND]
    with psycopg.connect(place.dsn) as connection:
        assert connection.execute("SELECT count(*) FROM inference").fetchone() == (25,)
        assert connection.execute("SELECT kind FROM erasure").fetchall() == [("inference",)]
    (tombstone,) = json.loads((place.first / "manifest.json").read_text())["erasures"]
    assert tombstone["kind"] == "inference"
    assert {one for ids in tombstone["ids"].values() for one in ids} == {str(place.corrected)}
    left = [
        row["inference_id"] for row in pq.read_table(place.first / "snapshot/inferences.parquet").to_pylist()
    ]
    assert len(left) == 24 and str(place.corrected) not in left


@pytest.mark.parametrize("step", ["_rewrite_lines", "_rewrite_snapshot", "_retell"])
def test_an_attempt_that_was_killed_is_finished_by_the_next(
    place: Place, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Killed after the first cycle's part of each step: the rows are gone by then, the files half."""
    real, calls = getattr(erase, step), 0

    def killed(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as broken:
        broken.setattr(erase, step, killed)
        with pytest.raises(BaseException, match=r"\w"):
            run("--caller", "bank")
    told = run("--caller", "bank")
    assert place.holding() == []
    assert told["learned_by"] == [f"gemma-3-270m:{FIRST}", f"gemma-3-270m:{SECOND}"]
    assert told["rows"]["inference"] == 12  # of both attempts
    with psycopg.connect(place.dsn) as connection:
        assert connection.execute("SELECT count(*) FROM erasure").fetchone() == (1,)
    for directory in (place.first, place.second):
        (tombstone,) = json.loads((directory / "manifest.json").read_text())["erasures"]
        assert len(tombstone["ids"]["train"]) == tombstone["counts"]["train"] > 0
        verified(directory / "snapshot")
    again = run("--caller", "bank")
    assert (again["rows"]["inference"], again["cycles"]) == (0, [])


def test_while_a_step_of_a_cycle_runs_nothing_of_it_is_changed(place: Place) -> None:
    before = (place.first / "dataset" / "train.jsonl").read_bytes()
    running = pytest.raises(cycle.StepRunningError, match=f"finetune of {FIRST} is running")
    with cycle.step(place.first, "finetune"), running:
        erase.run(place.cycles, erase.Erasure("1", erase.Subject(caller="bank"), "me"))
    assert (place.first / "dataset" / "train.jsonl").read_bytes() == before
    assert json.loads((place.first / "manifest.json").read_text())["erasures"] == []


def test_pages_and_cached_answers_that_quote_it_are_made_anew(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Path] = []
    monkeypatch.setattr(report, "run", lambda directory: told.append(directory))
    (place.first / "report.html").write_text(SECRET)
    cached = tmp_path / "var" / "cache" / "evaluation" / "0.jsonl"
    cached.parent.mkdir(parents=True)
    cached.write_text(SECRET)
    run("--caller", "bank")
    assert told == [place.first]
    assert not cached.exists()
    asking.forget(tmp_path / "nowhere")


# The log and its spool


async def test_what_a_spool_still_has_is_dropped_as_it_arrives(
    store: PostgresStore, dsn: str, tmp_path: Path
) -> None:
    spool = FileSpool(tmp_path / "spool", "server-1", 1 << 28)
    await spool.open()
    theirs, running, others = make.started(caller="bank"), make.started(caller="bank"), make.started()
    await store.store([running])
    for record in (theirs, others, make.ended(theirs.id), make.feedback(others.id, comment="x")):
        await spool.append(record)
    late = make.feedback(others.id, caller="bank", comment=SECRET)
    await spool.append(late)
    single = make.started()
    for record in (single, make.ended(single.id), make.feedback(single.id, comment=SECRET)):
        await spool.append(record)
    with rows.erasing(dsn) as connection:
        rows.finish(connection, rows.begin(connection, "inference", str(single.id), "me"), "me", {})
        erasure = rows.begin(connection, "caller", "bank", "me")
        counts = rows.erase_rows(connection, erasure)
        rows.finish(connection, erasure, "me", counts)
    await spool.append(make.ended(running.id, error=SECRET))  # it was in progress
    await spool.append(make.feedback(theirs.id, comment=SECRET, caller="another"))
    assert await Drain(spool, store, dead_letters=store).flush(30)
    assert (spool.state().records, spool.dead_letters()) == (0, 0)
    new = make.started(caller="bank", started_at=erasure.before)  # what it says from now on is kept
    await store.store([new])
    with psycopg.connect(dsn) as connection:
        assert {row[0] for row in connection.execute("SELECT id FROM inference").fetchall()} == {
            others.id,
            new.id,
        }
        assert connection.execute("SELECT count(*), min(comment) FROM feedback").fetchone() == (1, "x")
    await spool.close()


async def test_dead_letters_go_with_the_ends_that_name_nobody(
    store: PostgresStore, dsn: str, tmp_path: Path
) -> None:
    spool = FileSpool(tmp_path / "spool", "server-1", 1 << 28)
    await spool.open()
    poison = make.started(caller="bank", request={"number": float("nan"), "text": SECRET})
    other = make.started(caller="travel", request={"number": float("nan")})
    for record in (poison, make.ended(poison.id, error=SECRET), other, make.ended(other.id)):
        await spool.append(record)
    assert await Drain(spool, store, dead_letters=store).flush(30)
    await spool.close()
    (damaged,) = [json.loads(p.read_text()) for p in (tmp_path / "spool/dead").glob("*.json")][:1]
    (tmp_path / "spool" / "dead" / "9.json").write_text(
        json.dumps({**damaged, "record": None, "raw_latin1": f'x "caller":"bank" {SECRET}'})
    )
    with rows.erasing(dsn) as connection:
        assert rows.count(connection, "caller", "bank")["dead_letter"] == 1  # its end names nobody
        erasure = rows.begin(connection, "caller", "bank", "me")
        assert rows.erase_rows(connection, erasure)["dead_letter"] == 2
        assert rows.erase_dead_files(connection, erasure, tmp_path / "spool") == 3
        assert connection.execute("SELECT count(*) FROM dead_letter").fetchone() == (2,)
    assert len(list((tmp_path / "spool" / "dead").iterdir())) == 2


def test_a_spool_that_no_server_uses_is_stored_first(place: Place) -> None:
    async def left() -> None:
        spool = FileSpool(place.spool, "gone", 1 << 28)
        await spool.open()
        await spool.append(make.started(caller="bank", request={"text": SECRET}))
        await spool.append(make.started(caller="travel"))
        await spool.close()

    asyncio.run(left())
    assert run("--caller", "bank")["spool"] == "stored"
    assert not list(place.spool.glob("*.log"))
    assert place.holding() == []


def test_many_rows_go_in_slices(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "SLICE_ROWS", 10)
    with psycopg.connect(dsn) as connection:
        for number in range(35):
            inference = log.infer(connection, caller="bank" if number % 2 else "travel")
            log.give_feedback(connection, inference, caller="bank", score=0.5)
    with rows.erasing(dsn) as upkeep:
        erasure = rows.begin(upkeep, "caller", "bank", "me")
        assert rows.erase_rows(upkeep, erasure) == {"inference": 17, "feedback": 35, "dead_letter": 0}
        assert len(list(rows.taught(upkeep, erasure, "caller", "bank"))) == 35


# By hand


def test_the_command_runs_in_processes_of_its_own(tmp_path: Path, dsn: str) -> None:
    place = Place(tmp_path, dsn)
    environment = {
        **untraced(),
        "AGENTLOOP_STATE_DIR": str(tmp_path / "var"),
        "AGENTLOOP_CYCLES_DIR": str(place.cycles),
        "AGENTLOOP_DATABASE_URL": dsn,
    }
    command = [sys.executable, "-m", "grpc_server", "erase", "--caller", "bank"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the log: went: 12 inference, 13 feedback, 0 dead_letter" in done.stdout
    assert f"these learned from it: gemma-3-270m:{FIRST}, gemma-3-270m:{SECOND}" in done.stdout
    assert place.holding() == []


def test_what_cannot_be_done_is_told_in_words(
    place: Place, dsn: str, monkeypatch: pytest.MonkeyPatch, postgres: Any
) -> None:
    invoke = CliRunner().invoke
    assert invoke(erase_cli.app, []).exit_code == 2
    assert invoke(erase_cli.app, ["--caller", "a", "--session", "b"]).exit_code == 2
    with cycle.step(place.first, "finetune"):
        failed = invoke(erase_cli.app, ["--caller", "bank"])
        assert (failed.exit_code, "is running now" in failed.stderr) == (1, True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    failed = invoke(erase_cli.app, ["--caller", "bank"])
    assert (failed.exit_code, "extra `training`" in failed.stderr) == (1, True)
    monkeypatch.setenv("AGENTLOOP_DATABASE_URL", "postgresql://postgres@127.0.0.1:9/agentloop")
    assert invoke(erase_cli.app, ["--caller", "bank"]).exit_code == 1
    with (
        pytest.raises(StoreUnavailable, match="migrate"),
        rows.erasing(postgres.dsn("postgres")) as connection,
    ):
        rows.begin(connection, "caller", "bank", "me")
    with pytest.raises(ValueError, match="one of a caller, a session and an inference"):
        erase.Subject()
