"""A base that is a folder of shards: complete, or the file that is not is named before it is loaded."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training import base, cycle, shards
from training.base import BaseModelError
from training.quantize import with_metadata_of
from training.shards import INDEX, SINGLE

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

# The shapes of gemma-3n-e4b, shrunk: two kinds of layers, shared keys and values, AltUp, embeddings a layer.
SHRUNK: dict[str, Any] = {
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 2,
    "head_dim": 8,
    "laurel_rank": 4,
    "sliding_window": 16,
    "max_position_embeddings": 64,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
}


def shard(path: Path, *tensors: str) -> None:
    """A safetensors file of one float32 a tensor."""
    header = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * number, 4 * number + 4]}
        for number, name in enumerate(tensors)
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4 * len(tensors)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "gemma 3n & co"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "tokenizer.json").write_text("{}")
    shard(made / FIRST, "a", "b")
    shard(made / SECOND, "c")
    (made / INDEX).write_text(json.dumps({"weight_map": {"a": FIRST, "b": FIRST, "c": SECOND}}))
    return made


def test_a_complete_folder_is_a_base_as_it_is(folder: Path, tmp_path: Path) -> None:
    assert base.kind(folder) == "folder"
    assert base.hugging_face_folder(folder, tmp_path / "var") == folder
    assert not (tmp_path / "var").exists()


def test_weights_may_be_in_one_file(folder: Path) -> None:
    for name in (FIRST, SECOND, INDEX):
        (folder / name).unlink()
    shard(folder / SINGLE, "a")
    assert base.kind(folder) == "folder"


def test_a_file_is_taken_for_a_gguf_and_nothing_for_no_base(folder: Path) -> None:
    assert base.kind(folder / "config.json") == "gguf"
    with pytest.raises(BaseModelError, match=r"there is no base model at .*none; set AGENTLOOP_BASE_GGUF"):
        base.kind(folder / "none")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def write(content: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_bytes(content)

    return change


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (SECOND, Path.unlink, "is missing, one of 2 shards"),
        (SECOND, cut, "bytes, where its header says"),
        (FIRST, grown, "bytes, where its header says"),
        (FIRST, write(b""), "is cut off in its header"),
        (FIRST, write(b"\x05\0\0"), "is cut off in its header"),
        (FIRST, write(b"\xff" * 64), "is cut off in its header"),
        (FIRST, write(struct.pack("<Q", 40) + b"{"), "is cut off in its header"),
        (FIRST, write(struct.pack("<Q", 2) + b"{}"), "its header cannot be read"),
        (FIRST, write(struct.pack("<Q", 4) + b"\0\0\0\0"), "its header cannot be read"),
        (FIRST, write(struct.pack("<Q", 2) + b"[]"), "its header cannot be read"),
        (FIRST, lambda path: shard(path, "a"), "lacks the tensor b"),
        (INDEX, write(b"{"), "is not JSON"),
        (INDEX, write(b"{}"), "has no weight_map"),
        (INDEX, write(b"[]"), "must hold a JSON object"),
        (INDEX, write(b'{"weight_map": {"a": 5}}'), "has no weight_map"),
        (INDEX, write(b'{"weight_map": {"a": "../secret.safetensors"}}'), "shards must lie beside it"),
        ("config.json", Path.unlink, "config.json is missing"),
        ("config.json", write(b"\xff"), "config.json is not JSON"),
        ("tokenizer.json", Path.unlink, "has no tokenizer"),
    ],
)
def test_what_is_missing_or_cut_off_is_named(
    folder: Path, name: str, change: Callable[[Path], None], said: str
) -> None:
    change(folder / name)
    with pytest.raises(BaseModelError) as told:
        base.hugging_face_folder(folder, folder)
    assert said in str(told.value)
    if name != "tokenizer.json":
        assert name in str(told.value)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(BaseModelError, match=r"has no weights that can be read.*\*\.bin"):
        base.kind(folder)


def test_a_folder_has_a_hash_of_its_files_and_their_names(folder: Path) -> None:
    before = cycle.sha256(folder)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("")
    assert cycle.sha256(folder) == before
    (folder / SECOND).rename(folder / "other.safetensors")
    assert cycle.sha256(folder) != before


def test_a_tuned_folder_keeps_what_the_converter_read_in_it(folder: Path, tmp_path: Path) -> None:
    converted = tmp_path / "converted.gguf"
    converted.write_bytes(b"GGUF as converted")
    with_metadata_of(folder, converted, tmp_path / "unquantized.gguf")
    converted.unlink()
    assert (tmp_path / "unquantized.gguf").read_bytes() == b"GGUF as converted"


def as_published(folder: Path) -> None:
    """Give a model of text alone the names, and the configuration, of one that also sees."""
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3n", "text_config": text}))
    index = json.loads((folder / INDEX).read_text())
    placed = index["weight_map"]
    for path in folder.glob("model-*-of-*.safetensors"):
        content = path.read_bytes()
        end = 8 + struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8:end])
        renamed = {
            name.replace("model.", "model.language_model.", 1): about for name, about in header.items()
        }
        text_of = json.dumps(renamed).encode()
        path.write_bytes(struct.pack("<Q", len(text_of)) + text_of + content[end:])
    index["weight_map"] = {
        name.replace("model.", "model.language_model.", 1): file for name, file in placed.items()
    }
    (folder / INDEX).write_text(json.dumps(index))


def test_of_a_model_that_also_sees_the_language_model_is_copied_once(folder: Path, tmp_path: Path) -> None:
    text = {"model_type": "gemma3n_text", "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3n", "text_config": text}))
    named = {
        "model.language_model.embed.weight": FIRST,
        "model.vision_tower.a": FIRST,
        "model.audio_tower.b": SECOND,
    }
    shard(folder / FIRST, "model.vision_tower.a", "model.language_model.embed.weight")
    shard(folder / SECOND, "model.audio_tower.b")
    (folder / INDEX).write_text(json.dumps({"weight_map": named}))
    found = base.hugging_face_folder(folder, tmp_path / "var")
    assert found != folder and base.kind(found) == "folder"
    assert list(shards.tensors(found / FIRST)) == ["model.embed.weight"] and not (found / SECOND).exists()
    config = json.loads((found / "config.json").read_text())
    assert config == text | {"architectures": ["Gemma3nForCausalLM"]}
    made = (found / "config.json").stat()
    assert base.hugging_face_folder(folder, tmp_path / "var") == found
    assert (found / "config.json").stat() == made

    shard(folder / FIRST, *named)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.vision_tower.a": FIRST}}))
    shard(folder / FIRST, "model.vision_tower.a")
    with pytest.raises(ValueError, match="holds no tensor of one"):
        base.hugging_face_folder(folder, tmp_path / "var")


def test_a_gemma_3n_in_shards_loads_and_is_trained_and_a_shard_that_is_cut_off_is_named(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Gemma3nForCausalLM, Gemma3nTextConfig

    for name in (FIRST, SECOND, INDEX):
        (folder / name).unlink()
    torch.manual_seed(7)
    made = Gemma3nForCausalLM(Gemma3nTextConfig(**SHRUNK))
    made.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) >= 3
    as_published(folder)

    found = base.hugging_face_folder(folder, folder / "var")
    model = AutoModelForCausalLM.from_pretrained(found, dtype=torch.float32)
    assert type(model) is Gemma3nForCausalLM
    for name, weight in made.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    ids = torch.arange(2, 34)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]

    last = max(folder.glob("model-*-of-*.safetensors"))
    cut(last)
    with pytest.raises(BaseModelError, match=last.name):
        base.hugging_face_folder(folder, folder / "var")
