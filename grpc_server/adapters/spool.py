"""The durable queue in front of Postgres: an append returns when its record is on disk.

A spool is a directory with one writer at a time:

    lock                      held by the server that uses the spool (flock; names its process)
    00000000000000000000.log  segments, each named by the position of its first byte
    position                  what is stored already; segments before it are gone
    reserve                   disk space kept back for the ends of accepted inferences
    dead/                     what could not be stored, one JSON file a record

A record is one line (`spool_frame`). Positions are byte offsets since the spool began; they only grow.

Appends that arrive while a write is under way go to disk together with one fdatasync (group commit), off the
event loop. Segments are preallocated, and the reserve is too: an end record written to a full disk goes to
space that is already ours. Should the disk refuse even that (read-only, or broken), ends wait in memory,
are tried again every second, and new work is refused all the while; if the server dies meanwhile, these
inferences are stored as aborted, because their starts are on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from grpc_server.adapters import spool_disk as disk
from grpc_server.adapters.record_json import record_to_json
from grpc_server.adapters.spool_frame import Corrupt, decode_frame, encode_frame, read_line, written_ms
from grpc_server.domain.errors import ShuttingDown, SpoolFull
from grpc_server.domain.ports import SpoolState
from grpc_server.domain.types import (
    InferenceEnded,
    InferenceStarted,
    LogRecord,
    ServerStarted,
    Status,
    Timings,
    Usage,
)

SEGMENT_BYTES = 8 << 20
SEGMENT_SECONDS = 60.0
"""After this a new segment begins once all of it is stored: what callers wrote need not stay on this disk."""
END_BYTES = 256 << 10
"""Space kept back for one end record: 8,192 tokens of 10 escaped bytes each, three times over."""
BATCH_BYTES = 8 << 20
WAITING_BYTES = 64 << 20
"""What may wait in memory for a disk that is slow to take it; then new work is refused."""
RETRY_SECONDS = 1.0

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Segment:
    path: Path
    base: int
    size: int = 0
    descriptor: int = -1
    begun: float = field(default_factory=time.monotonic)

    @property
    def end(self) -> int:
        return self.base + self.size


@dataclass(slots=True)
class _Waiting:
    """A record on its way to disk."""

    frame: bytes
    record: LogRecord
    done: asyncio.Future[None]
    taken: bool = field(default=False)

    @property
    def new_work(self) -> bool:
        """Whether it may be refused."""
        return _may_be_refused(self.record)


class FileSpool:
    """The Spool port on a directory, and the reading side that the drain uses.

    Args:
        directory: made if missing (mode 0700: it holds what callers wrote).
        server_id: goes into the ServerStarted record that `open` appends.
        max_bytes: new work is refused when what is not yet stored, and the ends to come, need more.
        max_records: the same, for the number of records.
        segment_bytes: size at which a new segment begins.
        end_bytes: room kept back for the end of each open inference.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        directory: Path,
        server_id: str,
        max_bytes: int,
        *,
        max_records: int = 1_000_000,
        segment_bytes: int = SEGMENT_BYTES,
        end_bytes: int = END_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.directory = directory
        self.server_id = server_id
        self.max_bytes = max_bytes
        self.max_records = max_records
        self.torn = 0
        """Records cut short by a crash before they were accepted, and dropped when the spool was opened."""
        self._segment_bytes = segment_bytes
        self._end_bytes = end_bytes
        self._clock = clock
        self._guard = threading.Lock()  # of the fields down to _oldest_ms, shared by the two threads
        self._segments: list[_Segment] = []
        self._position = 0
        self._end = 0
        self._records = 0
        self._oldest_ms: int | None = None
        self._refusal = ""
        self._open: set[UUID] = set()
        self._waiting: list[_Waiting] = []
        self._waiting_bytes = 0
        self._parked: list[_Waiting] = []
        self._flusher: asyncio.Task[None] | None = None
        self._arrived = asyncio.Event()  # something to read
        self._wake = asyncio.Event()  # something to write
        self._closed = True
        self._lock_file: int | None = None
        self._active: _Segment | None = None  # the one being written: the last
        self._reserved = 0
        self._writer = ThreadPoolExecutor(1, "spool-writer")
        self._reader = ThreadPoolExecutor(1, "spool-reader")

    # Life

    async def open(self) -> None:
        """Take the directory, drop a torn last record, and append ServerStarted.

        Raises:
            Precondition: if another process uses the directory.
            OSError: if it cannot be read or made.
        """
        await asyncio.get_running_loop().run_in_executor(self._writer, self._open_files)
        self._closed = False
        await self.append(ServerStarted(self.server_id, datetime.fromtimestamp(self._clock(), UTC)))

    async def close(self) -> None:
        """Refuse further records, wait for those on their way, and close the files."""
        if self._closed:
            return
        self._closed = True
        self._arrived.set()
        self._wake.set()
        while self._flusher is not None and not self._flusher.done():
            await self._flusher
        await asyncio.get_running_loop().run_in_executor(self._writer, self._close_files)
        self._delete_stored()  # the last segment too, if nothing in it waits
        self._writer.shutdown()
        self._reader.shutdown()

    def _open_files(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock_file = disk.lock(self.directory / "lock")
        try:
            self._find_records()
        except BaseException:
            self._close_files()
            raise
        try:
            (self.directory / "dead").mkdir(mode=0o700, exist_ok=True)
            self._grow_reserve(self._segment_bytes)
        except OSError as error:  # a full disk is no reason not to start
            self._refusal = _refusal(error)

    def _find_records(self) -> None:
        self._position = disk.read_position(self.directory / "position")
        segments = [
            _Segment(path, int(path.stem), path.stat().st_size)
            for path in sorted(self.directory.glob("*.log"))
        ]
        if segments:
            self._drop_torn(segments[-1])
            self._position = max(self._position, segments[0].base)
        for segment in segments:
            if segment.size == 0:
                segment.path.unlink()
        self._segments = [segment for segment in segments if segment.size]
        self._end = max([self._position, *(segment.end for segment in segments)])
        self._records = sum(1 for _ in self._lines(self._position, self._end))
        self._oldest_ms = self._read_moment()
        self._delete_stored()

    def _close_files(self) -> None:
        if self._active is not None:
            self._retire(self._active)
        with contextlib.suppress(OSError):
            (self.directory / "reserve").unlink(missing_ok=True)
        self._reserved = 0
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def _drop_torn(self, segment: _Segment) -> None:
        """A last record that is not whole was never acknowledged: nobody counts on it."""
        with segment.path.open("rb") as file:
            data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < segment.size and isinstance(decode_frame(data[whole:]), Corrupt):
            self.torn += 1
            _log.warning("spool: dropped a torn record of %d bytes", segment.size - whole)
            os.truncate(segment.path, whole)
            segment.size = whole

    # Appending

    async def append(self, record: LogRecord) -> None:
        """Return when the record is on disk.

        A start whose append is cancelled is either not written, or ended as cancelled right away.

        Raises:
            SpoolFull: for a start or feedback, when there is no room for it and for the ends to come.
            ShuttingDown: after `close`.
            ValueError: for a record that JSON cannot hold.
        """
        if self._closed:
            raise ShuttingDown("the log is closed: this server is shutting down")
        frame = encode_frame(record, int(self._clock() * 1000))
        if self._waiting_bytes + len(frame) > WAITING_BYTES and _may_be_refused(record):
            raise SpoolFull(
                "the log's disk is too slow for what arrives: no new work is accepted until it is not"
            )
        waiting = self._enqueue(frame, record)
        try:
            await asyncio.shield(waiting.done)
        except asyncio.CancelledError:
            self._abandon(waiting)
            raise

    def _enqueue(self, frame: bytes, record: LogRecord) -> _Waiting:
        waiting = _Waiting(frame, record, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._waiting_bytes += len(frame)
        self._wake.set()
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush(), name="spool")
        return waiting

    def _abandon(self, waiting: _Waiting) -> None:
        """The caller of `append` has gone; nobody else will end what it started."""
        if waiting.new_work and not waiting.taken:
            self._waiting.remove(waiting)
            self._waiting_bytes -= len(waiting.frame)
            waiting.done.cancel()
        else:
            waiting.done.add_done_callback(lambda done: self._end_abandoned(waiting.record, done))

    def _end_abandoned(self, record: LogRecord, done: asyncio.Future[None]) -> None:
        refused = done.exception()
        if refused is None and isinstance(record, InferenceStarted):
            end = _cancelled(record, self._clock())
            self._enqueue(encode_frame(end, int(self._clock() * 1000)), end)

    async def _flush(self) -> None:
        """Write what waits, batch after batch; while the disk refuses, try again every second."""
        loop = asyncio.get_running_loop()
        while self._waiting or self._parked or self._refusal:
            if not self._waiting and not self._closed:
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), RETRY_SECONDS)
            last_try = self._closed and not self._waiting
            batch, self._waiting = self._waiting, []
            for waiting in batch:
                waiting.taken = True
            outcomes = await loop.run_in_executor(self._writer, self._write, batch)
            self._waiting_bytes -= sum(len(waiting.frame) for waiting in batch)
            self._arrived.set()
            for waiting, outcome in zip(batch, outcomes, strict=True):
                if outcome is None:
                    waiting.done.set_result(None)
                else:
                    waiting.done.set_exception(outcome)
            if last_try:
                if self._parked:
                    _log.error("spool: closed with %d ends that the disk refused", len(self._parked))
                return

    def _write(self, batch: Sequence[_Waiting]) -> list[Exception | None]:
        """What became of each record. Runs in the writer's thread; raises nothing."""
        outcomes: list[Exception | None] = [None] * len(batch)
        taken = [*self._parked]
        refusal = self._prepare(batch)
        room, places = self._room()
        for index, waiting in enumerate(batch):
            if not waiting.new_work:
                taken.append(waiting)
                continue
            need, rows = len(waiting.frame), 1
            if isinstance(waiting.record, InferenceStarted):
                need, rows = need + self._end_bytes, 2
            if refusal or need > room or rows > places:
                outcomes[index] = SpoolFull(refusal or self._full_text())
                continue
            room, places = room - need, places - rows
            taken.append(waiting)
        try:
            self._put(taken)
        except OSError as error:
            refusal = _refusal(error)
            for index, waiting in enumerate(batch):
                if waiting.new_work:
                    outcomes[index] = outcomes[index] or SpoolFull(refusal)
            self._put_ends([waiting for waiting in taken if not waiting.new_work])
        else:
            self._parked = []
        self._refusal = refusal
        return outcomes

    def _prepare(self, batch: Sequence[_Waiting]) -> str:
        """Why new work must be refused, if so; sees to it that the reserve holds the ends to come."""
        starts = sum(isinstance(waiting.record, InferenceStarted) for waiting in batch)
        try:
            self._grow_reserve(max(self._segment_bytes, (len(self._open) + max(starts, 1)) * self._end_bytes))
            if self._refusal and self._active is None:
                self._begin_segment(0)
        except OSError as error:
            return _refusal(error)
        return ""

    def _put(self, taken: Sequence[_Waiting]) -> None:
        """Write and sync; all of them, or (OSError) none."""
        if not taken:
            return
        data = b"".join(waiting.frame for waiting in taken)
        active = self._active
        if (
            active is None
            or active.size + len(data) > max(self._segment_bytes, len(data))
            or self._is_spent()
        ):
            active = self._begin_segment(len(data))
        try:
            disk.write_all(active.descriptor, data, active.size)
            os.fdatasync(active.descriptor)
        except OSError:  # nothing beyond the last good record can be trusted now
            self._retire(active)
            raise
        with self._guard:
            active.size += len(data)
            self._end = active.end
            self._records += len(taken)
            if self._oldest_ms is None:
                self._oldest_ms = written_ms(taken[0].frame)
        for waiting in taken:
            if isinstance(waiting.record, InferenceStarted):
                self._open.add(waiting.record.id)
            elif isinstance(waiting.record, InferenceEnded):
                self._open.discard(waiting.record.id)

    def _is_spent(self) -> bool:
        """Whether all of the segment being written is stored, and has been readable for long enough."""
        with self._guard:
            active = self._active
            stored = active is not None and active.size > 0 and active.end <= self._position
        return stored and active is not None and time.monotonic() - active.begun > SEGMENT_SECONDS

    def _put_ends(self, ends: list[_Waiting]) -> None:
        """The disk refuses: ends go into the reserve, and where even that fails they wait in memory."""
        self._parked = ends
        if not ends:
            return
        try:
            self._begin_segment(0, from_reserve=True)
            self._put(ends)
        except OSError as error:
            _log.error("spool: %d ends wait in memory, the disk refuses them: %s", len(ends), error)
        else:
            self._parked = []

    def _room(self) -> tuple[int, int]:
        """Bytes and records that new work may take, the ends of the open inferences set aside."""
        with self._guard:
            return (
                self.max_bytes - (self._end - self._position) - len(self._open) * self._end_bytes,
                self.max_records - self._records - len(self._open),
            )

    def _full_text(self) -> str:
        return (
            f"the log's spool is full ({self.max_bytes} bytes or {self.max_records} records wait for the "
            "database): no new work is accepted until the database has taken some"
        )

    def _begin_segment(self, size: int, *, from_reserve: bool = False) -> _Segment:
        if self._active is not None:
            self._retire(self._active)
        path = self.directory / f"{self._end:020d}.log"
        if from_reserve:
            (self.directory / "reserve").rename(path)
            self._reserved = 0
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not from_reserve:
                disk.allocate(descriptor, max(self._segment_bytes, size))
            disk.sync_directory(self.directory)
        except OSError:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        segment = _Segment(path, self._end, descriptor=descriptor)
        with self._guard:
            self._active = segment
            self._segments.append(segment)
        return segment

    def _retire(self, segment: _Segment) -> None:
        """Close the segment being written, and give back what it had allocated beyond its end."""
        with self._guard:
            self._active = None
            if segment.size == 0:
                self._segments.remove(segment)
        with contextlib.suppress(OSError):
            os.ftruncate(segment.descriptor, segment.size)
        os.close(segment.descriptor)
        if segment.size == 0:
            with contextlib.suppress(OSError):
                segment.path.unlink()

    def _grow_reserve(self, size: int) -> None:
        if self._reserved >= size:
            return
        size = -(-size // self._segment_bytes) * self._segment_bytes
        path = self.directory / "reserve"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            disk.allocate(descriptor, size)
            self._reserved = size
        except OSError:
            if not self._reserved:
                path.unlink()
            raise
        finally:
            os.close(descriptor)

    # Reading

    def state(self) -> SpoolState:
        """Depth now.

        `max_bytes` is the limit as things stand: `full` is true on a full disk, too, and where there are too
        many records.
        """
        with self._guard:
            used = self._end - self._position
            oldest = self._oldest_ms
            limit = self.max_bytes - (len(self._open) + 1) * self._end_bytes
            if self._refusal or self._records + len(self._open) + 2 > self.max_records:
                limit = min(limit, used)
            age = 0.0 if oldest is None else max(0.0, self._clock() - oldest / 1000)
            return SpoolState(self._records, used, age, limit)

    async def wait(self, seconds: float) -> None:
        """Return when there is something to read, or the time is over, or the spool is closed."""
        if self._end > self._position or self._closed:
            return
        self._arrived.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._arrived.wait(), seconds)

    async def read_batch(self, limit: int) -> list[tuple[int, LogRecord | Corrupt]]:
        """The next records, oldest first, each with the position to commit once it is stored.

        What is no record comes as Corrupt. Nothing is consumed: the same records come again until `commit`.
        At most `limit` records and 8 MiB (or one record, if it alone is larger).
        """
        return await asyncio.get_running_loop().run_in_executor(self._reader, self._read, limit)

    async def commit(self, position: int) -> None:
        """Forget what is before `position`: it is stored, or dead-lettered. Deletes finished segments."""
        await asyncio.get_running_loop().run_in_executor(self._reader, self._commit, position)

    async def dead_letter(self, position: int, what: LogRecord | Corrupt, reason: str) -> None:
        """Keep in `dead/`, by an atomic rename, what cannot be stored. Doing it twice leaves one file.

        Raises:
            OSError: if the disk refuses; the record is still in its segment then.
        """
        letter: dict[str, object] = {
            "at": datetime.fromtimestamp(self._clock(), UTC).isoformat(),
            "server_id": self.server_id,
            "position": position,
            "reason": reason,
        }
        if isinstance(what, Corrupt):
            letter["raw_latin1"] = what.raw.decode("latin-1")  # any bytes, kept one to one
        else:
            letter["record"] = json.loads(record_to_json(what))
        path = self.directory / "dead" / f"{position:020d}.json"
        data = (json.dumps(letter, indent=2, sort_keys=True) + "\n").encode("ascii")
        await asyncio.get_running_loop().run_in_executor(self._reader, self._keep, path, data)

    def _keep(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        disk.replace(path, data)

    def dead_letters(self) -> int:
        """How many records are in `dead/`."""
        return sum(1 for _ in (self.directory / "dead").glob("*.json"))

    def _read(self, limit: int) -> list[tuple[int, LogRecord | Corrupt]]:
        with self._guard:
            position, end = self._position, self._end
        batch: list[tuple[int, LogRecord | Corrupt]] = []
        size = 0
        for after, line in self._lines(position, end):
            size += len(line)
            if batch and size > BATCH_BYTES:
                break
            batch.append((after, decode_frame(line)))
            if len(batch) >= limit:
                break
        return batch

    def _commit(self, position: int) -> None:
        with self._guard:
            if not self._position <= position <= self._end:
                raise ValueError(f"position {position} is not in {self._position}..{self._end}")
            before = self._position
        stored = sum(1 for _ in self._lines(before, position))
        with self._guard:
            self._position = position
            self._records -= stored
            self._oldest_ms = None
        oldest = self._read_moment()
        with self._guard:
            if self._oldest_ms is None:
                self._oldest_ms = oldest
        try:
            disk.write_position(self.directory / "position", position)
        except OSError as error:  # storing twice changes nothing: better than to stop storing
            _log.warning("spool: the position could not be written: %s", error)
        self._delete_stored()

    def _lines(self, position: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Each line from `position` to `end`, with the position after it."""
        with self._guard:
            segments = list(self._segments)
        for segment in segments:
            if segment.end <= position or segment.base >= end or segment.size == 0:
                continue
            with segment.path.open("rb") as file:
                at = max(position, segment.base)
                stop = min(end, segment.end)
                file.seek(at - segment.base)
                while at < stop:
                    line = read_line(file, stop - at)
                    at += len(line)
                    yield at, line

    def _read_moment(self) -> int | None:
        """When the oldest record was written, in ms; None if there is none."""
        with self._guard:
            position, end = self._position, self._end
        for _, line in self._lines(position, end):
            return written_ms(line)
        return None

    def _delete_stored(self) -> None:
        """Delete the segments before the position, the one being written excepted."""
        with self._guard:
            position, active = self._position, self._active
            stored = [one for one in self._segments if one.end <= position and one is not active]
        for segment in stored:
            try:
                segment.path.unlink(missing_ok=True)
            except OSError as error:
                _log.warning("spool: a stored segment could not be deleted: %s", error)
                return
            with self._guard:
                self._segments.remove(segment)


def _may_be_refused(record: LogRecord) -> bool:
    """Ends and server starts may not be: what was accepted ends."""
    return not isinstance(record, InferenceEnded | ServerStarted)


def _cancelled(start: InferenceStarted, now: float) -> InferenceEnded:
    return InferenceEnded(
        id=start.id,
        status=Status.CANCELLED,
        finish_reason=None,
        answer={"role": "assistant", "content": "", "tool_calls": [], "tool_name": ""},
        usage=Usage(),
        timings=Timings(),
        error="cancelled before it began",
        ended_at=datetime.fromtimestamp(now, UTC),
    )


def _refusal(error: OSError) -> str:
    return (
        f"the log's disk takes no more ({errno.errorcode.get(error.errno or 0, 'error')}): "
        "no new work is accepted until it does"
    )
