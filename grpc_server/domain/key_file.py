"""A secret in a file of its own, made once by whoever comes first."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def made(path: Path, size: int) -> None:
    """Make a file of `size` random bytes (mode 0600), with its folder, unless it is there.

    Raises:
        OSError: if it cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return
    new = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, secrets.token_bytes(size))
        os.fsync(descriptor)
        with contextlib.suppress(FileExistsError):  # another process was faster: its key counts
            os.link(new, path)
    finally:
        os.close(descriptor)
        new.unlink()
