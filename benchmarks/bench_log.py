"""The log beside what the disk allows.

Records appended to the fsynced spool per second by 1 and by 64 writers at once, beside the fsyncs per second
of one bare file with lines of the same size on the same disk; then rows stored in Postgres per second, beside
the same rows written by COPY into a table without keys.

`log_rows_vs_fsync` is the whole way: 64 callers, each with a start and an end that it waits for, one after
the other, while Postgres stores them, beside the fsyncs per second that the disk allows right before and
right after. A row is two records: with one fsync for each it could be 0.5 at most, were nothing else to do.
Redaction is what a record waits for it, in its own process.

Then two logs whose month before last has 100,000 and 1,000,000 rows. ListInferences is asked for pages of
both in turns, over a socket: of all rows, of a caller, of a model version, of what failed, from a random
moment downwards, and of a conversation. Retention drops the month, all of it learned and none of it in the
kernel's memory, as a month is that is old. Neither must grow with the rows (`make soak` asks that of
10,000,000): `growth` is the larger log's figure in those of the smaller one.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import psycopg
from uuid6 import uuid7

from benchmarks.gateway.figures import percentile
from benchmarks.large_log import filled, forgotten, page_ms, retention_seconds
from benchmarks.line import Line
from grpc_server.adapters.local_postgres import LocalPostgres
from grpc_server.adapters.postgres import PostgresStore
from grpc_server.adapters.record_json import record_to_json
from grpc_server.adapters.redacting_spool import RedactingSpool
from grpc_server.adapters.redaction_process import RedactionProcess
from grpc_server.adapters.spool import FileSpool
from grpc_server.domain.ports import SpoolState
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
from grpc_server.drain import Drain
from grpc_server.migrations import migrate

APPENDS = 2_000
ROWS = 10_000
BATCH = 500
LOGGED = 4_000
LARGE = (100_000, 1_000_000)
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


async def _logged_per_second(folder: Path, dsn: str) -> tuple[float, float]:
    """Whole inferences by 64 callers at once: accepted, while they are being stored, and stored."""
    spool, store = FileSpool(folder, "bench", 1 << 30), PostgresStore(dsn)
    await spool.open()
    await store.open()
    drain = Drain(spool, store)
    draining = asyncio.create_task(drain.run())
    ids: list[UUID] = [uuid7() for _ in range(LOGGED)]

    async def call(mine: list[UUID]) -> None:
        for inference_id in mine:
            await spool.append(_start(inference_id))
            await spool.append(_end(inference_id))

    started = time.perf_counter()
    await asyncio.gather(*(call(ids[writer::64]) for writer in range(64)))
    accepted = LOGGED / (time.perf_counter() - started)
    while spool.state().records:  # noqa: ASYNC110 - it has no event for that
        await asyncio.sleep(0.005)
    stored = LOGGED / (time.perf_counter() - started)
    draining.cancel()
    await asyncio.gather(draining, return_exceptions=True)
    await store.close()
    await spool.close()
    return accepted, stored


class _Nowhere:
    """A spool that keeps nothing: what is measured is what comes before it."""

    async def append(self, record: LogRecord) -> None:
        del record

    def state(self) -> SpoolState:
        return SpoolState(0, 0, 0.0, 1)

    async def close(self) -> None:
        pass


async def _redaction_ms() -> dict[str, float]:
    """Median of a start with 1 KiB of prose, and of one with 1 MiB."""
    finder = RedactionProcess()
    await finder.start()
    spool = RedactingSpool(_Nowhere(), finder, "hash", b"k" * 32)
    found = {}
    for name, size, times in (("1_kib", 1 << 10, 200), ("1_mib", 1 << 20, 9)):
        messages = [{"role": "user", "content": (TEXT * (size // len(TEXT) + 1))[:size]}]
        start = replace(_start(uuid7()), request={"messages": messages})
        took = []
        await spool.append(start)
        for _ in range(times):
            began = time.perf_counter()
            await spool.append(start)
            took.append((time.perf_counter() - began) * 1000)
        found[name] = statistics.median(took)
    await finder.close()
    return found


def _growth(name: str, unit: str, cost: dict[int, float], goal: str) -> list[Line]:
    """What each log costs, and how much more the larger one does."""
    few, many = min(cost), max(cost)
    lines = [
        Line("log", f"{name}_{unit}_{rows}_rows", took, unit, f"{few} rows", cost[few])
        for rows, took in cost.items()
    ]
    return [*lines, Line("log", f"{name}_growth", cost[many] / cost[few], "ratio", f"{few} rows", 1.0, goal)]


def run() -> list[Line]:
    """Measure the spool on this disk, the store on a Postgres of its own, redaction, and retention."""
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
            beside = [_fsyncs_per_second(folder / "before", size)]
            accepted, logged = asyncio.run(_logged_per_second(folder / "whole", dsn))
            beside.append(_fsyncs_per_second(folder / "after", size))
            allowed = statistics.mean(beside)
            logs = {rows: postgres.dsn(f"rows_{rows}") for rows in LARGE}
            for rows, log in logs.items():
                migrate(log)
                filled(log, rows)
            pages = asyncio.run(page_ms(logs))
            forgotten(postgres.data_dir)
            retention = {rows: retention_seconds(log) for rows, log in logs.items()}
    redaction = asyncio.run(_redaction_ms())
    return [
        Line("log", "appends_vs_fsync_1_writer", alone / fsyncs, "ratio", "bare fsync", 1.0, ">= 0.5"),
        Line("log", "appends_vs_fsync_64_writers", together / fsyncs, "ratio", "bare fsync", 1.0, ">= 2"),
        Line("log", "appends_per_s_64_writers", together, "records/s", "bare fsync", fsyncs),
        Line("log", "rows_stored_per_s", stored, "inferences/s", "bare COPY", copied),
        Line("log", "log_rows_vs_fsync", accepted / allowed, "ratio", "bare fsync", 1.0, ">= 0.5"),
        Line("log", "log_rows_accepted_per_s", accepted, "inferences/s", "bare fsync", allowed),
        Line("log", "log_rows_in_postgres_per_s", logged, "inferences/s", "bare fsync", allowed),
        Line("log", "redaction_ms_1_kib", redaction["1_kib"], "ms", "without", 0.0, "<= 1"),
        Line("log", "redaction_ms_1_mib", redaction["1_mib"], "ms", "without", 0.0, "<= 1000"),
        *_growth(
            "list_inferences_p95", "ms", {rows: percentile(took, 95) for rows, took in pages.items()}, "<= 2"
        ),
        *_growth("retention", "s", retention, "<= 2"),
    ]
