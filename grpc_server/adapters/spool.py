"""The durable queue in front of Postgres: an append returns when its record is on disk.

A spool is a directory with one writer at a time:

    lock                      held by the server that uses the spool (flock; names its process)
    00000000000000000000.log  segments, each named by the position of its first byte
    position                  what is stored already; segments before it go, at once or `keep_seconds` later
    history                   of the database that has stored it: in another one, what is kept is stored again
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
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from grpc_server.adapters import spool_disk as disk
from grpc_server.adapters.record_json import record_to_json
from grpc_server.adapters.spool_frame import Corrupt, encode_frame
from grpc_server.adapters.spool_segments import Segments
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
END_BYTES = 256 << 10
"""Space kept back for one end record: 8,192 tokens of 10 escaped bytes each, three times over."""
WAITING_BYTES = 64 << 20
"""What may wait in memory for a disk that is slow to take it; then new work is refused."""
RETRY_SECONDS = 1.0

_log = logging.getLogger(__name__)


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
        keep_seconds: how long what is stored is kept, for a database that is restored to what it was before;
            half of `max_bytes` at the most.
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
        keep_seconds: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.directory = directory
        self.server_id = server_id
        self.max_bytes = max_bytes
        self.max_records = max_records
        self._segment_bytes = segment_bytes
        self._files = Segments(directory, segment_bytes, keep_seconds=keep_seconds, keep_bytes=max_bytes // 2)
        self._end_bytes = end_bytes
        self._clock = clock
        self._refusal = ""
        self._history: str | None = None
        self._open: set[UUID] = set()
        self._waiting: list[_Waiting] = []
        self._waiting_bytes = 0
        self._parked: list[_Waiting] = []
        self._flusher: asyncio.Task[None] | None = None
        self._arrived = asyncio.Event()  # something to read
        self._wake = asyncio.Event()  # something to write
        self._closed = True
        self._writer = ThreadPoolExecutor(1, "spool-writer")
        self._reader = ThreadPoolExecutor(1, "spool-reader")

    # Life

    @property
    def torn(self) -> int:
        """Records cut short by a crash before they were accepted, and dropped when the spool was opened."""
        return self._files.torn

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
        await asyncio.get_running_loop().run_in_executor(self._writer, self._files.close)
        self._files.delete_stored()  # the last segment too, if nothing in it waits
        self._writer.shutdown()
        self._reader.shutdown()

    def _open_files(self) -> None:
        self._files.open()
        try:
            (self.directory / "dead").mkdir(mode=0o700, exist_ok=True)
            self._files.grow_reserve(self._segment_bytes)
        except OSError as error:  # a full disk is no reason not to start
            self._refusal = _refusal(error)

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
            self._files.grow_reserve(
                max(self._segment_bytes, (len(self._open) + max(starts, 1)) * self._end_bytes)
            )
            if self._refusal and self._files.active is None:
                self._files.begin(0)
        except OSError as error:
            return _refusal(error)
        return ""

    def _put(self, taken: Sequence[_Waiting]) -> None:
        """Write and sync; all of them, or (OSError) none."""
        if not taken:
            return
        self._files.append([waiting.frame for waiting in taken])
        for waiting in taken:
            if isinstance(waiting.record, InferenceStarted):
                self._open.add(waiting.record.id)
            elif isinstance(waiting.record, InferenceEnded):
                self._open.discard(waiting.record.id)

    def _put_ends(self, ends: list[_Waiting]) -> None:
        """The disk refuses: ends go into the reserve, and where even that fails they wait in memory."""
        self._parked = ends
        if not ends:
            return
        try:
            self._files.begin(0, from_reserve=True)
            self._put(ends)
        except OSError as error:
            _log.error("spool: %d ends wait in memory, the disk refuses them: %s", len(ends), error)
        else:
            self._parked = []

    def _room(self) -> tuple[int, int]:
        """Bytes and records that new work may take, the ends of the open inferences set aside."""
        files = self._files
        with files.guard:
            return (
                self.max_bytes - (files.end - files.position) - len(self._open) * self._end_bytes,
                self.max_records - files.records - len(self._open),
            )

    def _full_text(self) -> str:
        return (
            f"the log's spool is full ({self.max_bytes} bytes or {self.max_records} records wait for the "
            "database): no new work is accepted until the database has taken some"
        )

    # Reading

    def state(self) -> SpoolState:
        """Depth now.

        `max_bytes` is the limit as things stand: `full` is true on a full disk, too, and where there are too
        many records.
        """
        files = self._files
        with files.guard:
            used = files.end - files.position
            oldest = files.oldest_ms
            limit = self.max_bytes - (len(self._open) + 1) * self._end_bytes
            if self._refusal or files.records + len(self._open) + 2 > self.max_records:
                limit = min(limit, used)
            age = 0.0 if oldest is None else max(0.0, self._clock() - oldest / 1000)
            return SpoolState(files.records, used, age, limit)

    async def wait(self, seconds: float) -> None:
        """Return when there is something to read, or the time is over, or the spool is closed."""
        if self._files.end > self._files.position or self._closed:
            return
        self._arrived.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._arrived.wait(), seconds)

    async def read_batch(self, limit: int) -> list[tuple[int, LogRecord | Corrupt]]:
        """The next records, oldest first, each with the position to commit once it is stored.

        What is no record comes as Corrupt. Nothing is consumed: the same records come again until `commit`.
        At most `limit` records and 8 MiB (or one record, if it alone is larger).
        """
        return await asyncio.get_running_loop().run_in_executor(self._reader, self._files.read, limit)

    async def commit(self, position: int) -> None:
        """Forget what is before `position`: it is stored, or dead-lettered. Deletes finished segments."""
        await asyncio.get_running_loop().run_in_executor(self._reader, self._files.commit, position)

    async def remember(self, history: str) -> int:
        """Say to which database the records go; how many are stored again, as it is another than before.

        A database that was restored, or whose standby took over, may lack what it had acknowledged.
        """
        return await asyncio.get_running_loop().run_in_executor(self._reader, self._remember, history)

    def _remember(self, history: str) -> int:
        path = self.directory / "history"
        if self._history is None:
            with contextlib.suppress(FileNotFoundError):
                self._history = path.read_text("ascii", "replace")
        if self._history == history:
            return 0
        again = 0 if self._history is None else self._files.rewind()
        self._history = history
        try:
            disk.replace(path, history.encode("ascii"))
        except OSError as error:  # storing twice changes nothing: the next start does it
            _log.warning("spool: the database's history could not be written: %s", error)
        return again

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
