"""Retention of ten million rows takes no longer than that of a hundred thousand. Only in `make soak`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.bench_log import retention_seconds
from grpc_server.adapters.local_postgres import LocalPostgres
from grpc_server.migrations import migrate


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_cost_of_retention_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    folder = Path.cwd() / "var" / f"large {tmp_path.name}"  # on a disk: it needs some GB
    folder.mkdir(parents=True)
    try:
        with LocalPostgres(folder / "postgres") as postgres:
            dsn = postgres.dsn("large")
            migrate(dsn)
            few = retention_seconds(dsn, 100_000)
            many = retention_seconds(dsn, 10_000_000)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert many < 10 * max(few, 0.1)
