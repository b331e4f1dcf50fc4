# ruff: noqa: ASYNC110 - rounds tell of themselves by no event
"""The upkeep of a server: months made ahead, old ones dropped, and gauges that tell."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

from grpc_server import upkeep as upkeep_module
from grpc_server.adapters import partitions
from grpc_server.adapters.partitions import first_id, month, months_ahead, name_of, rows_without_month
from grpc_server.metrics import Metrics
from grpc_server.upkeep import Upkeep, forget_dead_letters
from tests.integration import log_by_hand as log
from tests.integration.conftest_log import dsn, postgres
from tests.integration.test_retention import NOW, name

__all__ = ["dsn", "postgres"]


def new_upkeep(dsn: str, place: Path, metrics: Metrics | None = None, **options: Any) -> Upkeep:
    return Upkeep(
        dsn, metrics or Metrics(), spool_dir=place / "spool", cycles_dir=place / "cycles", **options
    )


def drop_months(dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        for ahead in range(4):
            connection.execute(f"DROP TABLE IF EXISTS {name_of(month(NOW, ahead))}")


def figure(metrics: Metrics, name: str) -> float:
    found = metrics.registry.get_sample_value(name)
    assert found is not None
    return found


def test_a_round_makes_the_missing_months_and_moves_their_rows(dsn: str, tmp_path: Path) -> None:
    drop_months(dsn)
    with psycopg.connect(dsn) as connection:
        inference = log.infer(connection)
        log.infer(connection, id=first_id(month(NOW, -30)))
    assert (months_ahead(dsn), rows_without_month(dsn)) == (-1, 2)
    metrics = Metrics()
    assert new_upkeep(dsn, tmp_path, metrics).round()
    assert figure(metrics, "agentloop_log_months_ahead") == 3
    assert figure(metrics, "agentloop_log_rows_without_month") == 1  # of a month long ago
    with psycopg.connect(dsn) as connection:
        found = connection.execute(
            "SELECT tableoid::regclass::text FROM inference WHERE id = %s", (inference,)
        ).fetchone()
    assert found == (name(0),)


def test_a_month_that_cannot_be_made_is_a_warning_and_a_gauge(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(upkeep_module, "LOCK_SECONDS", 0.05)
    drop_months(dsn)
    metrics = Metrics()
    upkeep = new_upkeep(dsn, tmp_path, metrics)
    with psycopg.connect(dsn) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s)", (partitions.LOCK,))
        assert not upkeep.round()
    assert figure(metrics, "agentloop_log_months_ahead") == -1
    assert "the next month's partition of the log is missing" in caplog.text
    assert upkeep.round()
    assert figure(metrics, "agentloop_log_months_ahead") == 3


def test_a_later_month_that_cannot_be_made_yet_is_no_alarm(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(upkeep_module, "LOCK_SECONDS", 0.05)
    with psycopg.connect(dsn) as connection:
        connection.execute(f"DROP TABLE {name_of(month(NOW, 3))}")
    with psycopg.connect(dsn) as reader:  # the night's freeze, for one
        reader.execute("SELECT count(*) FROM inference")
        assert not new_upkeep(dsn, tmp_path).round()
    assert "missing" not in caplog.text
    assert months_ahead(dsn) == 2


def test_a_round_drops_old_months_where_that_is_set(
    dsn: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    partitions.ensure_partitions(dsn, now=month(NOW, -5), months=1)
    with psycopg.connect(dsn) as connection:
        log.infer(connection, id=first_id(month(NOW, -5)))
    metrics = Metrics()
    assert new_upkeep(dsn, tmp_path, metrics).round()
    assert figure(metrics, "agentloop_log_months_dropped_total") == 0
    assert new_upkeep(
        dsn, tmp_path, metrics, retain_months=2
    ).round()  # the empty month, not the unlearned one
    assert figure(metrics, "agentloop_log_months_dropped_total") == 1
    assert "old months of the log were kept" in caplog.text
    assert new_upkeep(dsn, tmp_path, metrics, retain_months=2, keep_unlearned=False).round()
    assert figure(metrics, "agentloop_log_months_dropped_total") == 2


def test_a_database_that_is_down_ends_no_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    upkeep = new_upkeep("postgresql://postgres@127.0.0.1:9/agentloop", tmp_path, retain_months=1)
    assert not upkeep.round()
    assert "old months were not dropped" in caplog.text


async def test_rounds_go_on_until_the_end(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep_module, "EVERY_SECONDS", 0.01)
    rounds = 0
    upkeep = new_upkeep(dsn, tmp_path)
    real = upkeep.round

    def counted() -> bool:
        nonlocal rounds
        rounds += 1
        return real()

    monkeypatch.setattr(upkeep, "round", counted)
    async with upkeep.running():
        while rounds < 3:
            await asyncio.sleep(0.01)
    ended = rounds
    await asyncio.sleep(0.05)
    assert rounds == ended


def test_dead_letters_of_a_spool_age_too(tmp_path: Path) -> None:
    dead = tmp_path / "dead"
    dead.mkdir()
    for age, letter in ((100, "old.json"), (0, "new.json"), (100, "somebody's.txt")):
        (dead / letter).write_text("{}")
        os.utime(dead / letter, (time.time() - age * 86400,) * 2)
    assert forget_dead_letters(tmp_path, 1, dry_run=True) == 1
    assert forget_dead_letters(tmp_path, 1) == 1
    assert sorted(path.name for path in dead.iterdir()) == ["new.json", "somebody's.txt"]
    assert forget_dead_letters(tmp_path / "none", 1) == 0
