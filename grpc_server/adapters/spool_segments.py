"""A spool's files: records on disk by their position, read in order, and deleted when stored, or later.

One thread appends, another reads and commits; what both look at is changed under `guard`. Nothing here knows
what a record means, or whether one may be refused (`spool`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grpc_server.adapters import spool_disk as disk
from grpc_server.adapters.spool_frame import Corrupt, decode_frame, read_line, written_ms
from grpc_server.domain.types import LogRecord

SEGMENT_SECONDS = 60.0
"""After this a new segment begins once all of it is stored: what callers wrote need not stay on this disk."""
BATCH_BYTES = 8 << 20

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Segment:
    path: Path
    base: int
    size: int = 0
    descriptor: int = -1
    begun: float = field(default_factory=time.monotonic)
    written: float = field(default_factory=time.time)

    @property
    def end(self) -> int:
        return self.base + self.size


class Segments:
    """The files in `directory`; a new one begins at `segment_bytes`.

    What is stored is kept for `keep_seconds` after it was written, `keep_bytes` of it at the most, for a
    database that is restored to what it was before; it makes room where the disk is full.

    Records from `position` to `end` are `records` many, and not yet stored; the oldest of them was written at
    `oldest_ms`. `torn` were cut short by a crash before they were accepted, and dropped.
    """

    def __init__(
        self, directory: Path, segment_bytes: int, *, keep_seconds: float = 0.0, keep_bytes: int = 0
    ) -> None:
        self.directory = directory
        self._keep_seconds = keep_seconds
        self._keep_bytes = keep_bytes if keep_seconds else 0
        self.guard = threading.Lock()
        self.position = 0
        self.end = 0
        self.records = 0
        self.oldest_ms: int | None = None
        self.torn = 0
        self.active: _Segment | None = None  # the one being written: the last
        self.lock_file: int | None = None
        self._segment_bytes = segment_bytes
        self._segments: list[_Segment] = []
        self._reserved = 0

    def open(self) -> None:
        """Take the directory, and drop a torn last record.

        Raises:
            Precondition: if another process uses the directory.
            OSError: if it cannot be read or made.
        """
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.lock_file = disk.lock(self.directory / "lock")
        try:
            self._find_records()
        except BaseException:
            self.close()
            raise

    def _find_records(self) -> None:
        self.position = disk.read_position(self.directory / "position")
        segments = [
            _Segment(path, int(path.stem), path.stat().st_size, written=path.stat().st_mtime)
            for path in sorted(self.directory.glob("*.log"))
        ]
        if segments:
            self._drop_torn(segments[-1])
            self.position = max(self.position, segments[0].base)
        for segment in segments:
            if segment.size == 0:
                segment.path.unlink()
        self._segments = [segment for segment in segments if segment.size]
        self.end = max([self.position, *(segment.end for segment in segments)])
        self.records = sum(1 for _ in self._lines(self.position, self.end))
        self.oldest_ms = self._read_moment()
        self.delete_stored()

    def close(self) -> None:
        """Close the files, and give the directory back."""
        if self.active is not None:
            self._retire(self.active)
        with contextlib.suppress(OSError):
            (self.directory / "reserve").unlink(missing_ok=True)
        self._reserved = 0
        if self.lock_file is not None:
            os.close(self.lock_file)
            self.lock_file = None

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

    def append(self, frames: Sequence[bytes]) -> None:
        """Write and sync; all of them, or (OSError) none."""
        data = b"".join(frames)
        active = self.active
        if (
            active is None
            or active.size + len(data) > max(self._segment_bytes, len(data))
            or self._is_spent()
        ):
            active = self.begin(len(data))
        try:
            disk.write_all(active.descriptor, data, active.size)
            os.fdatasync(active.descriptor)
        except OSError:  # nothing beyond the last good record can be trusted now
            self._retire(active)
            raise
        with self.guard:
            active.size += len(data)
            active.written = time.time()
            self.end = active.end
            self.records += len(frames)
            if self.oldest_ms is None:
                self.oldest_ms = written_ms(frames[0])

    def _is_spent(self) -> bool:
        """Whether all of the segment being written is stored, and has been readable for long enough."""
        with self.guard:
            active = self.active
            stored = active is not None and active.size > 0 and active.end <= self.position
        return stored and active is not None and time.monotonic() - active.begun > SEGMENT_SECONDS

    def begin(self, size: int, *, from_reserve: bool = False) -> _Segment:
        """A new segment, with room for `size` bytes, or made of the reserve. Raises OSError."""
        if self.active is not None:
            self._retire(self.active)
        path = self.directory / f"{self.end:020d}.log"
        if from_reserve:
            (self.directory / "reserve").rename(path)
            self._reserved = 0
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not from_reserve:
                self._allocate(descriptor, max(self._segment_bytes, size))
            disk.sync_directory(self.directory)
        except OSError:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        segment = _Segment(path, self.end, descriptor=descriptor)
        with self.guard:
            self.active = segment
            self._segments.append(segment)
        return segment

    def _retire(self, segment: _Segment) -> None:
        """Close the segment being written, and give back what it had allocated beyond its end."""
        with self.guard:
            self.active = None
            if segment.size == 0:
                self._segments.remove(segment)
        with contextlib.suppress(OSError):
            os.ftruncate(segment.descriptor, segment.size)
        os.close(segment.descriptor)
        if segment.size == 0:
            with contextlib.suppress(OSError):
                segment.path.unlink()

    def grow_reserve(self, size: int) -> None:
        """Keep back so many bytes for ends, at the least. Raises OSError."""
        if self._reserved >= size:
            return
        size = -(-size // self._segment_bytes) * self._segment_bytes
        path = self.directory / "reserve"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._allocate(descriptor, size)
            self._reserved = size
        except OSError:
            if not self._reserved:
                path.unlink()
            raise
        finally:
            os.close(descriptor)

    def _allocate(self, descriptor: int, size: int) -> None:
        """As `disk.allocate`; what is only kept makes room. Raises OSError."""
        try:
            disk.allocate(descriptor, size)
        except OSError:
            with self.guard:
                kept = self._stored()
            if not kept:
                raise
            self._delete(kept)
            disk.allocate(descriptor, size)

    def read(self, limit: int) -> list[tuple[int, LogRecord | Corrupt]]:
        """At most `limit` records and BATCH_BYTES, or one record, each with the position after it."""
        self.delete_stored()  # what was kept grows old while nothing comes, too
        with self.guard:
            position, end = self.position, self.end
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

    def commit(self, position: int) -> None:
        """Forget what is before `position`. Raises ValueError for one that is not among the records."""
        with self.guard:
            if not self.position <= position <= self.end:
                raise ValueError(f"position {position} is not in {self.position}..{self.end}")
            before = self.position
        stored = sum(1 for _ in self._lines(before, position))
        with self.guard:
            self.position = position
            self.records -= stored
            self.oldest_ms = None
        self._find_oldest()
        self._keep_position(position)
        self.delete_stored()

    def rewind(self) -> int:
        """Have all that is kept stored again; how many records that is."""
        with self.guard:
            position = self.position
            first = min((segment.base for segment in self._segments), default=position)
        again = sum(1 for _ in self._lines(first, position))
        if again:
            with self.guard:
                self.position = first
                self.records += again
                self.oldest_ms = None
            self._find_oldest()
            self._keep_position(first)
        return again

    def _find_oldest(self) -> None:
        oldest = self._read_moment()
        with self.guard:
            if self.oldest_ms is None:
                self.oldest_ms = oldest

    def _keep_position(self, position: int) -> None:
        try:
            disk.write_position(self.directory / "position", position)
        except OSError as error:  # storing twice changes nothing: better than to stop storing
            _log.warning("spool: the position could not be written: %s", error)

    def _lines(self, position: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Each line from `position` to `end`, with the position after it."""
        with self.guard:
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
        with self.guard:
            position, end = self.position, self.end
        for _, line in self._lines(position, end):
            return written_ms(line)
        return None

    def delete_stored(self) -> None:
        """Delete what is stored and need not be kept any more, oldest first."""
        with self.guard:
            stored = self._stored()
            size = sum(segment.size for segment in stored)
            old, before = [], time.time() - self._keep_seconds
            for segment in stored:
                if segment.written > before and size <= self._keep_bytes:
                    break
                size -= segment.size
                old.append(segment)
        self._delete(old)

    def _stored(self) -> list[_Segment]:
        """The segments before the position, the one being written excepted; asked with the guard held."""
        return [one for one in self._segments if one.end <= self.position and one is not self.active]

    def _delete(self, segments: Sequence[_Segment]) -> None:
        for segment in segments:
            try:
                segment.path.unlink(missing_ok=True)
            except OSError as error:
                _log.warning("spool: a stored segment could not be deleted: %s", error)
                return
            with self.guard:
                if segment in self._segments:  # the other thread may have been here, too
                    self._segments.remove(segment)
