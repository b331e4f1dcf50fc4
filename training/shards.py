"""Is a checkpoint in Hugging Face's form all there? Reads the headers of its safetensors files, no weights.

A download that stopped leaves files that are missing, or cut off: better told by name at once than by a
library in the midst of loading. Format: https://huggingface.co/docs/safetensors (8 bytes of length, a JSON
header, the tensors); which shard holds which tensor is in `model.safetensors.index.json`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_LONGEST_HEADER = 100_000_000  # bytes, the library's own limit


class IncompleteError(ValueError):
    """A file of the checkpoint is missing, cut off or another than it must be; the text names it."""


def check(folder: Path) -> None:
    """Raises IncompleteError unless configuration, tokenizer and every shard are there, each whole."""
    _object(folder / "config.json")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise IncompleteError(f"{folder} has no tokenizer: neither {' nor '.join(TOKENIZERS)} is there")
    if (folder / INDEX).is_file():
        _check_shards(folder)
    elif (folder / SINGLE).is_file():
        tensors(folder / SINGLE)
    else:
        raise IncompleteError(
            f"{folder} has no weights that can be read: neither {INDEX} nor {SINGLE} is there (pickled *.bin"
            " files are not read, as they run what they please)"
        )


def _check_shards(folder: Path) -> None:
    placed = _object(folder / INDEX).get("weight_map")
    if (
        not isinstance(placed, dict)
        or not placed
        or not all(isinstance(each, str) for each in placed.values())
    ):
        raise IncompleteError(f"{folder / INDEX} has no weight_map that says which file holds which tensor")
    shards: dict[str, list[str]] = {}
    for tensor, name in placed.items():
        shards.setdefault(name, []).append(tensor)
    for name, expected in sorted(shards.items()):
        if Path(name).name != name:
            raise IncompleteError(f"{folder / INDEX} names {name!r}; shards must lie beside it")
        if not (folder / name).is_file():
            raise IncompleteError(f"{folder / name} is missing, one of {len(shards)} shards; copy it again")
        held = tensors(folder / name)
        lacking = next((tensor for tensor in expected if tensor not in held), None)
        if lacking is not None:
            raise IncompleteError(f"{folder / name} lacks the tensor {lacking}, which {INDEX} says it holds")


def tensors(path: Path) -> Mapping[str, Any]:
    """What a safetensors file holds, by its header: dtype, shape and data_offsets of each tensor.

    Raises:
        IncompleteError: if the file is not one, or has not the size that its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        text = file.read(length) if 0 < length <= min(size, _LONGEST_HEADER) else b""
    if len(text) < max(length, 1):
        raise IncompleteError(
            f"{path} is cut off in its header ({size} bytes), or no safetensors file; copy it again"
        )
    try:
        header = json.loads(text)
        held = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        end = 8 + length + max(int(tensor["data_offsets"][1]) for tensor in held.values())
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError):
        raise IncompleteError(f"{path} is no safetensors file: its header cannot be read") from None
    if size != end:
        raise IncompleteError(f"{path} has {size} bytes, where its header says {end}; copy it again")
    return held


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IncompleteError(f"{path} is missing; copy it again") from None
    except (ValueError, RecursionError):
        raise IncompleteError(f"{path} is not JSON; copy it again") from None
    if not isinstance(value, dict):
        raise IncompleteError(f"{path} must hold a JSON object")
    return value
