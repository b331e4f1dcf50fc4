"""The untouched base as transformers reads it: a folder of Hugging Face's form, given or made of a GGUF.

A GGUF is converted once, and kept by its sha256. What transformers cannot read from one (Gemma 3n) is given
as the folder that it was published as: config.json, tokenizer, and safetensors in one file or in shards.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from training import cycle, shards, text_part

# Read by the libraries when they are imported: nothing is fetched from, or told to, anybody.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "BITSANDBYTES_NOWELCOME": "1",
}


class BaseModelError(ValueError):
    """The base cannot be used; the text says why, and what to do."""


def stay_offline() -> None:
    """Call before transformers, peft or bitsandbytes are imported."""
    os.environ.update(OFFLINE)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def kind(base: Path) -> Literal["gguf", "folder"]:
    """What a base is: a GGUF file, or a folder in Hugging Face's form, complete.

    Raises:
        BaseModelError: if it is neither; the text names the file that is missing or cut off.
    """
    if base.is_dir():
        try:
            shards.check(base)
        except shards.IncompleteError as error:
            raise BaseModelError(f"the base cannot be used: {error}") from None
        return "folder"
    if not base.is_file():
        raise BaseModelError(
            f"there is no base model at {base}; set AGENTLOOP_BASE_GGUF to a GGUF file, or to a folder of"
            " config.json, tokenizer and safetensors"
        )
    return "gguf"


def hugging_face_folder(base: Path, state_dir: Path) -> Path:
    """The base in a folder that `from_pretrained` reads: weights, configuration, tokenizer.

    A folder is itself; of one that also sees and hears, the language model is copied out once. A GGUF is
    converted (to bf16) the first time, which takes half a minute. Both are then found in
    `<state_dir>/cache/hf/<sha256>`. transformers unpacks the quantized weights of a GGUF, but leaves the
    model flagged as quantized: cleared here.

    Raises:
        BaseModelError: if there is no such base, it is incomplete, or transformers cannot read it.
    """
    is_folder = kind(base) == "folder"
    if is_folder and not text_part.is_there(base):
        return base.absolute()
    make = text_part.copy if is_folder else _convert
    folder = state_dir.absolute() / "cache" / "hf" / cycle.sha256(base)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one converts it; who waited finds it done
        if not (folder / "config.json").is_file():
            cycle.discard_unfinished(folder)
            with cycle.new_directory(folder) as building:
                make(base, building)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    stay_offline()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(gguf.parent.absolute()), "gguf_file": gguf.name}
    try:
        with _read_once():
            tokenizer = AutoTokenizer.from_pretrained(**place)
            model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16)
    except (OSError, ValueError, KeyError, RuntimeError, struct.error) as error:
        raise BaseModelError(f"transformers cannot read {gguf}: {error}") from error
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """A GGUF is read for its tokenizer, its configuration and its weights: 12 s of a processor each time."""
    import gguf

    reader = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader
