"""Reading the log back: what every LogReader promises, and that Postgres' pages cost the same in any log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpc_server.adapters import postgres as postgres_module
from grpc_server.adapters import postgres_reader
from grpc_server.adapters.postgres import PostgresStore
from grpc_server.adapters.postgres_reader import PostgresReader, _look
from grpc_server.domain.errors import StoreUnavailable
from grpc_server.domain.log_query import LogFilter, first_id
from grpc_server.domain.ports import LogReader, LogStore
from grpc_server.domain.types import LogRecord, Message, Role, Status
from tests import records as make
from tests.fakes import FakeLogReader, FakeLogStore
from tests.integration.conftest_log import dsn, postgres

__all__ = ["dsn", "postgres"]

NOW = datetime.now(UTC).replace(microsecond=0)
OTHER = "gemma-3-270m:20260102T030000Z"


@dataclass
class Log:
    """A log and its reader; `scanned` rows are looked at for a page."""

    store: LogStore
    reader: LogReader

    async def add(self, *records: LogRecord) -> None:
        await self.store.store(records)

    async def ids(self, below: UUID | None = None, size: int = 50, **wanted: Any) -> list[UUID]:
        return [row.id for row in (await self.reader.page(LogFilter(**wanted), below, size)).rows]

    async def walk(self, size: int, **wanted: Any) -> tuple[list[UUID], int]:
        """The ids of all pages, and how many pages that took."""
        found: list[UUID] = []
        below, pages = None, 0
        while True:
            page = await self.reader.page(LogFilter(**wanted), below, size)
            assert len(page.rows) <= size
            found += [row.id for row in page.rows]
            pages, below = pages + 1, page.below
            if below is None:
                return found, pages


@pytest.fixture(params=["fake", "real"])
async def log(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Log]:
    monkeypatch.setattr(postgres_reader, "SCANNED", 10)
    if request.param == "fake":
        store = FakeLogStore()
        yield Log(store, FakeLogReader(store, scanned=10))
        return
    where = request.getfixturevalue("dsn")
    real = PostgresStore(where)
    await real.open()
    async with PostgresReader(where) as reader:
        yield Log(real, reader)
    await real.close()


def at(seconds: float, number: int = 0) -> UUID:
    """The id of an inference accepted then; `number` tells those of one moment apart."""
    return UUID(int=first_id(NOW + timedelta(seconds=seconds)).int | 7 << 76 | 2 << 62 | number)


def started(seconds: float, **changes: Any) -> LogRecord:
    return make.started(id=at(seconds), **changes)


async def test_an_inference_is_shown_whole_with_its_newest_feedback_first(log: Log) -> None:
    one = make.started(id=at(0), request={"messages": [], "prompt": "a\0b\ud800"}, caller="bil\0ling")
    end = make.ended(one.id, status=Status.DEADLINE, finish_reason=None, error="late")
    good = make.feedback(one.id, boolean=True, created_at=make.NOON)
    right = make.feedback(
        one.id,
        demonstration=Message(Role.ASSISTANT, "right"),
        created_at=make.NOON + timedelta(seconds=1),
    )
    comment = make.feedback(one.id, comment="a\0b", created_at=make.NOON + timedelta(seconds=2))
    await log.add(one, end, good, right, comment, make.feedback(at(1), score=0.5))
    row = await log.reader.get(one.id, "")
    assert row is not None
    assert (row.id, row.caller, row.key_id, row.alias) == (one.id, "bil\0ling", one.key_id, "default")
    assert (row.status, row.finish_reason, row.error) == (Status.DEADLINE, None, "late")
    assert (row.usage, row.timings, row.started_at) == (end.usage, end.timings, one.started_at)
    assert (row.request, row.answer) == (one.request, end.answer)
    assert list(row.feedback) == [comment, right, good]
    assert row.feedback_count == 3


async def test_an_inference_that_runs_has_no_end_and_no_answer(log: Log) -> None:
    await log.add(started(0))
    row = await log.reader.get(at(0), "billing")
    assert row is not None
    assert (row.status, row.ended_at, row.answer, row.feedback) == (Status.STARTED, None, None, ())


async def test_another_callers_inference_is_not_there(log: Log) -> None:
    await log.add(started(0))
    assert await log.reader.get(at(0), "travel-desk") is None
    assert await log.reader.get(at(1), "") is None


async def test_pages_go_from_the_newest_down_and_miss_and_repeat_nothing(log: Log) -> None:
    ids = [at(0, number) for number in range(25)]
    await log.add(*(make.started(id=each) for each in ids))
    for size, pages in ((1, 25), (7, 4), (25, 1), (200, 1)):
        assert await log.walk(size) == (ids[::-1], pages)


async def test_what_comes_meanwhile_moves_no_page(log: Log) -> None:
    await log.add(*(started(seconds) for seconds in range(6)))
    first = await log.reader.page(LogFilter(), None, 3)
    await log.add(started(100), started(101))
    second = await log.reader.page(LogFilter(), first.below, 3)
    assert [row.id for row in (*first.rows, *second.rows)] == [at(seconds) for seconds in range(5, -1, -1)]


async def test_rows_are_sifted_by_caller_session_version_and_status(log: Log) -> None:
    await log.add(
        started(0),
        started(1, caller="travel-desk"),
        started(2, session_id="another"),
        started(3, model_version=OTHER),
        make.ended(at(3), status=Status.ERROR),
        started(4, caller="travel-desk", session_id="another"),
        started(5, session_id=""),
    )
    assert await log.ids(caller="travel-desk") == [at(4), at(1)]
    assert await log.ids(session_id="another") == [at(4), at(2)]
    assert await log.ids(session_id="another", caller="billing") == [at(2)]
    assert await log.ids(model_version=OTHER) == [at(3)]
    assert await log.ids(status=Status.ERROR, caller="billing") == [at(3)]
    assert await log.ids(status=Status.ERROR, model_version=make.started().model_version) == []
    assert await log.ids(caller="nobody") == []


async def test_a_time_range_holds_its_beginning_and_not_its_end(log: Log) -> None:
    await log.add(*(started(seconds) for seconds in (-86400 * 400, 0, 1, 2, 86400 * 400)))
    second = timedelta(seconds=1)
    assert await log.ids(since=NOW, until=NOW + 2 * second) == [at(1), at(0)]
    assert await log.ids(since=NOW + second) == [at(86400 * 400), at(2), at(1)]
    assert await log.ids(until=NOW) == [at(-86400 * 400)]
    assert await log.ids(since=NOW + second, until=NOW) == []
    assert await log.ids(since=datetime(1970, 1, 1, tzinfo=UTC), until=datetime(1970, 1, 1, tzinfo=UTC)) == []
    assert len(await log.ids(until=datetime(9999, 12, 31, tzinfo=UTC))) == 5


async def test_a_page_that_finds_little_stops_looking_and_says_where_to_go_on(log: Log) -> None:
    rare = [at(0, 3), at(0, 27)]
    await log.add(
        *(
            make.started(id=at(0, number), model_version=OTHER if at(0, number) in rare else "m:1")
            for number in range(35)
        )
    )
    page = await log.reader.page(LogFilter(model_version=OTHER), None, 5)
    assert [row.id for row in page.rows] == [rare[1]]
    assert page.below == at(0, 25)
    assert await log.walk(5, model_version=OTHER) == (rare[::-1], 4)
    assert await log.walk(1, model_version=OTHER, caller="billing") == (rare[::-1], 4)


async def test_texts_are_only_in_what_was_asked_for_by_id(log: Log) -> None:
    await log.add(started(0), make.ended(at(0)), make.feedback(at(0), boolean=True))
    [row] = (await log.reader.page(LogFilter(), None, 5)).rows
    assert (row.request, row.answer, row.feedback, row.feedback_count) == (None, None, (), 1)
    assert row.status is Status.OK


async def test_a_log_that_is_down_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_module, "CONNECT_SECONDS", 1)
    readers: list[LogReader] = [FakeLogReader(FakeLogStore(down=True))]
    async with PostgresReader("postgresql://postgres@127.0.0.1:9/agentloop") as reader:
        for each in (*readers, reader):
            with pytest.raises(StoreUnavailable):
                await each.get(at(0), "")
            with pytest.raises(StoreUnavailable):
                await each.page(LogFilter(), None, 1)


# Postgres alone


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 5),
            st.sampled_from(["billing", "travel-desk"]),
            st.sampled_from(["", "s"]),
            st.sampled_from(["m:1", OTHER]),
        ),
        max_size=30,
    ),
    size=st.integers(1, 12),
    wanted=st.fixed_dictionaries(
        {},
        optional={
            "caller": st.sampled_from(["billing", "travel-desk"]),
            "session_id": st.just("s"),
            "model_version": st.just(OTHER),
            "since": st.integers(0, 5).map(lambda s: NOW + timedelta(seconds=s)),
            "until": st.integers(0, 5).map(lambda s: NOW + timedelta(seconds=s)),
        },
    ),
)
async def test_postgres_finds_what_the_fake_finds_page_by_page(
    dsn: str, rows: Sequence[tuple[int, str, str, str]], size: int, wanted: dict[str, Any]
) -> None:
    records = [
        make.started(id=at(seconds, number), caller=caller, session_id=session, model_version=version)
        for number, (seconds, caller, session, version) in enumerate(rows)
    ]
    real, fake = PostgresStore(dsn), FakeLogStore()
    await real.open()
    try:
        async with PostgresReader(dsn) as reader, real.reading() as connection:
            await connection.execute("TRUNCATE inference")
            await connection.commit()
            await real.store(records)
            await fake.store(records)
            assert (await Log(real, reader).walk(size, **wanted))[0] == (
                await Log(fake, FakeLogReader(fake)).walk(size, **wanted)
            )[0]
    finally:
        await real.close()


def plan(dsn: str, wanted: LogFilter) -> tuple[str, int]:
    """How Postgres would look for a page, and how many partitions it opens."""
    query, values = _look(wanted, None, 50)
    with psycopg.connect(dsn) as connection:
        lines = connection.execute(b"EXPLAIN (COSTS OFF) " + query.as_bytes(connection), values).fetchall()
    text = "\n".join(line for (line,) in lines)
    return text, sum(" on inference_" in line and "Scan" in line for (line,) in lines)


@pytest.fixture
def large(dsn: str) -> str:
    """5,000 rows over three months: one caller asks all the time, another long ago only."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(
            """
            INSERT INTO inference (id, server_id, caller, key_id, alias, model_version, target_role,
                                   session_id, request, started_at)
            SELECT (lpad(to_hex(ms), 12, '0') || '7000800' || lpad(to_hex(n), 13, '0'))::uuid, 's',
                   CASE WHEN n % 10 = 0 AND n < 500 THEN 'old' ELSE 'busy' END, 'k', 'default', 'm:1',
                   'stable', CASE WHEN n % 100 = 0 THEN 'talk' ELSE '' END, '{}', now()
            FROM generate_series(1, 5000) n,
                 LATERAL (SELECT (extract(epoch FROM now()) * 1000 + n * 1500000.0)::bigint AS ms) m
            """
        )
        connection.execute("ANALYZE inference")
    return dsn


def test_a_page_walks_an_index_and_sorts_nothing(large: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_reader, "SCANNED", 200)  # a small share, as in a real log
    for wanted, index in (
        (LogFilter(), "pkey"),
        (LogFilter(caller="old"), "caller_id_idx"),
        (LogFilter(caller="nobody"), "caller_id_idx"),
        (LogFilter(caller="busy", status=Status.ERROR), "caller_id_idx"),
        (LogFilter(session_id="talk", caller="busy"), "session_id_id_idx"),
    ):
        text, _ = plan(large, wanted)
        used = [line for line in text.splitlines() if "using inference_" in line]
        assert used, text
        assert all(index in line for line in used if "default" not in line), text
        assert "Seq Scan on inference_2" not in text, text


def test_a_time_range_leaves_whole_months_out(large: str) -> None:
    _, all_months = plan(large, LogFilter(caller="busy"))
    later = datetime.now(UTC) + timedelta(days=70)
    _, some = plan(large, LogFilter(caller="busy", since=later, until=later + timedelta(days=1)))
    assert some < all_months


async def test_readers_wait_for_each_other_and_never_for_writers(dsn: str) -> None:
    store = PostgresStore(dsn)
    await store.open()
    async with PostgresReader(dsn) as reader:
        await store.store([make.started(id=at(number)) for number in range(30)])
        found = await asyncio.gather(*(reader.page(LogFilter(), None, 10) for _ in range(20)))
        assert all([row.id for row in page.rows] == [row.id for row in found[0].rows] for page in found)
    await store.close()


async def test_much_feedback_is_cut_off_by_number_and_by_size(dsn: str) -> None:
    store = PostgresStore(dsn)
    await store.open()
    big = "x" * 400_000
    async with PostgresReader(dsn) as reader:
        said = [make.feedback(at(1), boolean=True) for _ in range(1010)]
        await store.store([started(0), started(1)])
        await store.store([*(make.feedback(at(0), comment=big) for _ in range(4)), *said])
        large, many = await reader.get(at(0), ""), await reader.get(at(1), "")
    await store.close()
    assert large is not None
    assert many is not None
    assert (len(large.feedback), large.feedback_count) == (2, 4)
    assert (len(many.feedback), many.feedback_count) == (20, 1000)
