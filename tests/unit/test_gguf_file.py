"""What is read as a GGUF, and what becomes of a copy that nobody waits for any more."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import stat
import threading
from pathlib import Path

import pytest

from grpc_server.adapters.gguf_file import (
    Abandoned,
    checked_copy,
    in_thread,
    opened,
    sha256_of,
    writing,
)
from grpc_server.domain.errors import Exhausted, Precondition

CONTENT = b"GGUF" + b"x" * (3 << 20)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "ä model.gguf"
    path.write_bytes(CONTENT)
    return path


def odd(kind: str, folder: Path) -> Path:
    path = folder / "odd.gguf"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "long":
        return folder / ("x" * 300)
    else:
        return Path(kind)
    return path


def test_a_copy_has_the_bytes_that_were_checked(gguf: Path, tmp_path: Path) -> None:
    assert checked_copy(gguf, SHA256.upper(), tmp_path / "copy") == len(CONTENT)
    assert (tmp_path / "copy").read_bytes() == CONTENT
    assert sha256_of(gguf) == SHA256


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("fifo", "is not a regular file"),
        ("/dev/zero", "is not a regular file"),
        ("folder", "is not a regular file"),
        ("socket", "No such device or address"),
        ("loop", "Too many levels of symbolic links"),
        ("long", "File name too long"),
        ("/nowhere/a.gguf", "No such file or directory"),
        ("/dev/null/a.gguf", "Not a directory"),
    ],
)
@pytest.mark.timeout(10)
def test_what_is_no_regular_file_is_told_at_once(tmp_path: Path, kind: str, says: str) -> None:
    path = odd(kind, tmp_path)
    with pytest.raises(Precondition, match=says) as refused:
        opened(path)
    assert str(path) in str(refused.value)
    with pytest.raises(Precondition, match=says):
        checked_copy(path, SHA256)


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04"])
def test_what_does_not_begin_like_a_gguf_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(Precondition, match="is not a GGUF file"):
        checked_copy(path, hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize(
    ("number", "error", "says"),
    [
        (errno.ENOSPC, Exhausted, "is full; make room"),
        (errno.EDQUOT, Exhausted, "is full; make room"),
        (errno.EROFS, Precondition, "cannot be written to on the server's host: Read-only file system"),
    ],
)
def test_a_folder_that_cannot_be_written_to_says_why(number: int, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"/m.*{says}"), writing(Path("/m")):
        raise OSError(number, os.strerror(number))


def test_an_abandoned_copy_stops_where_it_is(gguf: Path, tmp_path: Path) -> None:
    abandoned = threading.Event()
    abandoned.set()
    with pytest.raises(Abandoned):
        checked_copy(gguf, SHA256, tmp_path / "copy", abandoned)
    assert (tmp_path / "copy").stat().st_size < len(CONTENT)


async def test_one_who_is_cancelled_waits_until_the_thread_has_stopped() -> None:
    ended, began = threading.Event(), threading.Event()

    def work(abandoned: threading.Event) -> None:
        began.set()
        abandoned.wait(10)
        ended.set()
        raise Abandoned

    task = asyncio.create_task(in_thread(work))
    await asyncio.to_thread(began.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_what_a_thread_gives_or_raises_is_given_and_raised() -> None:
    assert await in_thread(lambda _: 7) == 7

    def fails(_: threading.Event) -> None:
        raise Precondition("no")

    with pytest.raises(Precondition):
        await in_thread(fails)
