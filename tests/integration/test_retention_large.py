"""A log of ten million rows is read and dropped as one of a hundred thousand is (`make soak`)."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from benchmarks import large_log
from benchmarks.gateway.figures import percentile
from benchmarks.large_log import filled, forgotten, page_ms, retention_seconds
from grpc_server.adapters.local_postgres import LocalPostgres
from grpc_server.migrations import migrate
from tests.integration.conftest_log import dsn, postgres

__all__ = ["dsn", "postgres"]

FEW, MANY = 100_000, 10_000_000


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_cost_of_pages_and_of_retention_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    folder = Path.cwd() / "var" / f"large {tmp_path.name}"  # on a disk: it needs some GB
    folder.mkdir(parents=True)
    try:
        with LocalPostgres(folder / "postgres") as postgres:
            logs = {rows: postgres.dsn(f"rows_{rows}") for rows in (FEW, MANY)}
            for rows, dsn in logs.items():
                migrate(dsn)
                filled(dsn, rows)
            pages = {rows: percentile(took, 95) for rows, took in asyncio.run(page_ms(logs)).items()}
            forgotten(postgres.data_dir)
            retention = {rows: retention_seconds(dsn) for rows, dsn in logs.items()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"ListInferences, p95 in ms: {pages}; retention, s: {retention}")
    assert pages[MANY] < 4 * max(pages[FEW], 5.0)
    assert retention[MANY] < 10 * max(retention[FEW], 0.1)


async def test_pages_and_retention_of_a_small_log_are_measured_as_those_of_a_large_one(
    dsn: str, postgres: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_log, "PAGES", 2)
    filled(dsn, 2_000)
    took = await page_ms({2_000: dsn})
    assert len(took[2_000]) == 5 * 2
    forgotten(postgres.data_dir)
    assert await asyncio.to_thread(retention_seconds, dsn) > 0
