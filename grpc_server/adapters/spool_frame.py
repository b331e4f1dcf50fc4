"""One record as one line of a spool: `<length> <crc32> <unix ms> <JSON>`.

Length and CRC (8 hex digits each) are those of what follows them up to the line's end.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from grpc_server.adapters.record_json import record_from_json, record_to_json
from grpc_server.domain.types import LogRecord

_HEADER = len("00000000 00000000 ")


@dataclass(frozen=True, slots=True)
class Corrupt:
    """Bytes of a segment that are no record: the disk, or a hand, changed them."""

    raw: bytes


def encode_frame(record: LogRecord, unix_ms: int) -> bytes:
    """The line that a segment holds. Raises ValueError for a record that JSON cannot hold."""
    payload = f"{unix_ms:d} {record_to_json(record)}".encode("ascii")
    return b"%08x %08x %b\n" % (len(payload), zlib.crc32(payload), payload)


def decode_frame(line: bytes) -> LogRecord | Corrupt:
    """The record of a line, or Corrupt. The line's last byte may be anything."""
    payload = line[_HEADER:-1]
    if not _whole(line, payload):
        return Corrupt(line)
    try:
        return record_from_json(payload.partition(b" ")[2])
    except ValueError:  # of another version of this software
        return Corrupt(line)


def _whole(line: bytes, payload: bytes) -> bool:
    return line[:_HEADER] == b"%08x %08x " % (len(payload), zlib.crc32(payload))


def written_ms(line: bytes) -> int:
    """When the line was written, Unix ms; 0 where it does not tell."""
    digits = line[_HEADER : _HEADER + 20].partition(b" ")[0]
    return int(digits) if digits.isdigit() else 0


def read_line(file: BinaryIO, most: int) -> bytes:
    """One line of at most `most` bytes.

    By its length where the line's end is not where it should be: so a damaged line end harms no neighbour,
    and damage that looks like a line end makes one Corrupt, not two.
    """
    line = file.readline(most)
    digits = line[:8]
    try:
        declared = _HEADER + int(digits, 16) + 1
    except ValueError:
        return line
    if declared == len(line) or declared > most:
        return line
    whole = line[:declared] if declared < len(line) else line + file.read(declared - len(line))
    if _whole(whole, whole[_HEADER:-1]) or (declared > len(line) and whole.endswith(b"\n")):
        if declared < len(line):
            file.seek(declared - len(line), os.SEEK_CUR)
        return whole
    if declared > len(line):
        file.seek(len(line) - declared, os.SEEK_CUR)
    return line
