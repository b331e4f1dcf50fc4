"""What a spool asks of a disk: one owner, space that is promised, and files that are whole or absent."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import zlib
from pathlib import Path

from grpc_server.domain.errors import Precondition

_log = logging.getLogger(__name__)


def lock(path: Path) -> int:
    """Own the folder of `path` as long as the descriptor that this returns is open.

    Raises:
        Precondition: if another process owns it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(descriptor, 64).decode(errors="replace").strip()
        os.close(descriptor)
        raise Precondition(
            f"the spool {path.parent} is in use by another server (process {owner}): "
            "stop that one, or give this one a spool of its own (AGENTLOOP_SPOOL_DIR)"
        ) from None
    with contextlib.suppress(OSError):  # the name is a courtesy; a full disk is no reason not to start
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def write_position(path: Path, position: int) -> None:
    """Keep a position with its checksum. Raises OSError."""
    replace(path, _position_text(position))


def _position_text(position: int) -> bytes:
    return b"%d %08x\n" % (position, zlib.crc32(b"%d" % position))


def read_position(path: Path) -> int:
    """0 where there is none, or none that can be trusted: everything is stored once more, to no effect."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return 0
    digits = text.partition(b" ")[0]
    if digits.isdigit() and text == _position_text(int(digits)):
        return int(digits)
    _log.warning("spool: the position is unreadable; what is left is stored once more")
    return 0


def replace(path: Path, data: bytes) -> None:
    """Write a file that is whole or absent, whenever the power goes. Raises OSError."""
    new = path.with_suffix(".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        write_all(descriptor, data, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    new.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a folder outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data` at `offset`. Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        offset += written
        view = view[written:]


_libc = ctypes.CDLL(None, use_errno=True)
_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE, linux/falloc.h: allocate beyond the end, and leave the end where it is


def allocate(descriptor: int, size: int) -> None:
    """Make sure that `size` bytes can be written to the file, whatever others write to the disk.

    Where the file system cannot promise that (NFS, for one), this does nothing.
    """
    failed = _libc.fallocate(
        ctypes.c_int(descriptor), ctypes.c_int(_KEEP_SIZE), ctypes.c_int64(0), ctypes.c_int64(size)
    )
    if failed:
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(code, os.strerror(code))
