"""The log beside what the disk allows.

Records appended to the fsynced spool per second by 1 and by 64 writers at once, beside the fsyncs per second
of one bare file with lines of the same size on the same disk; then rows stored in Postgres per second, beside
the same rows written by COPY into a table without keys.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import psycopg
from uuid6 import uuid7

from benchmarks.line import Line
from grpc_server.adapters.local_postgres import LocalPostgres
from grpc_server.adapters.postgres import PostgresStore
from grpc_server.adapters.record_json import record_to_json
from grpc_server.adapters.spool import FileSpool
from grpc_server.domain.types import (
    FinishReason,
    InferenceEnded,
    InferenceStarted,
    LogRecord,
    Status,
    TargetRole,
    Timings,
    Usage,
)
from grpc_server.migrations import migrate

APPENDS = 2_000
ROWS = 10_000
BATCH = 500
TEXT = "What is the weather in Oslo? " * 20


def _start(inference_id: UUID) -> InferenceStarted:
    request = {
        "messages": [{"role": "user", "content": TEXT, "tool_calls": [], "tool_name": ""}],
        "tools": [],
    }
    now = datetime.now(UTC)
    return InferenceStarted(
        inference_id, "bench", "bench", "k" * 12, "default", "m:1", TargetRole.STABLE, "", request, now
    )


def _end(inference_id: UUID) -> InferenceEnded:
    answer = {"role": "assistant", "content": TEXT, "tool_calls": [], "tool_name": ""}
    now = datetime.now(UTC)
    return InferenceEnded(
        inference_id, Status.OK, FinishReason.STOP, answer, Usage(9, 9), Timings(0, 1, 2), "", now
    )


def _fsyncs_per_second(path: Path, size: int) -> float:
    line = b"x" * (size - 1) + b"\n"
    with path.open("wb", buffering=0) as file:
        started = time.perf_counter()
        for _ in range(APPENDS // 4):
            file.write(line)
            os.fdatasync(file.fileno())
        return (APPENDS // 4) / (time.perf_counter() - started)


async def _appends_per_second(folder: Path, writers: int) -> float:
    spool = FileSpool(folder, "bench", 1 << 30)
    await spool.open()
    starts = [_start(uuid7()) for _ in range(APPENDS)]

    async def write(mine: list[InferenceStarted]) -> None:
        for start in mine:
            await spool.append(start)

    started = time.perf_counter()
    await asyncio.gather(*(write(starts[writer::writers]) for writer in range(writers)))
    rate = APPENDS / (time.perf_counter() - started)
    await spool.close()
    return rate


async def _rows_per_second(dsn: str) -> float:
    store = PostgresStore(dsn)
    await store.open()
    records: list[LogRecord] = []
    for _ in range(ROWS):
        inference_id = uuid7()
        records += [_start(inference_id), _end(inference_id)]
    started = time.perf_counter()
    for at in range(0, len(records), BATCH):
        await store.store(records[at : at + BATCH])
    rate = ROWS / (time.perf_counter() - started)
    await store.close()
    return rate


def _copied_per_second(dsn: str) -> float:
    rows = [(uuid7(), record_to_json(_start(uuid7())), record_to_json(_end(uuid7()))) for _ in range(ROWS)]
    with psycopg.connect(dsn) as connection:
        connection.execute("CREATE TEMPORARY TABLE plain (id uuid, started text, ended text)")
        started = time.perf_counter()
        with connection.cursor().copy("COPY plain FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
        connection.commit()
        return ROWS / (time.perf_counter() - started)


def run() -> list[Line]:
    """Measure the spool on this disk, then the store on a Postgres of its own."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        size = len(record_to_json(_start(uuid7())))
        fsyncs = _fsyncs_per_second(folder / "bare", size)
        alone = asyncio.run(_appends_per_second(folder / "one", 1))
        together = asyncio.run(_appends_per_second(folder / "many", 64))
        with LocalPostgres(folder / "postgres") as postgres:
            dsn = postgres.dsn("bench")
            migrate(dsn)
            stored = asyncio.run(_rows_per_second(dsn))
            copied = _copied_per_second(dsn)
    return [
        Line("log", "appends_vs_fsync_1_writer", alone / fsyncs, "ratio", "bare fsync", 1.0, ">= 0.5"),
        Line("log", "appends_vs_fsync_64_writers", together / fsyncs, "ratio", "bare fsync", 1.0, ">= 2"),
        Line("log", "appends_per_s_64_writers", together, "records/s", "bare fsync", fsyncs),
        Line("log", "rows_stored_per_s", stored, "inferences/s", "bare COPY", copied),
    ]
