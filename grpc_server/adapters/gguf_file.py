"""What both engines ask of a GGUF before they take it: that it is one, with the promised bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from grpc_server.domain.errors import AlreadyExists, Precondition

_MAGIC = b"GGUF"  # https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_CHUNK = 1 << 20


def name_taken(name: str, sha256: str) -> AlreadyExists:
    """The error for a version that is installed with other bytes, of this SHA-256."""
    return AlreadyExists(
        f"model version {name} is installed with the SHA-256 {sha256}; a version never changes: install the"
        " new file under a new name"
    )


def checked_copy(source: Path, sha256: str, target: Path | None = None) -> int:
    """The size in bytes of the GGUF `source`, which `sha256` (hexadecimal) is true of; copied to `target`.

    One pass, so that what was checked is what was copied.

    Raises:
        Precondition: there is no such file, it is no GGUF, or it has another SHA-256.
    """
    digest = hashlib.sha256()
    size = 0
    try:
        with source.open("rb") as reader:
            if reader.read(len(_MAGIC)) != _MAGIC:
                raise Precondition(f"{source} is not a GGUF file")
            reader.seek(0)
            writer = target.open("wb") if target else None
            try:
                while chunk := reader.read(_CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
                    if writer:
                        writer.write(chunk)
            finally:
                if writer:
                    writer.close()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise Precondition(f"{source} cannot be read on the server's host: {error.strerror}") from error
    if digest.hexdigest() != sha256.lower():
        raise Precondition(f"{source} has the SHA-256 {digest.hexdigest()}, not {sha256[:64]}")
    return size
