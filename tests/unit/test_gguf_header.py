"""What a GGUF's header says, and that a damaged one is refused, in the time that its bytes take."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpc_server.adapters.gguf_header import read_details
from grpc_server.domain.errors import Precondition
from grpc_server.domain.types import ModelDetails


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, *dimensions: int) -> bytes:
    sizes = b"".join(struct.pack("<Q", size) for size in dimensions)
    return text(name) + struct.pack("<I", len(dimensions)) + sizes + struct.pack("<IQ", 0, 0)


def gguf(pairs: list[bytes], tensors: list[bytes], version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs + tensors)


def words(*values: str) -> bytes:
    return struct.pack("<IQ", 8, len(values)) + b"".join(text(value) for value in values)


WHOLE = gguf(
    [
        pair("general.architecture", 8, text("gemma3")),
        pair("tokenizer.ggml.tokens", 9, words("<pad>", "", "a" * 40)),
        pair("tokenizer.ggml.scores", 9, struct.pack("<IQ3f", 6, 3, 1.0, 2.0, 3.0)),
        pair("general.file_type", 4, struct.pack("<I", 15)),
        pair("gemma3.context_length", 10, struct.pack("<Q", 32768)),
        pair("tokenizer.ggml.add_bos_token", 7, b"\1"),
    ],
    [tensor("token_embd.weight", 640, 1000), tensor("output_norm.weight", 640)],
)


def details(path: Path, content: bytes) -> ModelDetails:
    path.write_bytes(content)
    return read_details(path)


def test_a_header_is_read(tmp_path: Path) -> None:
    assert details(tmp_path / "a", WHOLE) == ModelDetails("gemma3", 640_640, "Q4_K_M", 32_768)


def test_what_a_header_does_not_say_is_empty(tmp_path: Path) -> None:
    assert details(tmp_path / "a", gguf([], [])) == ModelDetails()


def test_a_kind_that_came_later_is_told_by_its_number(tmp_path: Path) -> None:
    content = gguf([pair("general.file_type", 4, struct.pack("<I", 99))], [], version=2)
    assert details(tmp_path / "a", content).quantization == "type 99"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "does not begin with GGUF"),
        (b"GGUF", "bytes are missing"),
        (gguf([], [], version=1), "version 1"),
        (WHOLE[:100], "bytes are missing"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "bytes are missing"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "bytes are missing"),
        (gguf([pair("a", 9, struct.pack("<IQ", 8, 2**62))], []), "bytes are missing"),
        (gguf([pair("a", 9, struct.pack("<IQ", 12, 2**62))], []), "bytes are missing"),
        (gguf([pair("a", 9, struct.pack("<IQ", 9, 1))], []), "bytes are missing"),
        (gguf([pair("a", 77, b"")], []), "type 77"),
        (gguf([], [text("t") + struct.pack("<I", 2**31)]), "dimensions"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    with pytest.raises(Precondition, match=problem):
        details(tmp_path / "a", content)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_changed_it_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(4, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(Precondition):
        assert isinstance(details(tmp_path / "a", bytes(content)), ModelDetails)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Precondition):
        read_details(tmp_path / "nothing")
