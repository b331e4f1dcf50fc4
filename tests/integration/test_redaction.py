"""Redaction with its real processes: in bounded time, and before anything reaches a disk."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import psycopg
import pytest

from grpc_server.adapters.postgres import PostgresStore
from grpc_server.adapters.redacting_spool import RedactingSpool, read_key
from grpc_server.adapters.redaction_process import RedactionProcess, UnscannedError
from grpc_server.adapters.spool import FileSpool
from grpc_server.drain import Drain
from tests import records as make
from tests.integration.conftest_log import dsn, postgres, store

__all__ = ["dsn", "postgres", "store"]


async def test_nothing_that_was_found_reaches_the_disk_or_the_database(
    tmp_path: Path, store: PostgresStore, dsn: str
) -> None:
    inner, finder = FileSpool(tmp_path / "spool", "server-1", 1 << 28), RedactionProcess()
    await inner.open()
    await finder.start()
    spool = RedactingSpool(inner, finder, "hash", read_key(tmp_path / "key"))
    big = "and so on. " * 100_000 + "bob@example.com"
    start = make.started(request={"messages": [{"role": "user", "content": "I am bob@example.com"}]})
    large = make.started(request={"messages": [{"role": "user", "content": big}]})
    shy = make.started(request={"messages": [{"role": "user", "content": "bob"}]}, text=False, learning=False)
    for record in (start, large, shy):
        await spool.append(record)
        answer = {"role": "assistant", "content": "To bob@example.com."}
        await spool.append(make.ended(record.id, answer=answer))
    await spool.append(make.feedback(start.id, comment="bob@example.com is me"))
    await spool.append(make.feedback(start.id, boolean=True, learning=False))
    for segment in (tmp_path / "spool").glob("*.log"):
        assert b"bob" not in segment.read_bytes()
    assert await Drain(inner, store).flush(60)
    with psycopg.connect(dsn) as connection:
        told = "SELECT id, ARRAY[request_redacted::text, answer_redacted::text], request::text FROM inference"
        found = connection.execute(told).fetchall()
        assert not any("bob" in row[2] for row in found)
        rows = {row[0]: row[1] for row in found}
        assert rows[start.id] == rows[large.id] == ['{"EMAIL":1}', '{"EMAIL":1}']
        assert rows[shy.id] == [None, None]
        learned = connection.execute("SELECT inference_id, feedback FROM learning_log").fetchall()
        assert {row[0] for row in learned} == {start.id, large.id}
        comments = connection.execute("SELECT redacted::text FROM feedback WHERE comment IS NOT NULL")
        assert comments.fetchall() == [('{"EMAIL":1}',)]
        # What another caller said, who is not to be learned from, is not there.
        assert [len(row[1]) for row in learned if row[0] == start.id] == [1]
    await spool.close()
    await finder.close()


async def test_a_question_that_takes_too_long_ends_and_the_next_is_answered() -> None:
    finder = RedactionProcess(cpu_seconds=0.2)
    with pytest.raises(UnscannedError):
        await finder.find(["a." * (2 << 20)])
    assert await finder.find(["a@b.example"]) == [[(0, 11, "EMAIL")]]
    await finder.close()


async def test_a_long_text_delays_no_short_one() -> None:
    finder = RedactionProcess(cpu_seconds=20)
    await finder.find(["short"])
    long = asyncio.create_task(finder.find(["a." * (3 << 20)]))
    await asyncio.sleep(0.05)
    await finder.find(["short"])
    assert not long.done()
    await finder.close()
    with pytest.raises(UnscannedError):
        await long


async def test_where_no_process_can_be_started_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    finder = RedactionProcess()
    await finder.start()
    with pytest.raises(UnscannedError):
        await finder.find(["a@b.example"])
    await finder.close()
    with pytest.raises(UnscannedError):
        await finder.find(["a@b.example"])
