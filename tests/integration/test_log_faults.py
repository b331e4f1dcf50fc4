"""Under every fault: what was accepted is stored, or in the spool, or set aside, and nowhere twice."""

# ruff: noqa: ASYNC220, ASYNC221 - one thing after the other is what these tests are about
from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from agentloop.client import AsyncClient
from agentloop.errors import AgentLoopError as ClientError
from agentloop.types import Completed, Sampling, Started
from grpc_server.adapters import spool as spool_module
from grpc_server.adapters import spool_segments
from grpc_server.adapters.local_postgres import LocalPostgres
from grpc_server.adapters.postgres import PostgresStore
from grpc_server.adapters.spool import FileSpool
from grpc_server.domain.errors import SpoolFull
from grpc_server.domain.types import LogRecord, ServerStarted, Usage
from grpc_server.drain import Drain
from tests import records as make
from tests.coverage_files import untraced
from tests.integration.conftest_log import dsn, postgres, store
from tests.live_server import ROOT, LiveServer
from tests.small_disk import small_disk_at

__all__ = ["dsn", "postgres", "store"]


class KillablePostgres:
    """A Postgres that stays dead when it is killed: nobody watches it."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.dsn = ""
        self._keeper: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it; on a machine that is so busy that its first answer comes too late, once more."""
        for _ in range(5):
            self._start()
            if self.dsn:
                return
        raise AssertionError("Postgres did not start")

    def _start(self) -> None:
        program = "import sys; from pathlib import Path; "
        program += "from grpc_server.adapters.local_postgres import keep; keep(Path(sys.argv[1]))"
        self._keeper = subprocess.Popen(
            [sys.executable, "-c", program, str(self.data_dir)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=untraced(),
        )
        assert self._keeper.stdout is not None
        self.dsn = self._keeper.stdout.readline().strip()
        if not self.dsn:
            self._keeper.wait()

    def kill(self) -> None:
        """The keeper, the server and all its processes, at once."""
        assert self._keeper is not None
        self._keeper.kill()
        self._keeper.wait()
        pid = LocalPostgres(self.data_dir).pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        assert self._keeper is not None
        self._keeper.terminate()
        self._keeper.wait(60)


@pytest.fixture
def killable(memory: Path, cluster: Callable[[Path], Path]) -> Iterator[KillablePostgres]:
    made = KillablePostgres(cluster(memory / f"killable {uuid4().hex}"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def chance() -> random.Random:
    """When what is left to chance happens; a failing test shows the seed."""
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    return random.Random(seed)


def query(dsn: str, sql: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn, connect_timeout=10) as connection:
        return connection.execute(sql).fetchall()


def statuses(dsn: str) -> dict[str, str]:
    """Every stored inference; the primary key says that each is stored once."""
    return {str(row[0]): row[1] for row in query(dsn, "SELECT id, status FROM inference")}


def stored_feedback(dsn: str) -> set[str]:
    """The id of each, which is its primary key."""
    return {str(row[0]) for row in query(dsn, "SELECT id FROM feedback")}


async def until(what: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"not within {seconds} s"
        await asyncio.sleep(0.1)


@pytest.fixture
async def spool(tmp_path: Path) -> AsyncIterator[FileSpool]:
    made = FileSpool(tmp_path / "spool", "server-1", 1 << 28)
    await made.open()
    yield made
    await made.close()


async def killed(spool: FileSpool) -> None:
    """What SIGKILL leaves of it: the files as they are, and no lock."""
    await asyncio.get_running_loop().run_in_executor(spool._writer, spool._files.close)


async def reopened(spool: FileSpool) -> FileSpool:
    await killed(spool)
    again = FileSpool(spool.directory, spool.server_id, spool.max_bytes)
    await again.open()
    return again


# The whole service


class Traffic:
    """Callers that note what they saw: each accepted inference, and whether its answer was complete.

    `said` is the feedback that they sent, `heard` what the server confirmed of it.
    """

    def __init__(self, server: LiveServer, token: str, chance: random.Random) -> None:
        self.server, self.token, self.chance = server, token, chance
        self.accepted: set[str] = set()
        self.completed: set[str] = set()
        self.said: set[str] = set()
        self.heard: set[str] = set()
        self.errors: list[str] = []
        self._on = True
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, callers: int) -> None:
        self._tasks = [asyncio.create_task(self._call(number)) for number in range(callers)]

    async def stop(self) -> None:
        self._on = False
        await asyncio.gather(*self._tasks)

    async def _call(self, number: int) -> None:
        async with AsyncClient(self.server.grpc_address, self.token) as client:
            while self._on:
                try:
                    await self._one(client)
                except ClientError as error:
                    self.errors.append(f"{type(error).__name__}: {error}")
                    await asyncio.sleep(0.1)

    async def _one(self, client: AsyncClient) -> None:
        inference_id = ""
        events = client.chat("Count to ten.", sampling=Sampling(max_tokens=8, temperature=0), timeout_s=60)
        async with contextlib.aclosing(events) as stream:
            async for event in stream:
                if isinstance(event, Started):
                    inference_id = event.inference_id
                    self.accepted.add(inference_id)
                    if self.chance.random() < 0.1:
                        return  # a caller that goes away
                elif isinstance(event, Completed):
                    self.completed.add(inference_id)
        feedback_id = str(uuid4())
        self.said.add(feedback_id)
        await client.submit_feedback(inference_id, score=0.5, feedback_id=feedback_id)
        self.heard.add(feedback_id)


async def test_postgres_killed_under_traffic_then_the_server_which_starts_without_it_lose_nothing(
    places: Callable[[str], Path], base_gguf: Path, killable: KillablePostgres, chance: random.Random
) -> None:
    callers = 4
    with LiveServer(places("state"), base_gguf=base_gguf, database_url=killable.dsn) as server:
        token = server.token("infer", "feedback")
        traffic = Traffic(server, token, chance)
        traffic.start(callers)
        await until(lambda: len(traffic.completed) >= 6, 60)

        killable.kill()
        before = len(traffic.completed)
        await until(lambda: len(traffic.completed) >= before + 10, 90)  # it goes on without a database
        errors = list(traffic.errors)

        server.kill()
        await traffic.stop()
        assert errors == []

        server.start()  # by the tokens and routes that it knew last
        last = Traffic(server, token, chance)
        last.start(1)
        await until(lambda: len(last.heard) >= 2, 60)
        await last.stop()
        assert last.errors == []

        killable.start()
        accepted = traffic.accepted | last.accepted
        await until(lambda: _all_ended(statuses(killable.dsn), accepted), 60)
        assert server.stop() == 0

    stored = statuses(killable.dsn)
    dead = list((server.state_dir / "spool" / "dead").glob("*.json"))
    assert dead == []
    assert accepted <= set(stored)
    # Accepted, but killed before its caller heard of it: no more than were on their way.
    assert len(set(stored) - accepted) <= callers
    for inference_id in traffic.completed | last.completed:
        assert stored[inference_id] == "ok"
    heard = traffic.heard | last.heard
    assert len(heard) > 10
    assert heard <= stored_feedback(killable.dsn) <= traffic.said | last.said
    aborted = {one for one, status in stored.items() if status == "aborted"}
    assert len(aborted) <= callers
    assert not aborted & traffic.completed
    spool = FileSpool(server.state_dir / "spool", "reader", 1 << 30)
    await spool.open()
    assert spool.state().records == 1  # its own start: nothing was left
    await spool.close()


def _all_ended(stored: dict[str, str], accepted: set[str]) -> bool:
    return accepted <= set(stored) and "started" not in stored.values()


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])])
async def test_kills_at_any_moment_lose_nothing_and_store_nothing_twice(
    tmp_path: Path, killable: KillablePostgres, chance: random.Random, kills: int
) -> None:
    """Spool, drain and store in a process of their own, killed again and again; at times Postgres too."""
    spool_dir = tmp_path / "spool"
    accepted: set[str] = set()
    ended: set[str] = set()
    said: set[str] = set()
    told = {"": accepted, "end": ended, "feedback": said}
    for round_number in range(kills):
        writer = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.log_writer", str(spool_dir), killable.dsn],
            cwd=ROOT,
            env=untraced(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        lines = [writer.stdout.readline()]  # it runs
        assert lines[0]
        await asyncio.sleep(chance.random() * 0.5)
        if round_number % 3 == 1:
            killable.kill()
            await asyncio.sleep(0.3)
        writer.kill()
        lines += writer.stdout.readlines()
        writer.wait()
        for line in lines:
            if line.endswith("\n"):
                kind, _, identity = line.strip().rpartition(" ")
                told[kind].add(identity)
        if round_number % 3 == 1:
            killable.start()

    spool = FileSpool(spool_dir, "server-1", 1 << 28)
    await spool.open()
    store = PostgresStore(killable.dsn)
    await store.open()
    assert await Drain(spool, store).flush(60)
    await store.close()
    await spool.close()
    stored = statuses(killable.dsn)
    assert len(accepted) > 20
    assert accepted <= set(stored)
    assert len(set(stored) - accepted) <= kills * 8  # written, and killed before it was told
    assert spool.dead_letters() == 0
    assert {stored[one] for one in ended} == {"ok"}
    feedback = stored_feedback(killable.dsn)
    assert said
    assert said <= feedback
    assert len(feedback - said) <= kills * 8
    assert set(stored.values()) <= {"ok", "aborted"}


# One fault at a time


async def test_what_a_killed_server_had_begun_is_stored_as_aborted(
    spool: FileSpool, store: PostgresStore, dsn: str
) -> None:
    done, begun = make.started(), make.started()
    for record in (done, begun, make.ended(done.id)):
        await spool.append(record)
    again = await reopened(spool)
    after = make.started()
    await again.append(after)
    assert await Drain(again, store).flush(30)
    assert statuses(dsn) == {str(done.id): "ok", str(begun.id): "aborted", str(after.id): "started"}
    await again.append(make.ended(after.id))
    assert await Drain(again, store).flush(30)
    assert statuses(dsn)[str(after.id)] == "ok"
    await again.close()


async def test_a_torn_record_was_not_accepted_and_harms_no_other(
    spool: FileSpool, store: PostgresStore, dsn: str
) -> None:
    records = [make.started() for _ in range(5)]
    for record in records:
        await spool.append(record)
    await killed(spool)
    (segment,) = spool.directory.glob("*.log")
    os.truncate(segment, segment.stat().st_size - 7)
    again = await reopened(spool)
    assert again.torn == 1
    assert await Drain(again, store).flush(30)
    assert set(statuses(dsn)) == {str(record.id) for record in records[:4]}
    await again.close()


async def test_a_damaged_record_is_set_aside_with_its_bytes(
    spool: FileSpool, store: PostgresStore, dsn: str
) -> None:
    records = [make.started() for _ in range(5)]
    for record in records:
        await spool.append(record)
    await killed(spool)
    (segment,) = spool.directory.glob("*.log")
    data = bytearray(segment.read_bytes())
    data[data.index(str(records[2].id).encode())] ^= 1
    segment.write_bytes(data)
    again = await reopened(spool)
    assert await Drain(again, store, dead_letters=store).flush(30)
    assert set(statuses(dsn)) == {str(record.id) for record in records if record is not records[2]}
    assert again.dead_letters() == 1
    ((kind, raw),) = query(dsn, "SELECT kind, record FROM dead_letter")
    assert kind == "corrupt"
    assert str(records[2].id)[1:] in raw
    await again.close()


async def test_one_poison_record_never_takes_a_batch_along(
    spool: FileSpool, store: PostgresStore, dsn: str
) -> None:
    records = [make.started(session_id="\0 \ud800", request={"text": "\0 \ud800"}) for _ in range(30)]
    poison = [make.started(request={"number": float("nan")}), make.started(request={"number": float("inf")})]
    records[7:7] = poison[:1]
    records.append(poison[1])
    ends = [make.ended(record.id) for record in records]
    ends[20] = make.ended(records[20].id, usage=Usage(-1, 0))
    for start, end in zip(records, ends, strict=True):
        await spool.append(start)
        await spool.append(end)
    assert await Drain(spool, store, dead_letters=store).flush(30)
    stored = statuses(dsn)
    # Both poisonous starts, and their ends, whose starts are not there; and one poisonous end.
    assert set(stored) == {str(record.id) for record in records if record not in poison}
    assert [one for one, status in stored.items() if status == "started"] == [str(records[20].id)]
    assert spool.dead_letters() == 5
    assert query(dsn, "SELECT count(*) FROM dead_letter") == [(5,)]
    assert spool.state().records == 0


async def test_a_batch_whose_commit_was_not_noted_is_stored_once(
    spool: FileSpool, store: PostgresStore, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = [make.started() for _ in range(20)]
    records: list[LogRecord] = [*starts, *(make.feedback(start.id) for start in starts)]
    records += [make.ended(start.id) for start in starts]
    for record in records:
        await spool.append(record)
    with monkeypatch.context() as broken:
        broken.setattr(spool_segments.Segments, "commit", _dies)
        flushing = asyncio.create_task(Drain(spool, store).flush(60))
        await until(lambda: len(query(dsn, "SELECT FROM learning_log")) == 20, 30)
        flushing.cancel()
        await asyncio.gather(flushing, return_exceptions=True)
    before = query(dsn, "SELECT * FROM learning_log ORDER BY inference_id")
    again = await reopened(spool)
    assert await Drain(again, store).flush(30)
    assert query(dsn, "SELECT * FROM learning_log ORDER BY inference_id") == before
    assert query(dsn, "SELECT count(*) FROM feedback") == [(20,)]
    await again.close()


def _dies(*_: object) -> None:
    raise OSError("killed here")


async def test_repeats_in_any_order_change_nothing(store: PostgresStore, dsn: str) -> None:
    starts = [make.started() for _ in range(10)]
    said = [make.feedback(start.id) for start in starts]
    ends = [make.ended(start.id) for start in starts]
    records: list[LogRecord] = [ServerStarted("server-1", make.NOON), *said, *starts, *ends]
    await store.store(records)
    before = query(dsn, "SELECT * FROM learning_log ORDER BY inference_id")
    for seed in range(10):
        shuffled = [*records, *records]
        random.Random(seed).shuffle(shuffled)
        await store.store(shuffled)
    assert query(dsn, "SELECT * FROM learning_log ORDER BY inference_id") == before
    assert len(before) == 10


async def test_a_database_that_went_back_in_time_gets_every_accepted_row_again(
    tmp_path: Path, postgres: LocalPostgres, store: PostgresStore, dsn: str
) -> None:
    spool = FileSpool(tmp_path / "spool", "server-1", 1 << 28, keep_seconds=3600)
    await spool.open()
    old, new = [make.started() for _ in range(20)], [make.started() for _ in range(20)]

    async def append(records: list[LogRecord]) -> None:
        for record in records:
            await spool.append(record)

    await append([*old, *(make.ended(start.id) for start in old[:10])])
    assert await Drain(spool, store).flush(30)
    await store.close()
    name = f"restored_{uuid4().hex}"  # as it was now
    with psycopg.connect(postgres.dsn("postgres"), autocommit=True) as connection:
        source = psycopg.conninfo.conninfo_to_dict(dsn)["dbname"]
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{source}"')
    store = PostgresStore(dsn)
    await store.open()
    late = [make.ended(start.id) for start in [*old[10:], *new]]
    await append([*new, *late, *(make.feedback(start.id) for start in old)])
    assert await Drain(spool, store).flush(30)
    await store.close()

    restored = PostgresStore(postgres.dsn(name))
    await restored.open()
    await append([make.feedback(start.id) for start in new])
    assert await Drain(spool, restored, dead_letters=restored).flush(30)
    assert statuses(restored.dsn) == {str(start.id): "ok" for start in [*old, *new]}
    assert len(stored_feedback(restored.dsn)) == 40
    assert spool.dead_letters() == 0
    await restored.close()
    await spool.close()
    with psycopg.connect(postgres.dsn("postgres"), autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk_at(tmp_path / "disk", 24) as place:
        yield place


def fill(place: Path) -> Path:
    path = place / "someone else's file"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
async def test_a_full_disk_refuses_new_work_keeps_every_end_and_recovers(
    small_disk: Path, store: PostgresStore, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "RETRY_SECONDS", 0.05)
    spool = FileSpool(small_disk / "spool", "server-1", 1 << 28, segment_bytes=1 << 20, end_bytes=64 << 10)
    await spool.open()
    accepted = [make.started() for _ in range(40)]
    for record in accepted:
        await spool.append(record)
    others = fill(small_disk)
    with pytest.raises(SpoolFull, match="ENOSPC"):
        while True:
            record = make.started(request={"text": "x" * 10_000})
            await spool.append(record)
            accepted.append(record)
    assert spool.state().full
    with pytest.raises(SpoolFull):
        await spool.append(make.feedback(accepted[0].id, comment="x" * 10_000))
    for record in accepted:
        await spool.append(make.ended(record.id, error="x" * 30_000))
    assert spool._parked == []  # all of them on disk, in the space kept back
    again = await reopened(spool)  # even if it dies now
    assert await Drain(again, store).flush(60)
    assert statuses(dsn) == {str(record.id): "ok" for record in accepted}
    assert again.state().records == 0

    others.unlink()
    await until(lambda: not again.state().full, 10)
    record = make.started()
    await again.append(record)
    await again.append(make.ended(record.id))
    assert await Drain(again, store).flush(30)
    assert statuses(dsn)[str(record.id)] == "ok"
    await again.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
async def test_a_disk_that_turns_read_only_stops_no_server_and_loses_no_end(
    small_disk: Path, store: PostgresStore, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "RETRY_SECONDS", 0.05)
    spool = FileSpool(small_disk / "spool", "server-1", 1 << 24, segment_bytes=1 << 20)
    await spool.open()
    record = make.started()
    await spool.append(record)
    _make_unwritable(spool)
    with pytest.raises(SpoolFull):
        await spool.append(make.started())
    await spool.append(make.ended(record.id))
    assert spool.state().full
    assert await Drain(spool, store).flush(30)
    assert statuses(dsn) == {str(record.id): "started"}
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    await until(lambda: not spool.state().full, 10)
    assert await Drain(spool, store).flush(30)
    assert statuses(dsn) == {str(record.id): "ok"}
    await spool.close()


def _make_unwritable(spool: FileSpool) -> None:
    """A read-only remount, as the kernel does it after an error; it needs every writer's file closed."""
    active = spool._files.active
    assert active is not None
    os.close(active.descriptor)
    lock = spool._files.lock_file
    assert lock is not None
    os.close(lock)
    spool._files.lock_file = None
    active.descriptor = os.open(active.path, os.O_RDONLY)
    subprocess.run(["mount", "-o", "remount,ro", spool.directory.parent], check=True)
