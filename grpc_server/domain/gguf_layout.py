"""Where the parts of a GGUF lie in its bytes.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` library makes an array of
each of the 262,144 words of Gemma's vocabulary, 15 s of processor time a file; here they are stepped over. No
length may exceed what is left of the file, so that neither time nor memory goes beyond its size, whatever a
damaged one says.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

ALIGNMENT = 32
"""Bytes, where `general.alignment` does not say otherwise."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # with lengths of 64 bits
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_NESTED = 4
_LONGEST = 1 << 20  # bytes of a text that is kept
_MOST_DIMENSIONS = 8


class GgufError(ValueError):
    """The bytes are no GGUF, or end too early."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor, as the file describes it: dimensions from the innermost, ggml's number of its type."""

    name: str
    shape: tuple[int, ...]
    type: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts of one GGUF; offsets in bytes from its start.

    `fields` are its keys and values, where the value is a number, a boolean or a string (one of over 1 MiB is
    empty here); of an array, its length. `spans` are start and end of each whole field. `infos` are those of
    the descriptions of tensors, whose own offsets count from `data`.
    """

    version: int
    fields: Mapping[str, Any]
    spans: Mapping[str, tuple[int, int]]
    tensors: tuple[Tensor, ...]
    infos: tuple[int, int]
    data: int

    @property
    def alignment(self) -> int:
        """What tensors' data, and its start, are aligned to, in bytes."""
        return int(self.fields.get("general.alignment", ALIGNMENT))


def layout(file: BinaryIO) -> Layout:
    """The layout of the GGUF in `file`, which is read from its beginning.

    Raises:
        GgufError: it is none, or ends too early.
        OSError: it cannot be read.
    """
    reader = _Reader(file)
    try:
        return reader.layout()
    except (struct.error, UnicodeDecodeError, OverflowError) as error:
        raise GgufError(f"this is no whole GGUF: {error} at byte {reader.at}") from error


def aligned(offset: int, alignment: int) -> int:
    """The first multiple of `alignment` from `offset` on."""
    return -(-offset // alignment) * alignment


class _Reader:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = file.seek(0, os.SEEK_END)
        file.seek(0)
        self.at = 0

    def layout(self) -> Layout:
        if self._bytes(min(4, self._size)) != _MAGIC:
            raise GgufError("this is no GGUF: it does not begin with GGUF")
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise GgufError(f"this is a GGUF of version {version}; versions 2 and 3 are known")
        tensor_count, field_count = self._scalar("Q"), self._scalar("Q")
        fields: dict[str, Any] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(field_count):
            start = self.at
            name = self._string()
            fields[name] = self._value(self._scalar("I"))
            spans[name] = start, self.at
        start = self.at
        tensors = tuple(self._tensor() for _ in range(tensor_count))
        alignment = fields.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise GgufError(f"this is no GGUF: general.alignment is {alignment!r}")
        return Layout(version, fields, spans, tensors, (start, self.at), aligned(self.at, alignment))

    def _tensor(self) -> Tensor:
        name, dimensions = self._string(), self._scalar("I")
        if dimensions > _MOST_DIMENSIONS:
            raise GgufError(f"this is no GGUF: a tensor of {dimensions} dimensions, at byte {self.at}")
        shape = tuple(self._scalar("Q") for _ in range(dimensions))
        kind = self._scalar("I")
        self._scalar("Q")  # where its data lies
        return Tensor(name, shape, kind)

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth == _MOST_NESTED:
            raise GgufError(f"this is no GGUF: a value of the type {kind}, at byte {self.at}")
        item, length = self._scalar("I"), self._scalar("Q")
        if item in _SCALARS:
            self._skip(length * struct.calcsize(_SCALARS[item]))
        elif item == _STRING:
            for _ in range(length):
                self._skip(self._scalar("Q"))
        else:
            for _ in range(length):
                self._value(item, depth + 1)
        return length

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack(f"<{form}", self._bytes(struct.calcsize(form)))
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        if length > _LONGEST:
            self._skip(length)
            return ""
        return self._bytes(length).decode()

    def _bytes(self, length: int) -> bytes:
        self._use(length)
        return self._file.read(length)

    def _skip(self, length: int) -> None:
        self._use(length)
        self._file.seek(length, os.SEEK_CUR)

    def _use(self, length: int) -> None:
        if length > self._size - self.at:
            raise GgufError(f"this is no whole GGUF: {length} bytes are missing from byte {self.at} on")
        self.at += length
