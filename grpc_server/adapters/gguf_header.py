"""What a GGUF's header says of its model, without its tensors and without a library that reads them too.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. No length in a header may exceed what
is left of the file, so that neither time nor memory goes beyond the file's size, whatever a damaged one says.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from grpc_server.adapters.gguf_file import opened
from grpc_server.domain.errors import Precondition
from grpc_server.domain.types import ModelDetails

_VERSIONS = (2, 3)
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_LONGEST = 1 << 20
"""Bytes of a text that is kept."""
_DIMENSIONS = 8

# enum llama_ftype, https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h
_FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4",
}


def read_details(path: Path) -> ModelDetails:
    """What the header of the GGUF at `path` says. It takes a moment: a vocabulary is skipped word by word.

    Raises:
        Precondition: the file cannot be read, is no GGUF of version 2 or 3, or its header is damaged.
    """
    with opened(path) as file:
        try:
            return _read(_Header(file, os.fstat(file.fileno()).st_size))
        except (struct.error, ValueError, OSError, OverflowError) as error:
            raise Precondition(f"the header of {path} cannot be read: {error}") from error


class _Header:
    """A file of `size` bytes, read from its beginning."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size

    def bytes(self, count: int) -> bytes:
        self._use(count)
        return self._file.read(count)

    def skip(self, count: int) -> None:
        self._use(count)
        self._file.seek(count, os.SEEK_CUR)

    def _use(self, count: int) -> None:
        if count > self._left:
            raise ValueError("it names more bytes than the file has")
        self._left -= count

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.bytes(struct.calcsize(form)))[0]

    def text(self) -> str:
        length = self.number("<Q")
        if length > _LONGEST:
            self.skip(length)
            return ""
        return self.bytes(length).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A value that is kept; None for a list, which is skipped."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"it has a value of the unknown kind {kind}")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING:
            for _ in range(count):
                self.skip(self.number("<Q"))
        else:
            raise ValueError(f"it has a list of the unknown kind {inner}")
        return None


def _read(header: _Header) -> ModelDetails:
    header.skip(4)  # it was looked at when the file was installed
    version, tensors, values = header.number("<I"), header.number("<Q"), header.number("<Q")
    if version not in _VERSIONS:
        raise ValueError(f"it is of version {version}, not 2 or 3")
    found: dict[str, Any] = {}
    for _ in range(values):
        key = header.text()
        value = header.value(header.number("<I"))
        if key.startswith("general.") or key.endswith(".context_length"):
            found[key] = value
    architecture = str(found.get("general.architecture", ""))
    file_type = found.get("general.file_type")
    return ModelDetails(
        architecture,
        sum(_numbers_of_a_tensor(header) for _ in range(tensors)),
        "" if file_type is None else _FILE_TYPES.get(file_type, f"type {file_type}"),
        int(found.get(f"{architecture}.context_length") or 0),
    )


def _numbers_of_a_tensor(header: _Header) -> int:
    header.text()
    dimensions = header.number("<I")
    if dimensions > _DIMENSIONS:
        raise ValueError(f"a tensor has {dimensions} dimensions")
    count: int = math.prod(header.number("<Q") for _ in range(dimensions))
    header.skip(4 + 8)  # its type, and where it lies
    return count
