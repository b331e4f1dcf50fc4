"""The store on a real Postgres: exactly once, in any order, bounded in time, and lossless."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from psycopg import errors
from psycopg_pool import PoolTimeout

from grpc_server.adapters import postgres as postgres_module
from grpc_server.adapters.local_postgres import LocalPostgres
from grpc_server.adapters.postgres import ERRORS, PostgresStore, translate
from grpc_server.adapters.postgres_text import from_text
from grpc_server.adapters.record_json import attempts_to_plain
from grpc_server.adapters.spool_frame import Corrupt
from grpc_server.domain.errors import StoreUnavailable
from grpc_server.domain.plain import plain
from grpc_server.domain.types import (
    Attempt,
    Feedback,
    InferenceStarted,
    Limits,
    LogRecord,
    Message,
    Role,
    ServerStarted,
    Status,
    TargetRole,
    Timings,
    Usage,
)
from tests import records as make
from tests.integration.conftest_log import dsn, empty_dsn, postgres, store

__all__ = ["dsn", "empty_dsn", "postgres", "store"]

LATER = make.NOON + timedelta(hours=1)


def query(dsn: str, sql: str, *values: object) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn) as connection:
        return connection.execute(sql, values).fetchall()


def log(dsn: str) -> list[dict[str, Any]]:
    with psycopg.connect(dsn, row_factory=psycopg.rows.dict_row) as connection:
        return connection.execute("SELECT * FROM learning_log ORDER BY inference_id").fetchall()


# What is stored


async def test_an_inference_and_its_feedback_make_one_row_of_the_log(store: PostgresStore, dsn: str) -> None:
    start = make.started(session_id="s-1")
    end = make.ended(start.id)
    demonstration = Message(Role.ASSISTANT, "better")
    said: list[Feedback] = [
        make.feedback(start.id, boolean=False),
        make.feedback(start.id, score=0.5),
        make.feedback(start.id, comment="meh"),
        make.feedback(start.id, demonstration=demonstration),
    ]
    await store.store([start, end, *said])
    (row,) = log(dsn)
    assert row["inference_id"] == start.id
    assert row["request"] == start.request
    assert row["answer"] == end.answer
    assert (row["caller"], row["key_id"], row["alias"], row["session_id"]) == (
        start.caller,
        start.key_id,
        start.alias,
        "s-1",
    )
    assert (row["status"], row["finish_reason"], row["error"]) == ("ok", "stop", "")
    assert (row["input_tokens"], row["output_tokens"]) == (3, 2)
    assert (row["queue_ms"], row["ttft_ms"], row["total_ms"]) == (0.5, 12.25, 40.0)
    assert (row["started_at"], row["ended_at"]) == (start.started_at, end.ended_at)
    assert [(one["boolean"], one["score"], one["comment"]) for one in row["feedback"]] == [
        (False, None, None),
        (None, 0.5, None),
        (None, None, "meh"),
        (None, None, None),
    ]
    assert row["feedback"][3]["demonstration"]["content"] == "better"
    assert datetime.fromisoformat(row["feedback"][0]["created_at"]) == make.NOON


async def test_a_row_names_the_version_that_answered_and_those_that_failed(
    store: PostgresStore, dsn: str
) -> None:
    start = make.started(model_version="gemma:new", target_role=TargetRole.CANARY)
    attempts = (
        Attempt("gemma:new", TargetRole.CANARY, "EngineUnavailable", "it is down\0"),
        Attempt("gemma:base", TargetRole.STABLE),
    )
    await store.store([start])
    assert query(dsn, "SELECT model_version, target_role FROM inference") == [("gemma:new", "canary")]
    await store.store([make.ended(start.id, attempts=attempts)])
    (row,) = log(dsn)
    assert (row["model_version"], row["target_role"]) == ("gemma:base", "stable")
    ((stored,),) = query(dsn, "SELECT attempts FROM inference")
    assert stored == attempts_to_plain(attempts)


async def test_a_row_names_the_trace_in_which_it_was_asked(store: PostgresStore, dsn: str) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    traced = make.started(traceparent=f"00-{trace}-b7ad6b7169203331-01")
    for start, wanted in ((traced, trace), (make.started(), ""), (make.started(traceparent="\0"), "")):
        await store.store([start])
        assert query(dsn, "SELECT trace_id FROM inference WHERE id = %s", start.id) == [(wanted,)]


async def test_an_inference_is_in_the_log_once_it_has_ended(store: PostgresStore, dsn: str) -> None:
    start = make.started()
    await store.store([start])
    assert log(dsn) == []
    await store.store([make.ended(start.id)])
    assert len(log(dsn)) == 1


async def test_the_order_of_a_tools_parameters_is_kept(store: PostgresStore, dsn: str) -> None:
    properties = {"zeta": {"type": "string"}, "a": {"type": "integer"}, "mid": {}}
    start = make.started(request={"tools": [{"parameters": {"properties": properties}}], "x": 1.0})
    await store.store([start, make.ended(start.id)])
    stored = log(dsn)[0]["request"]
    assert list(stored["tools"][0]["parameters"]["properties"]) == ["zeta", "a", "mid"]
    assert isinstance(stored["x"], float)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=make.starts | make.feedbacks)
def test_what_is_stored_is_what_was_written(dsn: str, record: InferenceStarted | Feedback) -> None:
    """NUL, lone surrogates and all: jsonb would refuse them, text columns would too."""
    record = replace(record, id=make.new_id())

    async def run() -> None:
        store = PostgresStore(dsn, connections=1)
        await store.open()
        try:
            await store.store([record])
        finally:
            await store.close()

    asyncio.run(run())
    if isinstance(record, InferenceStarted):
        (row,) = query(
            dsn, "SELECT server_id, caller, session_id, request FROM inference WHERE id = %s", record.id
        )
        assert [from_text(value) for value in row[:3]] == [
            record.server_id,
            record.caller,
            record.session_id,
        ]
        assert row[3] == plain(record.request)
    else:
        (row,) = query(
            dsn,
            'SELECT "boolean", score, comment, demonstration FROM feedback WHERE id = %s',
            record.id,
        )
        assert (row[0], row[1]) == (record.boolean, record.score)
        assert record.comment == (None if row[2] is None else from_text(row[2]))
        if record.demonstration is not None:
            assert row[3]["content"] == record.demonstration.content


async def test_storing_twice_changes_nothing(store: PostgresStore, dsn: str) -> None:
    start = make.started()
    records: list[LogRecord] = [start, make.feedback(start.id), make.ended(start.id)]
    await store.store(records)
    before = log(dsn)
    await store.store(records)
    await store.store([*records, *records])
    assert log(dsn) == before


async def test_a_repeated_start_does_not_reopen_what_has_ended(store: PostgresStore, dsn: str) -> None:
    start = make.started()
    await store.store([start, make.ended(start.id)])
    await store.store([start])
    assert log(dsn)[0]["status"] == "ok"


async def test_the_first_end_counts(store: PostgresStore, dsn: str) -> None:
    start = make.started()
    await store.store([start, make.ended(start.id), make.ended(start.id, status=Status.ERROR)])
    assert log(dsn)[0]["status"] == "ok"


async def test_feedback_may_come_before_its_inference(store: PostgresStore, dsn: str) -> None:
    start = make.started()
    await store.store([make.feedback(start.id, comment="early")])
    await store.store([start, make.ended(start.id)])
    assert log(dsn)[0]["feedback"][0]["comment"] == "early"


async def test_an_end_without_a_start_is_refused_and_takes_its_batch_along(
    store: PostgresStore, dsn: str
) -> None:
    start, lost = make.started(), make.new_id()
    with pytest.raises(ValueError, match=str(lost)):
        await store.store([start, make.ended(start.id), make.ended(lost)])
    assert query(dsn, "SELECT FROM inference") == []


# A server that starts anew


async def test_what_a_server_had_begun_is_aborted_when_it_starts_anew(store: PostgresStore, dsn: str) -> None:
    begun, done, elsewhere = make.started(), make.started(), make.started(server_id="server-2")
    await store.store([begun, done, elsewhere, make.ended(done.id)])
    await store.store([ServerStarted("server-1", LATER)])
    rows = {row["inference_id"]: row for row in log(dsn)}
    assert rows.keys() == {begun.id, done.id}
    assert rows[begun.id]["status"] == "aborted"
    assert rows[begun.id]["ended_at"] == LATER
    assert rows[begun.id]["answer"] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [],
        "tool_name": "",
    }


async def test_in_one_batch_only_what_came_before_the_start_is_aborted(
    store: PostgresStore, dsn: str
) -> None:
    before, after = make.started(), make.started()
    await store.store([before, ServerStarted("server-1", LATER), after])
    await store.store([make.ended(after.id)])
    assert {row["inference_id"]: row["status"] for row in log(dsn)} == {before.id: "aborted", after.id: "ok"}


async def test_a_server_start_that_is_stored_again_aborts_nothing_more(
    store: PostgresStore, dsn: str
) -> None:
    begun = ServerStarted("server-1", LATER)
    after = make.started()
    await store.store([begun, after])
    await store.store([begun, after])
    assert query(dsn, "SELECT status FROM inference") == [("started",)]


async def test_an_end_that_comes_after_all_replaces_the_abort(store: PostgresStore, dsn: str) -> None:
    """Two servers of one name by mistake: what the other has ended is not lost."""
    start = make.started()
    await store.store([start, ServerStarted("server-1", LATER)])
    await store.store([make.ended(start.id)])
    assert log(dsn)[0]["status"] == "ok"


# The watermark


def freeze(dsn: str, low: str) -> tuple[str, list[Any]]:
    """One cycle's view of the log, as the snapshot step reads it."""
    with psycopg.connect(dsn) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.execute("SET ROLE agentloop_freeze")
        high = connection.execute("SELECT pg_snapshot_xmin(pg_current_snapshot())::text").fetchone()
        assert high is not None
        rows = connection.execute(
            "SELECT inference_id FROM learning_log "
            "WHERE changed_xid::xid8 >= %s::xid8 AND changed_xid::xid8 < %s::xid8",
            (low, high[0]),
        ).fetchall()
        return high[0], [row[0] for row in rows]


async def test_a_row_is_frozen_once_and_again_when_feedback_comes(store: PostgresStore, dsn: str) -> None:
    start = make.started()
    await store.store([start, make.ended(start.id)])
    high, rows = freeze(dsn, "0")
    assert rows == [start.id]
    high, rows = freeze(dsn, high)
    assert rows == []
    await store.store([make.feedback(start.id)])
    high, rows = freeze(dsn, high)
    assert rows == [start.id]
    assert freeze(dsn, high)[1] == []


async def test_a_transaction_that_commits_late_is_not_missed(store: PostgresStore, dsn: str) -> None:
    first, second = make.started(), make.started()
    await store.store([first])
    with psycopg.connect(dsn) as slow:
        slow.execute(
            "UPDATE inference SET status = 'ok', changed_xid = pg_current_xact_id() WHERE id = %s",
            (first.id,),
        )
        await store.store([second, make.ended(second.id)])  # begun later, committed earlier
        high, rows = freeze(dsn, "0")
        assert rows == []
        slow.commit()
    high, rows = freeze(dsn, high)
    assert set(rows) == {first.id, second.id}


def test_the_freezing_role_reads_the_view_and_nothing_else(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SET ROLE agentloop_freeze")
        connection.execute("SELECT * FROM learning_log")
        for table in ("inference", "feedback", "api_token", "route", "route_target", "event", "dead_letter"):
            with pytest.raises(errors.InsufficientPrivilege):
                connection.execute(f"SELECT * FROM {table}")
        with pytest.raises((errors.InsufficientPrivilege, errors.ObjectNotInPrerequisiteState)):
            connection.execute("DELETE FROM learning_log")


# What the database will never take


@pytest.mark.parametrize(
    "poison",
    [
        lambda start: [make.started(request={"number": float("nan")})],
        lambda start: [start, make.ended(start.id, usage=Usage(2**31, 0))],
        lambda start: [start, make.ended(start.id, usage=Usage(-1, 0))],
        lambda start: [start, make.ended(start.id, timings=Timings(10**400, None, 0))],
        lambda start: [make.feedback(start.id, boolean=True, score=1.0)],
        lambda start: [make.feedback(start.id, boolean=None)],
    ],
)
async def test_a_record_that_breaks_a_rule_of_the_database_is_a_value_error(
    store: PostgresStore, dsn: str, poison: Any
) -> None:
    with pytest.raises(ValueError, match=r".+"):
        await store.store(poison(make.started()))
    assert query(dsn, "SELECT FROM inference") == []
    await store.store([make.started()])  # the connection is well


async def test_nesting_that_the_database_cannot_follow_is_a_value_error(store: PostgresStore) -> None:
    deep: Any = "end"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match=r".+"):
        await store.store([make.started(request={"messages": deep})])


async def test_dead_letters_can_be_read_in_the_database(store: PostgresStore, dsn: str) -> None:
    record = make.started(session_id="\0")
    await store.add_dead_letter(record, "poison")
    await store.add_dead_letter(record, "poison")
    await store.add_dead_letter(Corrupt(b"\x00\xff"), "no record")
    rows = query(dsn, "SELECT kind, reason FROM dead_letter ORDER BY kind")
    assert rows == [("InferenceStarted", "poison"), ("corrupt", "no record")]


# Errors


def error_classes() -> Iterator[type[psycopg.Error]]:
    found, todo = set(), [psycopg.Error]
    while todo:
        kind = todo.pop()
        if kind not in found:
            found.add(kind)
            todo += kind.__subclasses__()
            yield kind


@pytest.mark.parametrize("kind", sorted(error_classes(), key=str))
def test_every_error_of_psycopg_is_mapped(kind: type[psycopg.Error]) -> None:
    mapped = translate(kind("text"))
    assert type(mapped) in set(ERRORS.values())
    bad_record = issubclass(kind, psycopg.DataError | psycopg.IntegrityError) or kind in (
        errors.ProgramLimitExceeded,
        errors.StatementTooComplex,
    )
    assert isinstance(mapped, ValueError) == bad_record


def test_errors_that_are_not_the_databases_stay_what_they_are() -> None:
    error = RuntimeError("a bug")
    assert translate(error) is error
    assert isinstance(translate(PoolTimeout("busy")), StoreUnavailable)


async def test_an_error_never_quotes_a_row(store: PostgresStore) -> None:
    start = make.started(request={"messages": "a secret prompt"})
    with pytest.raises(ValueError, match="check constraint") as refused:
        await store.store([start, make.ended(start.id, usage=Usage(-1, 0), error="a secret answer")])
    assert "secret" not in str(refused.value)


async def test_a_database_that_is_not_migrated_says_what_to_do(empty_dsn: str) -> None:
    store = PostgresStore(empty_dsn)
    await store.open()
    with pytest.raises(StoreUnavailable, match="grpc_server migrate"):
        await store.check()
    with pytest.raises(StoreUnavailable):
        await store.store([make.started()])  # no record is to blame
    await store.close()


# Outages


async def test_a_database_that_is_not_there_is_unavailable_within_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(postgres_module, "READ_SECONDS", 1.0)
    store = PostgresStore("postgresql://postgres@127.0.0.1:9/agentloop")
    await store.open()
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        await store.check()
    assert time.monotonic() - began < 10
    await store.close()


async def test_the_store_recovers_from_lost_connections_at_once(store: PostgresStore, dsn: str) -> None:
    await asyncio.gather(*(store.check() for _ in range(4)))
    query(
        dsn,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    await asyncio.sleep(0.2)
    await asyncio.gather(*(store.check() for _ in range(4)))


async def test_a_database_that_hangs_is_cut_off(
    store: PostgresStore, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that was stopped keeps no timeout of its own, and would hang a cancellation, too."""
    monkeypatch.setattr(postgres_module, "READ_SECONDS", 0.5)
    await store.check()
    pids = query(
        dsn,
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    for (pid,) in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await store.check()
        assert time.monotonic() - began < 10
    finally:
        for (pid,) in pids:
            os.kill(pid, signal.SIGCONT)
    await store.check()


async def test_a_reader_that_gives_up_does_not_hang_on_a_hanging_database(
    store: PostgresStore, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_module, "READ_SECONDS", 1.0)
    await store.check()
    pids = query(
        dsn,
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    for (pid,) in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises((TimeoutError, StoreUnavailable)):
            await asyncio.wait_for(store.check(), 0.2)
        assert time.monotonic() - began < 10
    finally:
        for (pid,) in pids:
            os.kill(pid, signal.SIGCONT)


async def test_changes_of_tokens_and_routes_are_noted(store: PostgresStore, dsn: str) -> None:
    from grpc_server.adapters.credentials import new_token
    from tests.fakes import ALL_SCOPES, route_to

    _, record = new_token("billing", ALL_SCOPES, datetime.now(UTC), None)
    await store.create(record, "root")
    await store.limit(record.key_id, Limits(7), "root")
    await store.revoke(record.key_id, datetime.now(UTC), "root")
    await store.set_route(route_to(revision=0), "ops")
    rows = query(dsn, "SELECT kind, actor, subject FROM event ORDER BY id")
    assert rows == [
        ("token_created", "root", record.key_id),
        ("token_limited", "root", record.key_id),
        ("token_revoked", "root", record.key_id),
        ("route_set", "ops", "default"),
    ]
    hashes = query(dsn, "SELECT detail::text FROM event")
    assert record.secret_sha256.hex() not in str(hashes)
    assert '"requests_per_minute":7' in str(hashes)


async def test_events_are_read_by_kind_and_time_the_latest_last(store: PostgresStore) -> None:
    before = datetime.now(UTC) - timedelta(minutes=1)
    for number in range(5):
        await store.note("odd" if number % 2 else "even", "a\0é", "s", {"number": number})
    numbers = [event.detail["number"] for event in await store.events()]
    assert numbers == [0, 1, 2, 3, 4]
    assert [event.detail["number"] for event in await store.events("odd")] == [1, 3]
    assert [event.detail["number"] for event in await store.events(limit=2)] == [3, 4]
    assert len(await store.events("even", before)) == 3
    assert await store.events("", datetime.now(UTC) + timedelta(minutes=1)) == []
    assert (await store.events())[0].actor == "a\0é"


def test_the_local_server_is_reachable_by_its_owner_only(postgres: LocalPostgres) -> None:
    status = postgres.data_dir.stat()
    assert status.st_mode & 0o077 == 0


def test_an_ended_record_has_every_column_of_the_log(dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        columns = [one.name for one in connection.execute("SELECT * FROM learning_log").description or ()]
    assert columns == [
        "inference_id",
        "changed_xid",
        "caller",
        "key_id",
        "alias",
        "model_version",
        "target_role",
        "session_id",
        "request",
        "answer",
        "status",
        "finish_reason",
        "error",
        "input_tokens",
        "output_tokens",
        "queue_ms",
        "ttft_ms",
        "total_ms",
        "started_at",
        "ended_at",
        "feedback",
    ]
