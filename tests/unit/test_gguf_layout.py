"""Where a GGUF's parts lie is told as the field's own library tells it; other bytes are refused."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import given
from hypothesis import strategies as some

from grpc_server.domain.gguf_layout import GgufError, Layout, aligned, layout
from training.quantize import with_metadata_of


def written(path: Path, *, pre: str = "default", tensors: int = 2, scale: float = 1.0) -> Path:
    writer = GGUFWriter(path, "gemma3")
    writer.add_uint32("gemma3.context_length", 32768)
    writer.add_float32("gemma3.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_string("tokenizer.ggml.pre", pre)
    writer.add_array("tokenizer.ggml.tokens", ["<pad>", "", "é", "\u2581the"])
    writer.add_array("tokenizer.ggml.scores", [0.0, -1.0, -2.0, -3.5])
    writer.add_file_type(32)
    for number in range(tensors):
        writer.add_tensor(f"blk.{number}.weight", np.full((3, 5), number + scale, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def layout_of(content: bytes) -> Layout:
    return layout(io.BytesIO(content))


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return written(tmp_path_factory.mktemp("gguf") / "a.gguf").read_bytes()


def test_fields_tensors_and_data_lie_where_the_library_finds_them(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf")
    ours, theirs = layout_of(path.read_bytes()), GGUFReader(path)
    assert set(ours.fields) == {name for name in theirs.fields if not name.startswith("GGUF.")}
    assert ours.fields["general.architecture"] == "gemma3"
    assert ours.fields["gemma3.context_length"] == 32768
    assert ours.fields["tokenizer.ggml.add_bos_token"] is True
    assert ours.fields["tokenizer.ggml.tokens"] == 4
    assert [(tensor.name, tensor.shape) for tensor in ours.tensors] == [
        (tensor.name, tuple(tensor.shape)) for tensor in theirs.tensors
    ]
    assert ours.data == theirs.data_offset


def test_the_base_of_the_demo_is_read(base_gguf: Path) -> None:
    about = layout_of(base_gguf.read_bytes())
    assert about.fields["general.architecture"] == "gemma3"
    assert about.fields["tokenizer.ggml.tokens"] == 262_144
    assert len(about.tensors) == 236


def test_tensors_are_put_under_the_metadata_of_another(tmp_path: Path) -> None:
    base = written(tmp_path / "base.gguf", pre="gemma", tensors=1, scale=7.0)
    tuned = written(tmp_path / "tuned.gguf", pre="guessed")
    with_metadata_of(base, tuned, tmp_path / "both.gguf")
    both = GGUFReader(tmp_path / "both.gguf")
    assert both.fields["tokenizer.ggml.pre"].contents() == "gemma"
    assert both.fields["tokenizer.ggml.tokens"].contents() == ["<pad>", "", "é", "\u2581the"]
    assert "general.file_type" not in both.fields
    assert {tensor.name: tensor.data.tolist() for tensor in both.tensors} == {
        "blk.0.weight": [[1.0] * 5] * 3,
        "blk.1.weight": [[2.0] * 5] * 3,
    }


def test_a_file_that_ends_too_early_is_refused_wherever_it_ends(content: bytes) -> None:
    end = layout_of(content).infos[1]
    for length in range(end):
        with pytest.raises(GgufError):
            layout_of(content[:length])


@given(position=some.integers(0, 400), value=some.binary(min_size=1, max_size=12))
def test_damaged_bytes_are_a_layout_or_an_error_and_nothing_else(
    content: bytes, position: int, value: bytes
) -> None:
    damaged = content[:position] + value + content[position + len(value) :]
    with contextlib.suppress(GgufError):
        layout_of(damaged)


@pytest.mark.parametrize(
    ("damaged", "problem"),
    [
        (b"", "does not begin with GGUF"),
        (b"GGML" + bytes(40), "does not begin with GGUF"),
        (b"GGUF\x01\0\0\0" + bytes(16), "version 1"),
        (b"GGUF\x03\0\0\0" + bytes(8) + b"\xff" * 8 + bytes(64), "value of the type|whole GGUF"),
    ],
)
def test_what_is_wrong_is_said(damaged: bytes, problem: str) -> None:
    with pytest.raises(GgufError, match=problem):
        layout_of(damaged)


def test_an_offset_that_is_aligned_stays() -> None:
    assert [aligned(offset, 32) for offset in (0, 1, 32, 33)] == [0, 32, 32, 64]
