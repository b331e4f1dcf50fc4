"""A log of many rows: one of its months, and what it costs to read pages of it, and to drop it.

What is compared is the same log with ten or a hundred times the rows, so that each figure of the larger one
has its peer in the same run.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import psycopg
from google.protobuf.timestamp_pb2 import Timestamp
from psycopg import sql

from agentloop.v1 import log_pb2 as pb
from agentloop.v1 import log_pb2_grpc
from grpc_server.adapters.learned import Learned
from grpc_server.adapters.partitions import first_id, month, name_of
from grpc_server.adapters.postgres_reader import PostgresReader
from grpc_server.adapters.retention import retain
from grpc_server.audit import Audit
from grpc_server.interceptors.auth import AuthInterceptor
from grpc_server.interceptors.errors import ErrorInterceptor
from grpc_server.servicers.log import LogServicer
from tests.fakes import FakeAuthenticator, FakeLogStore

CALLERS = 20
SESSION_ROWS = 10
PAGES = 60
"""Of each kind, of each log."""
WARMING = 3
"""Rounds before them, in which connections are made and plans are found."""
_TOKEN = (("authorization", "Bearer al_admin_token"),)

_FILL = """
INSERT INTO {month} (id, server_id, caller, key_id, alias, model_version, target_role, session_id, request,
                     status, answer, started_at, ended_at)
SELECT (lpad(to_hex({first_ms} + n * {seconds} * 1000 / {rows}), 12, '0') || '7' ||
        lpad(to_hex(n), 19, '0'))::uuid,
       'bench', 'caller ' || n % {callers}, 'k', 'default', 'm:' || n % 2, 'stable',
       's' || n / {session_rows},
       {request}::json, CASE WHEN n % 100 = 0 THEN 'error' ELSE 'ok' END, {answer}::json, at, at
FROM generate_series(0::bigint, {rows} - 1) AS n,
     LATERAL (SELECT {first}::timestamptz + n * {seconds} / {rows} * interval '1 second' AS at) AS moment
"""


def filled(dsn: str, rows: int) -> str:
    """Fill the month before last, evenly, with rows of some 400 bytes; returns its partition's name.

    As a month is that has been over for long: indexed, vacuumed, and written to the disk. The table is filled
    before it gets its indexes, as its partition: a third of the time.
    """
    first = _first_moment()
    after = month(first, 1)
    table = sql.Identifier(name_of(first))
    values = {
        "rows": rows,
        "callers": CALLERS,
        "session_rows": SESSION_ROWS,
        "first": first,
        "first_ms": int(first.timestamp() * 1000),
        "seconds": int((after - first).total_seconds()),
        "request": json.dumps({"messages": [{"role": "user", "content": "Oslo? " * 10}]}),
        "answer": json.dumps({"role": "assistant", "content": "It rains."}),
    }
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SET maintenance_work_mem = '256MB'")
        with connection.transaction():
            connection.execute(
                sql.SQL("CREATE TABLE {} (LIKE inference INCLUDING DEFAULTS INCLUDING CONSTRAINTS)").format(
                    table
                )
            )
            named = {name: sql.Literal(value) for name, value in values.items()}
            connection.execute(sql.SQL(_FILL).format(month=table, **named))
            connection.execute(
                sql.SQL("ALTER TABLE inference ATTACH PARTITION {} FOR VALUES FROM ({}) TO ({})").format(
                    table, sql.Literal(first_id(first)), sql.Literal(first_id(after))
                )
            )
        connection.execute(sql.SQL("VACUUM (ANALYZE) {}").format(table))
        connection.execute("CHECKPOINT")
    return name_of(first)


# Pages


async def page_ms(logs: Mapping[int, str]) -> dict[int, list[float]]:
    """Milliseconds of each ListInferences, by the rows of the log that was asked; the logs take turns.

    Asked for the newest rows, a caller's, a conversation's, those that failed (one in a hundred) and those of
    a model version, from any moment of the month downwards.
    """
    took: dict[int, list[float]] = {rows: [] for rows in logs}
    chance = random.Random(1)
    async with AsyncExitStack() as stack:
        asked = {rows: await stack.enter_async_context(_served(dsn)) for rows, dsn in logs.items()}
        for turn in range(WARMING + PAGES):
            for rows, log in asked.items():
                for request in _requests(rows, chance):
                    began = time.perf_counter()
                    answer = await log.ListInferences(request, metadata=_TOKEN)
                    if turn >= WARMING:
                        took[rows].append((time.perf_counter() - began) * 1000)
                    assert answer.inferences, request
    return took


@asynccontextmanager
async def _served(dsn: str) -> AsyncIterator[log_pb2_grpc.LogServiceAsyncStub]:
    """LogService of this log, over a socket."""
    async with AsyncExitStack() as stack:
        server = grpc.aio.server(
            interceptors=[ErrorInterceptor(), AuthInterceptor(FakeAuthenticator(), Audit(FakeLogStore(), ""))]
        )
        reader = await stack.enter_async_context(PostgresReader(dsn))
        log_pb2_grpc.add_LogServiceServicer_to_server(LogServicer(reader), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stack.push_async_callback(server.stop, 1.0)
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        yield log_pb2_grpc.LogServiceStub(await stack.enter_async_context(channel))


def _requests(rows: int, chance: random.Random) -> list[pb.ListInferencesRequest]:
    """One of each kind."""
    first = _first_moment()
    length = month(first, 1) - first
    until = Timestamp()
    until.FromDatetime(first + length * chance.uniform(0.5, 1))
    session = chance.randrange(rows // SESSION_ROWS)
    kinds: list[dict[str, Any]] = [
        {},
        {"caller": f"caller {chance.randrange(CALLERS)}"},
        {"model_version": "m:1"},
        {"status": pb.INFERENCE_STATUS_ERROR},
    ]
    requests = [pb.ListInferencesRequest(until=until, **kind) for kind in kinds]
    return [*requests, pb.ListInferencesRequest(session_id=f"s{session}")]


# Retention


def forgotten(data_dir: Path) -> None:
    """Have the kernel keep nothing of a cluster's files in memory.

    A month that goes has not been looked at for weeks, where this one was written just now: to remove a file
    that is in memory takes as long as it is large, and so would be measured instead.
    """
    for path in (data_dir / "cluster" / "base").rglob("*"):
        with suppress(FileNotFoundError, IsADirectoryError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def retention_seconds(dsn: str) -> float:
    """What it takes to drop the month, all of it learned."""
    with psycopg.connect(dsn) as connection:
        told = connection.execute(
            "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint, system_identifier::text, "
            "(SELECT oid::text FROM pg_database WHERE datname = current_database()) FROM pg_control_system()"
        ).fetchone()
    assert told is not None
    started = time.perf_counter()
    done = retain(dsn, 1, Learned(*told))
    seconds = time.perf_counter() - started
    assert [one.reason for one in done.months] == [""]
    return seconds


def _first_moment() -> datetime:
    """Of the month that is filled: the one before last."""
    return month(datetime.now(UTC), -2)
