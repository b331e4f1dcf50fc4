"""Nights of the simulated year through the real steps and a real log; the whole year is `make soak-year`."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from benchmarks import bench_year
from benchmarks.year import calendar, figures
from benchmarks.year.calendar import ATTACKS, MISHAPS
from benchmarks.year.nights import Year, never_learned
from grpc_server.adapters.local_postgres import LocalPostgres
from grpc_server.migrations import migrate
from tests.integration.conftest_log import dsn, postgres
from tests.unit.test_year import played

__all__ = ["dsn", "postgres"]


def yesterday(days: int) -> datetime:
    now = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return now - timedelta(days=days)


@pytest.mark.soak
def test_nights_with_an_attack_kills_a_full_disk_and_a_wrong_clock_lose_nothing(
    tmp_path: Path, dsn: str
) -> None:
    nights = calendar.each_kind(
        yesterday(2), 120, ["relabel_1,kill curate", "clock back,disk full,kill gate"]
    )
    year = Year(tmp_path, dsn)
    year.begin()
    first = year.night(nights, 0)
    assert first["outcome"] == "held"
    assert 0 < first["attack_learned"] < first["attacks"], "where another showed the right answer, none is"
    assert first["reruns"] == {"curate": 1}
    year.begin()  # as a year that was ended goes on
    second = year.night(nights, 1)
    assert second["outcome"] == "held"
    assert second["reruns"] == {"validate": 1, "curate": 1, "gate": 1}
    assert second["cycle"] < first["cycle"]
    assert [line["night"] for line in year.ledger()] == [0, 1]
    assert not list(year.cycles.rglob(".dataset.*")), "what a killed step left is gone"
    assert never_learned(year) == 0


@pytest.mark.soak
def test_a_small_year_with_every_kind_of_event_needs_nobody(tmp_path: Path) -> None:
    """Each event on a night of its own, an ordinary night after each."""
    kinds = [kind for event in (*MISHAPS, *ATTACKS) for kind in (event, "")]
    nights = calendar.each_kind(yesterday(len(kinds)), 90, kinds)
    with LocalPostgres(tmp_path / "postgres") as own:
        migrate(own.dsn())
        year = Year(tmp_path, own.dsn(), postgres=lambda: own.pid)
        year.begin()
        ledger = [year.night(nights, number) for number in range(len(nights))]
        assert never_learned(year) == 0
    assert figures.interventions(ledger) == []
    assert {line["step"] for line in ledger if line["outcome"] == "failed"} <= {"validate"}


def test_a_year_goes_on_where_it_was_ended_and_draws_its_picture(
    tmp_path: Path, cluster: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its nights are done already here: only what is around them runs."""
    monkeypatch.setenv("AGENTLOOP_YEAR_DIR", str(tmp_path))
    monkeypatch.setenv("AGENTLOOP_YEAR_NIGHTS", "1")
    monkeypatch.setattr(bench_year, "never_learned", lambda _year: 0)
    cluster(tmp_path / "postgres")
    (tmp_path / "nights.jsonl").write_text(json.dumps(played(0)) + "\n")
    lines = {line.metric: line.value for line in bench_year.run()}
    assert lines["nights"] == 1
    assert "<svg" in (tmp_path / "year.html").read_text()
    assert json.loads((tmp_path / "year.json").read_text())["seed"] == bench_year.SEED
    assert list(bench_year.run())
