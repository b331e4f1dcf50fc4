"""What both engines ask of a GGUF before they take it: that it is one, with the promised bytes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from grpc_server.domain.errors import AlreadyExists, Exhausted, Precondition
from grpc_server.domain.types import InstallPhase, InstallProgress

T = TypeVar("T")

_MAGIC = b"GGUF"  # https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_CHUNK = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Abandoned(Exception):  # noqa: N818 - nobody sees it as an error
    """Whoever wanted the work has gone."""


def name_taken(name: str, sha256: str) -> AlreadyExists:
    """The error for a version that is installed with other bytes, of this SHA-256."""
    return AlreadyExists(
        f"model version {name} is installed with the SHA-256 {sha256}; a version never changes: install the"
        " new file under a new name"
    )


def opened(source: Path) -> BinaryIO:
    """`source`, open for reading. Raises Precondition unless it is a regular file that can be read.

    Opening a FIFO would wait for its writer, and a device may never end; so it is opened without waiting, and
    what was opened is what is looked at.
    """
    with _reading(source):
        descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    raise Precondition(f"{source} is not a regular file on the server's host")


def checked_copy(
    source: Path,
    sha256: str,
    target: Path | None = None,
    abandoned: threading.Event | None = None,
    progress: InstallProgress | None = None,
) -> int:
    """The size in bytes of the GGUF `source`, which `sha256` (hexadecimal) is true of; copied to `target`.

    One pass, so that what was checked is what was copied. `progress` is told of each piece.

    Raises:
        Precondition: there is no such file, it is no GGUF, or it has another SHA-256.
        Abandoned: soon after that event is set.
        OSError: if `target` cannot be written; see `writing`.
    """
    found, size = _copied(source, target, abandoned, progress)
    if found != sha256.lower():
        raise Precondition(f"{source} has the SHA-256 {found}, not {sha256[:64]}")
    return size


def sha256_of(source: Path, abandoned: threading.Event | None = None) -> str:
    """The SHA-256 of the GGUF `source`, hexadecimal. Raises Precondition and Abandoned, as `checked_copy`."""
    return _copied(source, None, abandoned)[0]


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise Exhausted where the disk of `folder` is full, and Precondition for what else keeps us out."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            text = f"the disk of {folder} on the server's host is full; make room on it"
            raise Exhausted(text, retry_after_seconds=None) from error
        raise Precondition(
            f"{folder} cannot be written to on the server's host: {error.strerror or error}"
        ) from error


async def in_thread(work: Callable[[threading.Event], T]) -> T:
    """What `work` gives, in a thread. When we are cancelled, its event is set, and its end is waited for.

    So nothing works on in secret while the next attempt begins.
    """
    abandoned = threading.Event()
    task = asyncio.create_task(asyncio.to_thread(work, abandoned))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        abandoned.set()
        await asyncio.wait({task})
        raise


def _copied(
    source: Path,
    target: Path | None,
    abandoned: threading.Event | None,
    progress: InstallProgress | None = None,
) -> tuple[str, int]:
    """SHA-256 and size of what was read, and written to `target`."""
    digest = hashlib.sha256()
    size = 0
    progress = progress or InstallProgress()
    with opened(source) as reader, target.open("wb") if target else contextlib.nullcontext() as writer:
        progress.begin(
            InstallPhase.COPYING if target else InstallPhase.CHECKING, os.fstat(reader.fileno()).st_size
        )
        for chunk in _chunks(source, reader):
            if abandoned is not None and abandoned.is_set():
                raise Abandoned
            digest.update(chunk)
            size += len(chunk)
            progress.done_bytes = size
            if writer:
                writer.write(chunk)
    return digest.hexdigest(), size


def _chunks(source: Path, reader: BinaryIO) -> Iterator[bytes]:
    """All of the file. Raises Precondition if it does not begin like a GGUF, or cannot be read."""
    first = True
    while True:
        with _reading(source):
            chunk = reader.read(_CHUNK)
        if first and not chunk.startswith(_MAGIC):
            raise Precondition(f"{source} is not a GGUF file")
        if not chunk:
            return
        first = False
        yield chunk


@contextlib.contextmanager
def _reading(source: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Precondition(f"{source} cannot be read on the server's host: {error.strerror}") from error
