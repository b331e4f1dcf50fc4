"""The language model of a checkpoint that also sees and hears, as a checkpoint of its own.

Gemma 3n and the larger Gemma 3 are published so: their language model's tensors have a prefix, its shape is
the `text_config`. Only the language model is trained here, and what sees needs a library that is not
installed. The bytes of its tensors are copied as they are, a piece at a time, whatever their type.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from training.shards import INDEX, SINGLE, IncompleteError, tensors

_PREFIXES = {  # of published checkpoints, newer and older; what each is in a checkpoint of text alone
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
}
_ARCHITECTURES = {"gemma3n_text": "Gemma3nForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
_PIECE = 1 << 20


def is_there(folder: Path) -> bool:
    """Whether a complete checkpoint holds its language model as a part."""
    return _shape(folder).get("model_type") in _ARCHITECTURES


def copy(folder: Path, target: Path) -> None:
    """Write the language model of `folder` into `target`, with its tokenizer.

    Raises:
        IncompleteError: if `folder` has no tensor of it.
    """
    shape = _shape(folder)
    config = {**shape, "architectures": [_ARCHITECTURES[shape["model_type"]]]}
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for path in folder.iterdir():
        if path.is_file() and path.name.startswith(("tokenizer", "special_tokens", "generation_config")):
            shutil.copyfile(path, target / path.name)
    index = folder / INDEX
    names = set(json.loads(index.read_text("utf-8"))["weight_map"].values()) if index.is_file() else {SINGLE}
    placed: dict[str, str] = {}
    for name in sorted(names):
        placed |= dict.fromkeys(_copy_shard(folder / name, target / name), name)
    if not placed:
        raise IncompleteError(f"{folder} tells of a language model, but holds no tensor of one")
    if index.is_file():
        (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}), encoding="utf-8")


def _shape(folder: Path) -> Mapping[str, Any]:
    found = json.loads((folder / "config.json").read_text("utf-8")).get("text_config")
    return found if isinstance(found, dict) else {}


def _copy_shard(source: Path, target: Path) -> list[str]:
    """Write the language model's tensors of a shard, if it has any; their new names."""
    held = {
        prefix_new + name.removeprefix(prefix): about
        for name, about in tensors(source).items()
        for prefix, prefix_new in _PREFIXES.items()
        if name.startswith(prefix)
    }
    if not held:
        return []
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, about in held.items():
        start, size = end, about["data_offsets"][1] - about["data_offsets"][0]
        end = start + size
        header[name] = {**about, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin aligned
    with source.open("rb") as reading, target.open("wb") as writing:
        first = 8 + struct.unpack("<Q", reading.read(8))[0]
        writing.write(struct.pack("<Q", len(text)) + text)
        for about in held.values():
            start, stop = about["data_offsets"]
            reading.seek(first + start)
            _copy_bytes(reading, writing, stop - start)
    return list(held)


def _copy_bytes(reading: BinaryIO, writing: BinaryIO, count: int) -> None:
    while count > 0:
        piece = reading.read(min(count, _PIECE))
        writing.write(piece)
        count -= len(piece)
