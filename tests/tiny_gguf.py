"""A GGUF that llama.cpp's programs run in no time, and whether two say the same of themselves."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from grpc_server.domain.gguf_layout import layout

_WIDTH, _HIDDEN, _HEADS = 256, 512, 4
_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")  # llama-perplexity reads back only an even number of words


def tiny_gguf(path: Path) -> Path:
    """Write a model of 0.9 M weights in float32, of the architecture `llama`; return its path."""
    words = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_HIDDEN)
    writer.add_head_count(_HEADS)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 3]
    writer.add_token_types([*kinds, *[gguf.TokenType.BYTE] * 256])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    chance = np.random.default_rng(7)
    shapes = {
        "token_embd": (len(words), _WIDTH),
        "output": (len(words), _WIDTH),
        **{f"blk.0.attn_{name}": (_WIDTH, _WIDTH) for name in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (_HIDDEN, _WIDTH),
        "blk.0.ffn_up": (_HIDDEN, _WIDTH),
        "blk.0.ffn_down": (_WIDTH, _HIDDEN),
    }
    for name, shape in shapes.items():
        weights = chance.normal(scale=shape[1] ** -0.5, size=shape)
        writer.add_tensor(f"{name}.weight", weights.astype(np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(_WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def described_alike(one: Path, other: Path) -> None:
    """Fails unless both have the same tokenizer, byte for byte, and tensors of the same names and shapes."""
    with one.open("rb") as first, other.open("rb") as second:
        ours, theirs = layout(first), layout(second)
        names = {name for name in theirs.spans if name.startswith("tokenizer.")}
        assert names and names == {name for name in ours.spans if name.startswith("tokenizer.")}
        for name in names:
            parts = []
            for file, (start, end) in ((first, ours.spans[name]), (second, theirs.spans[name])):
                file.seek(start)
                parts.append(file.read(end - start))
            assert parts[0] == parts[1], name
    assert {each.name: each.shape for each in ours.tensors} == {
        each.name: each.shape for each in theirs.tensors
    }
