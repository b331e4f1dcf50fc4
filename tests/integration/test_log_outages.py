"""A Postgres that is full, slow, restarted or away, and a clock that is set back: every row is counted."""

# ruff: noqa: ASYNC220 - one thing after the other is what these tests are about
from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import psutil
import psycopg
import pytest

from grpc_server.adapters import postgres as postgres_module
from grpc_server.adapters.partitions import first_id
from grpc_server.adapters.postgres import PostgresStore
from grpc_server.adapters.spool import FileSpool
from grpc_server.domain.types import InferenceStarted, ServerStarted
from grpc_server.drain import Drain
from tests import records as make
from tests.coverage_files import untraced
from tests.integration.conftest_log import dsn, postgres, store
from tests.integration.test_log_faults import (
    KillablePostgres,
    fill,
    killable,
    query,
    spool,
    statuses,
    stored_feedback,
    until,
)
from tests.live_server import ROOT
from tests.small_disk import small_disk_at

__all__ = ["dsn", "killable", "postgres", "spool", "store"]


def noise(characters: int) -> dict[str, str]:
    """Text that a database cannot compress."""
    return {"text": os.urandom(characters // 2).hex()}


async def write(spool: FileSpool, count: int, size: int = 100) -> list[InferenceStarted]:
    """Whole inferences, with feedback on every second."""
    starts = [make.started(request=noise(size)) for _ in range(count)]
    for number, start in enumerate(starts):
        await spool.append(start)
        await spool.append(make.ended(start.id))
        if number % 2:
            await spool.append(make.feedback(start.id))
    return starts


def all_ok(dsn: str, starts: list[InferenceStarted]) -> bool:
    wanted = {str(start.id): "ok" for start in starts}
    return statuses(dsn) == wanted and len(stored_feedback(dsn)) == len(starts) // 2


@pytest.fixture
async def draining(spool: FileSpool) -> AsyncIterator[Callable[[str], Drain]]:
    """Starts to store what the spool gets, as a server does."""
    tasks, stores = [], []

    def start(dsn: str) -> Drain:
        made = PostgresStore(dsn)
        stores.append(made)
        drain = Drain(spool, made, dead_letters=made, linger_seconds=0.01)

        async def run() -> None:
            await made.open()
            await drain.run()

        tasks.append(asyncio.create_task(run()))
        return drain

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for one in stores:
        await one.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
async def test_a_postgres_whose_disk_is_full_takes_everything_once_it_has_room(
    memory: Path, cluster: Callable[[Path], Path], spool: FileSpool, draining: Callable[[str], Drain]
) -> None:
    with small_disk_at(memory / f"disk {uuid4().hex}", 192) as disk:
        postgres = KillablePostgres(cluster(disk / "postgres"))
        postgres.start()
        drain = draining(postgres.dsn)
        before = await write(spool, 5)
        await until(lambda: all_ok(postgres.dsn, before), 30)

        others = fill(disk)
        late = await write(spool, 60, 100_000)  # callers notice nothing
        await until(lambda: bool(drain.last_error), 30)
        assert not drain.store_up
        assert spool.state().records > 0
        assert spool.dead_letters() == 0

        others.unlink()
        try:
            await until(lambda: all_ok(postgres.dsn, [*before, *late]), 30)
        except psycopg.OperationalError:  # it may have ended itself: then somebody starts it
            postgres.start()
            await until(lambda: all_ok(postgres.dsn, [*before, *late]), 60)
        assert (spool.state().records, spool.dead_letters()) == (0, 0)
        postgres.stop()


async def test_a_slow_postgres_delays_no_caller_and_gets_everything(
    spool: FileSpool, dsn: str, draining: Callable[[str], Drain]
) -> None:
    make_slow(dsn, 0.1)
    draining(dsn)
    starts: list[InferenceStarted] = []
    for _ in range(5):
        starts += await write(spool, 20)
        await asyncio.sleep(0.05)
    assert len(statuses(dsn)) < len(starts)  # it lags behind
    await until(lambda: all_ok(dsn, starts), 60)
    assert (spool.state().records, spool.dead_letters()) == (0, 0)


async def test_statements_that_take_too_long_are_ended_and_tried_again(
    spool: FileSpool, dsn: str, draining: Callable[[str], Drain], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_module, "STATEMENT_SECONDS", 1)
    make_slow(dsn, 30)
    drain = draining(dsn)
    starts = await write(spool, 10)
    await until(lambda: "57014" in drain.last_error, 30)  # query_canceled
    assert statuses(dsn) == {}
    with psycopg.connect(dsn) as connection:
        connection.execute("DROP TRIGGER slow ON inference")
    await until(lambda: all_ok(dsn, starts), 30)
    assert (spool.state().records, spool.dead_letters()) == (0, 0)


def make_slow(dsn: str, seconds: float) -> None:
    """Each statement that stores inferences sleeps first."""
    with psycopg.connect(dsn) as connection:
        connection.execute(
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN PERFORM pg_sleep({seconds}); RETURN NULL; END $$"
        )
        connection.execute(
            "CREATE TRIGGER slow BEFORE INSERT ON inference FOR EACH STATEMENT EXECUTE FUNCTION slow()"
        )


async def test_a_postgres_that_is_restarted_again_and_again_gets_everything_once(
    spool: FileSpool, killable: KillablePostgres, draining: Callable[[str], Drain]
) -> None:
    drain = draining(killable.dsn)
    starts: list[InferenceStarted] = []
    for _ in range(2):
        starts += await write(spool, 10)
        await asyncio.to_thread(killable.stop)
        starts += await write(spool, 20)
        await until(lambda: bool(drain.last_error), 30)
        await asyncio.to_thread(killable.start)
    await until(lambda: all_ok(killable.dsn, starts), 60)
    assert (spool.state().records, spool.dead_letters()) == (0, 0)


@pytest.mark.parametrize(
    "seconds", [0.5, pytest.param(600.0, marks=[pytest.mark.soak, pytest.mark.timeout(1500)])]
)
async def test_while_postgres_is_away_at_full_load_the_spool_fills_refuses_and_empties(
    tmp_path: Path, killable: KillablePostgres, seconds: float
) -> None:
    """The writer's process takes all the load it can; what it was told is what is stored, and no more."""
    # Of the small one 2 MiB are kept for the ends of eight open inferences.
    most = 2_400_000 if seconds < 60 else 64 << 20
    told = tmp_path / "told"
    with told.open("wb") as file:
        writer = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.integration.log_writer",
                str(tmp_path / "spool"),
                killable.dsn,
                str(most),
            ],
            cwd=ROOT,
            env=untraced(),
            stdout=file,
        )
    try:
        await until(lambda: told.stat().st_size > 10_000, 60)
        await asyncio.to_thread(killable.kill)
        await asyncio.sleep(seconds)
        if seconds < 60:  # full, whatever the machine's speed
            await until(lambda: b"refused" in told.read_bytes(), 120)
        memory = psutil.Process(writer.pid).memory_info().rss
        used = sum(path.stat().st_size for path in (tmp_path / "spool").glob("*.log"))
        await asyncio.to_thread(killable.start)
        await asyncio.sleep(0.5)
    finally:
        writer.kill()
        writer.wait()
    assert used <= most
    assert memory < 300 << 20
    whole, _, _ = told.read_text().rpartition("\n")  # it was killed, perhaps in mid-line
    lines = [line.split() for line in whole.splitlines()]
    accepted = {line[0] for line in lines if len(line) == 1}
    refused = {line[1] for line in lines if line[0] == "refused"}
    ended = {line[1] for line in lines if line[0] == "end"}
    spool = FileSpool(tmp_path / "spool", "server-1", 1 << 30)
    await spool.open()
    store = PostgresStore(killable.dsn)
    await store.open()
    assert await Drain(spool, store).flush(120)
    await store.close()
    assert spool.dead_letters() == 0
    await spool.close()
    found = statuses(killable.dsn)
    assert refused
    assert not refused & set(found)
    assert accepted - {line[0] for line in lines[-1:]} <= set(found)
    assert len(set(found) - accepted) <= 8  # written, and killed before it was told
    assert {found[one] for one in ended if one in found} == {"ok"}
    assert set(found.values()) <= {"ok", "aborted"}


async def test_a_clock_that_is_set_back_loses_and_mixes_up_nothing(
    tmp_path: Path, store: PostgresStore, dsn: str
) -> None:
    now = datetime.now(UTC)
    chance = random.Random(3)

    async def opened(at: datetime) -> FileSpool:
        made = FileSpool(tmp_path / "spool", "server-1", 1 << 28, clock=at.timestamp)
        await made.open()
        return made

    def begun(at: datetime) -> InferenceStarted:
        identity = type(make.new_id())(int=first_id(at).int | (7 << 76) | (2 << 62) | chance.getrandbits(60))
        return make.started(id=identity, started_at=at)

    spool = await opened(now)
    done, running = begun(now), begun(now)
    for record in (done, running, make.ended(done.id, ended_at=now - timedelta(days=40))):
        await spool.append(record)
    assert spool.state().oldest_seconds >= 0
    await spool.close()

    earlier = now - timedelta(days=40)  # a month without a partition
    spool = await opened(earlier)
    assert spool.state().oldest_seconds == 0
    late = begun(earlier)
    for record in (late, make.ended(late.id, ended_at=earlier)):
        await spool.append(record)
    assert await Drain(spool, store, dead_letters=store).flush(30)
    assert (spool.state().records, spool.dead_letters()) == (0, 0)
    assert statuses(dsn) == {str(done.id): "ok", str(running.id): "aborted", str(late.id): "ok"}
    assert query(
        dsn, "SELECT count(*) FROM inference WHERE status = 'aborted' AND ended_at < started_at"
    ) == [(0,)]
    assert query(dsn, "SELECT count(*) FROM learning_log") == [(3,)]
    await store.store([ServerStarted("server-1", earlier)])  # the same start once more aborts nothing
    assert statuses(dsn)[str(done.id)] == "ok"
    await spool.close()
