"""The secret by which sessions are drawn for the gate: 32 bytes in the state folder, the same every night.

Were the draw public, a caller could name its sessions so that all of them gate: nothing of them, nor what is
nearly asked in them, would ever be learned. Servers of one installation, and whoever makes a cycle again,
need the same file; `dataset.json` has its SHA-256 among the inputs, which tells a night that had another one.
"""

from __future__ import annotations

from pathlib import Path

from grpc_server.domain import key_file

NAME = "gate.key"
BYTES = 32


def of(state_dir: Path) -> Path:
    """The key's file, made (mode 0600) if there is none.

    Raises:
        OSError: if it cannot be made.
    """
    path = state_dir / NAME
    key_file.made(path, BYTES)
    return path


def read(path: Path) -> bytes:
    """The key in its file.

    Raises:
        ValueError: if it is no key.
        OSError: if it cannot be read.
    """
    key = path.read_bytes()
    if len(key) != BYTES:
        raise ValueError(
            f"{path} has {len(key)} bytes, and a key of the gate has {BYTES}: put back the file that was"
            " there. With another one, sessions that were kept for the gate would be learned"
        )
    return key
