"""What both engines ask of a GGUF before they take it: that it is one, with the promised bytes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from grpc_server.domain.errors import InvalidArgument, Precondition

_MAGIC = b"GGUF"  # https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}:[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_CHUNK = 1 << 20


def check_name(name: str) -> None:
    """Raises InvalidArgument unless `name` is `<model>:<cycle id>`, fit for a file name and for Ollama."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"model version {name[:200]!r} is not a name like gemma-3-270m:20260101T020000Z: two parts of at"
            " most 80 letters, digits, '.', '_' and '-', joined by ':'",
            "name",
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
