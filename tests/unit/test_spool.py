# ruff: noqa: ASYNC110, ASYNC240 - small files, and states that no event tells of
"""The spool: what was appended comes back in order, whatever happened in between."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import os
import stat
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from grpc_server.adapters import spool as spool_module
from grpc_server.adapters import spool_disk, spool_segments
from grpc_server.adapters.spool import FileSpool
from grpc_server.adapters.spool_frame import Corrupt, decode_frame, encode_frame
from grpc_server.domain.errors import Precondition, ShuttingDown, SpoolFull
from grpc_server.domain.types import (
    InferenceEnded,
    InferenceStarted,
    LogRecord,
    ServerStarted,
    Status,
)
from tests import records as make

MB = 1 << 20


def new_spool(directory: Path, **options: Any) -> FileSpool:
    settings: dict[str, Any] = {"max_bytes": 64 * MB, "segment_bytes": 64 << 10, "end_bytes": 4096} | options
    return FileSpool(directory, "server-1", settings.pop("max_bytes"), **settings)


@pytest.fixture
async def spool(tmp_path: Path) -> AsyncIterator[FileSpool]:
    made = new_spool(tmp_path / "spool")
    await made.open()
    yield made
    await made.close()


async def contents(spool: FileSpool) -> list[LogRecord | Corrupt]:
    """All that is in it, without the server starts; consumes nothing."""
    found = [what for _, what in await spool.read_batch(1_000_000)]
    return [what for what in found if not isinstance(what, ServerStarted)]


async def consume(spool: FileSpool) -> list[LogRecord | Corrupt]:
    found: list[LogRecord | Corrupt] = []
    while batch := await spool.read_batch(7):
        found += [what for _, what in batch]
        await spool.commit(batch[-1][0])
    return [what for what in found if not isinstance(what, ServerStarted)]


def failing(code: int) -> Callable[..., Any]:
    def fail(*args: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


async def test_records_come_back_in_the_order_they_were_appended(spool: FileSpool) -> None:
    written = [make.started() for _ in range(20)]
    for record in written:
        await spool.append(record)
    assert await consume(spool) == written
    assert await spool.read_batch(10) == []


async def test_reading_consumes_nothing_until_it_is_committed(spool: FileSpool) -> None:
    await spool.append(make.started())
    first = await spool.read_batch(10)
    assert await spool.read_batch(10) == first
    await spool.commit(first[-1][0])
    assert await spool.read_batch(10) == []


async def test_opening_a_spool_says_that_the_server_started(tmp_path: Path) -> None:
    spool = new_spool(tmp_path)
    await spool.open()
    ((_, record),) = await spool.read_batch(10)
    assert isinstance(record, ServerStarted)
    assert record.server_id == "server-1"
    await spool.close()


async def test_many_appends_share_one_sync(spool: FileSpool, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = 0
    real = os.fdatasync

    def count(descriptor: int) -> None:
        nonlocal syncs
        syncs += 1
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", count)
    await asyncio.gather(*(spool.append(make.started()) for _ in range(200)))
    assert syncs <= 4
    assert len(await contents(spool)) == 200


async def test_what_was_not_committed_is_there_after_a_restart(tmp_path: Path) -> None:
    first = new_spool(tmp_path)
    await first.open()
    written = [make.started() for _ in range(50)]
    for record in written:
        await first.append(record)
    batch = await first.read_batch(11)  # the server start, and ten
    await first.commit(batch[-1][0])
    await first.close()
    second = new_spool(tmp_path)
    await second.open()
    assert second.state().records == 41
    assert await consume(second) == written[10:]
    await second.close()


async def test_segments_are_deleted_once_they_are_stored(tmp_path: Path) -> None:
    spool = new_spool(tmp_path, segment_bytes=4096)
    await spool.open()
    for _ in range(60):
        await spool.append(make.started())
    assert len(list(tmp_path.glob("*.log"))) > 5
    await consume(spool)
    assert len(list(tmp_path.glob("*.log"))) == 1
    assert spool.state().bytes == 0
    await spool.close()


async def test_a_record_larger_than_a_segment_is_taken(tmp_path: Path) -> None:
    spool = new_spool(tmp_path, segment_bytes=4096)
    await spool.open()
    big = make.started(request={"messages": [{"content": "x" * 100_000}]})
    await spool.append(make.started())
    await spool.append(big)
    await spool.append(make.started())
    assert (await contents(spool))[1] == big
    await spool.close()


async def test_a_batch_holds_a_bounded_number_of_bytes(
    spool: FileSpool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_segments, "BATCH_BYTES", 5000)
    for _ in range(10):
        await spool.append(make.started(request={"text": "x" * 2000}))
    assert len(await spool.read_batch(100)) == 3  # the server start and two
    assert len(await consume(spool)) == 10


async def test_the_state_counts_records_and_bytes_and_age(tmp_path: Path) -> None:
    now = 1000.0
    spool = new_spool(tmp_path, clock=lambda: now)
    await spool.open()
    assert spool.state().records == 1
    await consume(spool)
    assert (spool.state().records, spool.state().bytes, spool.state().oldest_seconds) == (0, 0, 0.0)
    await spool.append(make.started())
    now = 1005.0
    await spool.append(make.started())
    now = 1010.0
    assert spool.state().records == 2
    assert spool.state().oldest_seconds == 10.0
    batch = await spool.read_batch(1)
    await spool.commit(batch[-1][0])
    assert spool.state().oldest_seconds == 5.0
    assert not spool.state().full
    await spool.close()


async def test_a_second_server_on_one_spool_is_told_so(spool: FileSpool) -> None:
    other = new_spool(spool.directory)
    with pytest.raises(Precondition, match=f"in use by another server .process {os.getpid()}."):
        await other.open()


async def test_nobody_else_may_read_what_callers_wrote(spool: FileSpool) -> None:
    await spool.append(make.started())
    assert stat.S_IMODE(spool.directory.stat().st_mode) == 0o700
    for path in spool.directory.glob("*.log"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_a_closed_spool_refuses_records(tmp_path: Path) -> None:
    spool = new_spool(tmp_path)
    with pytest.raises(ShuttingDown):
        await spool.append(make.started())
    await spool.open()
    await spool.close()
    await spool.close()
    with pytest.raises(ShuttingDown):
        await spool.append(make.started())


async def test_closing_waits_for_what_is_on_its_way(tmp_path: Path) -> None:
    spool = new_spool(tmp_path)
    await spool.open()
    appends = [asyncio.create_task(spool.append(make.started())) for _ in range(30)]
    await asyncio.sleep(0)
    await spool.close()
    await asyncio.gather(*appends)
    again = new_spool(tmp_path)
    await again.open()
    assert len(await contents(again)) == 30
    await again.close()


async def test_a_record_that_json_cannot_hold_harms_no_other(spool: FileSpool) -> None:
    with pytest.raises(ValueError, match="JSON"):
        await spool.append(make.started(request={"messages": object()}))
    await spool.append(make.started())
    assert len(await contents(spool)) == 1


async def test_what_is_stored_does_not_stay_in_the_spool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = new_spool(tmp_path)
    await spool.open()
    await spool.append(make.started(session_id="first"))
    await consume(spool)
    await spool.append(make.started(session_id="second"))  # in the same segment, which is young
    assert len(list(tmp_path.glob("*.log"))) == 1
    monkeypatch.setattr(spool_segments, "SEGMENT_SECONDS", 0.0)
    await spool.append(make.started(session_id="third"))  # the second waits still
    await consume(spool)
    await spool.append(make.started(session_id="fourth"))
    await consume(spool)
    (segment,) = tmp_path.glob("*.log")
    assert b"fourth" in segment.read_bytes()
    assert b"third" not in segment.read_bytes()
    await spool.close()
    assert list(tmp_path.glob("*.log")) == []


# Bounds


async def test_a_spool_of_too_many_records_refuses_new_work_and_takes_every_end(tmp_path: Path) -> None:
    spool = new_spool(tmp_path, max_records=10)
    await spool.open()  # one record: the server's start
    accepted = []
    with pytest.raises(SpoolFull, match="10 records"):
        for _ in range(10):
            start = make.started()
            await spool.append(start)
            accepted.append(start)
    assert len(accepted) == 4  # and their four ends, and the server's start
    assert spool.state().full
    await spool.append(
        make.feedback(accepted[0].id)
    )  # one place is left, which no start and end would fit in
    with pytest.raises(SpoolFull):
        await spool.append(make.feedback(accepted[0].id))
    for start in accepted:
        await spool.append(make.ended(start.id))
    assert spool.state().records == 10
    await consume(spool)
    assert not spool.state().full
    await spool.append(make.started())
    await spool.close()


async def test_what_waits_for_a_slow_disk_is_bounded(
    spool: FileSpool, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = make.started()
    await spool.append(start)
    released = threading.Event()
    real = os.fdatasync

    def slow(descriptor: int) -> None:
        released.wait(30)
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", slow)
    monkeypatch.setattr(spool_module, "WAITING_BYTES", 5000)
    appends = [asyncio.create_task(spool.append(make.started())) for _ in range(100)]
    end = asyncio.create_task(spool.append(make.ended(start.id)))  # room or not
    refused = 0
    while refused < 80:
        await asyncio.sleep(0.01)
        refused = sum(one.done() for one in appends)
    abandoned = next(one for one in appends if not one.done())
    abandoned.cancel()
    released.set()
    outcomes = await asyncio.gather(*appends, return_exceptions=True)
    await end
    texts = [str(one) for one in outcomes if isinstance(one, SpoolFull)]
    assert texts
    assert all("the log's disk is too slow" in text for text in texts)
    await spool.append(make.started())
    assert spool._waiting_bytes == 0


# Crashes and damage


async def written_spool(directory: Path, count: int = 3) -> tuple[list[LogRecord], Path]:
    spool = new_spool(directory)
    await spool.open()
    await consume(spool)
    written: list[LogRecord] = [make.started() for _ in range(count)]
    for record in written:
        await spool.append(record)
    await spool.close()
    (path,) = directory.glob("*.log")
    return written, path


async def reopened(directory: Path) -> FileSpool:
    spool = new_spool(directory)
    await spool.open()
    return spool


async def test_a_torn_last_record_is_dropped_and_counted(tmp_path: Path) -> None:
    written, path = await written_spool(tmp_path)
    os.truncate(path, path.stat().st_size - 10)
    spool = await reopened(tmp_path)
    assert spool.torn == 1
    assert await contents(spool) == written[:2]
    await spool.append(written[2])
    assert await consume(spool) == written
    await spool.close()


async def test_zeros_after_a_power_cut_are_a_torn_record(tmp_path: Path) -> None:
    written, path = await written_spool(tmp_path)
    with path.open("ab") as file:
        file.write(b"\0" * 3000)
    spool = await reopened(tmp_path)
    assert spool.torn == 1
    assert await consume(spool) == written
    await spool.close()


async def test_a_damaged_record_comes_as_corrupt_and_harms_no_neighbour(tmp_path: Path) -> None:
    written, path = await written_spool(tmp_path)
    data = bytearray(path.read_bytes())
    lines = bytes(data).splitlines(keepends=True)
    at = data.index(lines[-2]) + 100
    data[at] ^= 1
    path.write_bytes(data)
    spool = await reopened(tmp_path)
    found = await contents(spool)
    assert [found[0], found[2]] == [written[0], written[2]]
    assert isinstance(found[1], Corrupt)
    assert len(found[1].raw) == len(lines[-2])
    await spool.close()


@pytest.mark.parametrize("byte", [b"\n", b"x"])
async def test_damage_to_line_ends_costs_one_record_at_most(tmp_path: Path, byte: bytes) -> None:
    written, path = await written_spool(tmp_path)
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    first = len(data) - sum(len(line) for line in lines[-3:])
    at = first + (60 if byte == b"\n" else len(lines[-3]) - 1)  # a line end too many, or one too few
    path.write_bytes(data[:at] + byte + data[at + 1 :])
    spool = await reopened(tmp_path)
    found = await contents(spool)
    assert found[-2:] == written[1:]
    if byte == b"x":
        assert found == written  # its length and checksum still hold
    else:
        assert len(found) == 3
        assert isinstance(found[0], Corrupt)
    await spool.close()


async def test_a_damaged_position_stores_everything_once_more(tmp_path: Path) -> None:
    written, _ = await written_spool(tmp_path)
    (tmp_path / "position").write_text("99999 00000000\n")
    spool = await reopened(tmp_path)
    assert await consume(spool) == written
    await spool.close()


async def test_a_missing_segment_is_stepped_over(tmp_path: Path) -> None:
    spool = new_spool(tmp_path, segment_bytes=4096)
    await spool.open()
    for _ in range(60):
        await spool.append(make.started())
    await spool.close()
    second = sorted(tmp_path.glob("*.log"))[1]
    lost = len(second.read_bytes().splitlines())
    second.unlink()
    again = await reopened(tmp_path)
    assert len(await consume(again)) == 60 - lost
    assert again.state().bytes == 0
    await again.close()


async def test_a_record_of_another_version_is_corrupt_not_lost() -> None:
    frame = encode_frame(make.started(), 1)
    assert isinstance(decode_frame(frame), InferenceStarted)
    unknown = frame.replace(b"inference_started", b"inference_updated")
    payload = unknown[18:-1]
    unknown = b"%08x %08x %b\n" % (len(payload), zlib.crc32(payload), payload)
    assert decode_frame(unknown) == Corrupt(unknown)


async def test_dead_letters_keep_records_and_raw_bytes(spool: FileSpool) -> None:
    record = make.started(session_id="nul \0")
    await spool.dead_letter(10, record, "poison")
    await spool.dead_letter(10, record, "poison")
    await spool.dead_letter(20, Corrupt(b"\xff\x00junk"), "no record")
    assert spool.dead_letters() == 2
    letters = [json.loads(path.read_text()) for path in sorted((spool.directory / "dead").glob("*.json"))]
    assert letters[0]["record"]["session_id"] == "nul \0"
    assert letters[0]["reason"] == "poison"
    assert letters[1]["raw_latin1"].encode("latin-1") == b"\xff\x00junk"


async def test_a_position_outside_the_spool_cannot_be_committed(spool: FileSpool) -> None:
    with pytest.raises(ValueError, match="position"):
        await spool.commit(10**9)


async def test_waiting_ends_when_a_record_arrives(spool: FileSpool) -> None:
    await consume(spool)
    waiting = asyncio.create_task(spool.wait(60))
    await asyncio.sleep(0)
    await spool.append(make.started())
    await asyncio.wait_for(waiting, 5)
    await spool.wait(60)  # there is something already


async def test_waiting_ends_when_the_time_is_over(spool: FileSpool) -> None:
    await consume(spool)
    await spool.wait(0.001)


# No room


async def test_a_full_spool_refuses_new_work_and_takes_ends(tmp_path: Path) -> None:
    spool = new_spool(tmp_path, max_bytes=40_000)
    await spool.open()
    begun: list[InferenceStarted] = []
    with pytest.raises(SpoolFull, match="no new work"):
        while True:
            record = make.started()
            await spool.append(record)
            begun.append(record)
    assert begun
    assert spool.state().full
    for record in begun:
        await spool.append(make.ended(record.id, error="x" * 3000))
    assert spool.state().bytes <= 40_000  # the room kept back was enough
    assert len(await consume(spool)) == 2 * len(begun)
    assert not spool.state().full
    await spool.append(make.started())
    await spool.close()


async def test_feedback_is_refused_when_there_is_no_room(tmp_path: Path) -> None:
    spool = new_spool(tmp_path, max_bytes=6000)
    await spool.open()
    with pytest.raises(SpoolFull):
        await spool.append(make.feedback(make.new_id(), comment="x" * 10_000))
    await spool.close()


async def test_one_refused_start_does_not_refuse_its_batch(tmp_path: Path) -> None:
    spool = new_spool(tmp_path, max_bytes=20_000)
    await spool.open()
    large = make.started(request={"text": "x" * 30_000})
    small = make.started()
    outcomes = await asyncio.gather(spool.append(large), spool.append(small), return_exceptions=True)
    assert isinstance(outcomes[0], SpoolFull)
    assert outcomes[1] is None
    assert await contents(spool) == [small]
    await spool.close()


async def test_a_full_disk_refuses_new_work_and_takes_ends_from_the_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "RETRY_SECONDS", 0.01)
    spool = new_spool(tmp_path)
    await spool.open()
    begun = [make.started() for _ in range(10)]
    for record in begun:
        await spool.append(record)
    with monkeypatch.context() as full:
        full.setattr(spool_disk, "allocate", failing(errno.ENOSPC))
        with pytest.raises(SpoolFull, match="ENOSPC"):
            while True:  # into the segment that is allocated already, until it is full
                await spool.append(make.feedback(begun[0].id, comment="x" * 1000))
        assert spool.state().full
        for record in begun:
            await spool.append(make.ended(record.id, error="x" * 2000))
        assert not (tmp_path / "reserve").exists()
        kept = await contents(spool)
        assert {what.id for what in kept if isinstance(what, InferenceEnded)} == {one.id for one in begun}
    while spool.state().full:  # it recovers without being asked
        await asyncio.sleep(0.01)
    await spool.append(make.started())
    assert (tmp_path / "reserve").exists()
    await spool.close()


async def test_ends_wait_in_memory_while_the_disk_refuses_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "RETRY_SECONDS", 0.01)
    spool = new_spool(tmp_path)
    await spool.open()
    record = make.started()
    await spool.append(record)
    with monkeypatch.context() as broken:
        broken.setattr(spool_disk, "write_all", failing(errno.EROFS))
        with pytest.raises(SpoolFull, match="EROFS"):
            await spool.append(make.started())
        await spool.append(make.ended(record.id))
        assert spool.state().full
        assert len(await contents(spool)) == 1
    while spool.state().full:
        await asyncio.sleep(0.01)
    assert [type(what) for what in await contents(spool)] == [InferenceStarted, InferenceEnded]
    await spool.close()


async def test_a_failed_sync_loses_no_end_and_doubles_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "RETRY_SECONDS", 0.01)
    spool = new_spool(tmp_path)
    await spool.open()
    record = make.started()
    await spool.append(record)
    real, failures = os.fdatasync, [OSError(errno.EIO, "I/O error")]

    def sync(descriptor: int) -> None:
        if failures:
            raise failures.pop()
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", sync)
    await spool.append(make.ended(record.id))
    assert [type(what) for what in await contents(spool)] == [InferenceStarted, InferenceEnded]
    await spool.close()


async def test_closing_with_ends_that_the_disk_refuses_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = new_spool(tmp_path)
    await spool.open()
    record = make.started()
    await spool.append(record)
    monkeypatch.setattr(spool_disk, "write_all", failing(errno.EROFS))
    await spool.append(make.ended(record.id))
    await asyncio.wait_for(spool.close(), 5)


async def test_a_spool_opens_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, _ = await written_spool(tmp_path)
    monkeypatch.setattr(spool_disk, "allocate", failing(errno.ENOSPC))
    spool = await reopened(tmp_path)
    assert spool.state().full
    with pytest.raises(SpoolFull):
        await spool.append(make.started())
    assert await consume(spool) == written
    await spool.close()


async def test_a_position_that_cannot_be_written_stops_no_storing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = new_spool(tmp_path, segment_bytes=4096)
    await spool.open()
    for _ in range(60):
        await spool.append(make.started())
    monkeypatch.setattr(spool_disk, "replace", failing(errno.ENOSPC))
    await consume(spool)
    assert len(list(tmp_path.glob("*.log"))) == 1
    await spool.close()
    again = new_spool(tmp_path, segment_bytes=4096)
    await again.open()  # at the first segment that is left, at worst
    assert len(await contents(again)) < 20
    await again.close()


async def test_where_space_cannot_be_promised_the_spool_works_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoFallocate:
        @staticmethod
        def fallocate(*_: object) -> int:
            ctypes.set_errno(errno.EOPNOTSUPP)
            return -1

    monkeypatch.setattr(spool_disk, "_libc", NoFallocate)
    spool = new_spool(tmp_path)
    await spool.open()
    await spool.append(make.started())
    assert len(await consume(spool)) == 1
    await spool.close()


# Callers that go away


class SlowDisk:
    """A sync that waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.busy, self._go_on, self._real = threading.Event(), threading.Event(), os.fdatasync
        monkeypatch.setattr(os, "fdatasync", self._sync)

    def _sync(self, descriptor: int) -> None:
        self.busy.set()
        assert self._go_on.wait(10)
        self._real(descriptor)

    async def until_busy(self) -> None:
        assert await asyncio.to_thread(self.busy.wait, 10)

    def let_go(self) -> None:
        self._go_on.set()


async def test_a_start_whose_caller_went_away_before_the_write_is_not_written(
    spool: FileSpool, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    first = make.started()
    before = asyncio.create_task(spool.append(first))
    await disk.until_busy()
    append = asyncio.create_task(spool.append(make.started()))
    await asyncio.sleep(0)
    append.cancel()
    with pytest.raises(asyncio.CancelledError):
        await append
    disk.let_go()
    await before
    assert await contents(spool) == [first]


async def test_a_start_whose_caller_went_away_during_the_write_is_ended_as_cancelled(
    spool: FileSpool, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    record = make.started()
    append = asyncio.create_task(spool.append(record))
    await disk.until_busy()
    append.cancel()
    with pytest.raises(asyncio.CancelledError):
        await append
    disk.let_go()
    await spool.close()
    again = await reopened(spool.directory)
    start, end = await contents(again)
    assert start == record
    assert isinstance(end, InferenceEnded)
    assert (end.id, end.status) == (record.id, Status.CANCELLED)
    await again.close()


async def test_an_end_is_written_though_its_caller_went_away(spool: FileSpool) -> None:
    record = make.started()
    await spool.append(record)
    append = asyncio.create_task(spool.append(make.ended(record.id)))
    await asyncio.sleep(0)
    append.cancel()
    await asyncio.gather(append, return_exceptions=True)
    await spool.append(make.started())
    assert isinstance((await contents(spool))[1], InferenceEnded)


# Kept for a database that is restored


async def kept_spool(directory: Path, **options: Any) -> tuple[FileSpool, list[LogRecord]]:
    """A spool of which everything is stored, in the database `one`, and kept."""
    spool = new_spool(directory, segment_bytes=4096, keep_seconds=3600, **options)
    await spool.open()
    written: list[LogRecord] = [make.started() for _ in range(40)]
    for record in written:
        await spool.append(record)
    assert await spool.remember("one") == 0
    await consume(spool)
    return spool, written


async def test_what_is_stored_is_kept_and_comes_again_for_another_database_once(tmp_path: Path) -> None:
    spool, written = await kept_spool(tmp_path)
    assert (spool.state().records, await spool.remember("one")) == (0, 0)
    assert await spool.remember("two") == len(written) + 1  # and the start of the server
    assert spool.state().records == len(written) + 1
    assert await consume(spool) == written
    assert await spool.remember("two") == 0
    await spool.close()


async def test_what_is_kept_outlives_a_restart(tmp_path: Path) -> None:
    first, written = await kept_spool(tmp_path)
    await first.close()
    second = new_spool(tmp_path, segment_bytes=4096, keep_seconds=3600)
    await second.open()
    assert second.state().records == 1  # its own start
    assert await second.remember("two") == len(written) + 1
    assert await consume(second) == written
    await second.close()


async def test_what_is_kept_goes_when_it_is_old_though_nothing_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, _ = await kept_spool(tmp_path)
    assert len(list(tmp_path.glob("*.log"))) > 3
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3601)
    assert await spool.read_batch(10) == []
    assert len(list(tmp_path.glob("*.log"))) == 1  # the one being written
    await spool.close()


async def test_what_is_kept_is_half_of_what_may_wait_at_most(tmp_path: Path) -> None:
    spool, _ = await kept_spool(tmp_path)
    assert spool._files._keep_bytes == spool.max_bytes // 2
    spool._files._keep_bytes = 10_000
    await spool.read_batch(1)
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*.log"))[:-1]]
    assert 0 < sum(sizes) <= 10_000
    await spool.close()


async def test_what_is_kept_makes_room_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, _ = await kept_spool(tmp_path)
    real, full = spool_disk.allocate, len(list(tmp_path.glob("*.log")))

    def allocate(descriptor: int, size: int) -> None:
        if len(list(tmp_path.glob("*.log"))) >= full:
            raise OSError(errno.ENOSPC, "full")
        real(descriptor, size)

    monkeypatch.setattr(spool_disk, "allocate", allocate)
    more = [make.started() for _ in range(10)]
    for record in more:
        await spool.append(record)
    assert await contents(spool) == more
    await spool.close()


async def test_a_history_that_cannot_be_written_stops_no_storing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, written = await kept_spool(tmp_path)
    monkeypatch.setattr(spool_disk, "replace", failing(errno.ENOSPC))
    assert await spool.remember("two") == len(written) + 1
    assert await spool.remember("two") == 0
    monkeypatch.undo()
    assert await consume(spool) == written
    await spool.close()
