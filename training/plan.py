"""The plan of a training: which microbatch, and what else, fits the memory that there is.

The step is never changed, only how it is cut: microbatch x accumulation is the recipe's `batch_examples`, so
that what is learned is the same. In this order is given up: a large microbatch, activations that are kept
(checkpointing computes them again, a third more time), and only then the longest examples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from training.base import stay_offline
from training.hardware import check_sharding
from training.memory import Load, Need, step_memory
from training.recipe import CONFIGS, Recipe

MODELS = CONFIGS / "models"
SHORTEST = 256
"""Tokens below which shortening examples is no help: a call with its tools has about a hundred."""
FULL_SPEED_TOKENS = 2048
"""A microbatch keeps a GPU busy from about here; a larger one is not worth computing activations twice."""
CUDA_BYTES = 700 * 2**20
"""What CUDA itself takes in a process that trains: its context with PyTorch's kernels and cuBLAS's workspace,
400 to 600 MiB by card and version, rounded up."""

Progress = Callable[[str], None]


class UnknownModelError(ValueError):
    """There is no such shape; the text lists those that there are."""


@dataclass(frozen=True, slots=True)
class Memory:
    """A device's memory in bytes: all of it, what others hold, and the margin that is left alone."""

    total: int
    in_use: int = 0
    margin: int = 0
    runtime: int = CUDA_BYTES

    @property
    def free(self) -> int:
        """What a step may take."""
        return self.total - self.in_use - self.margin - self.runtime


@dataclass(frozen=True, slots=True)
class Cut:
    """One way to take a step."""

    microbatch_examples: int
    gradient_checkpointing: bool
    max_length: int


@dataclass(slots=True)
class Plan:
    """What was chosen, and what it takes; `cut` is None where nothing fits, and `advice` says what would."""

    model: str
    memory: Memory
    batch_examples: int
    cut: Cut | None
    need: Need
    processes: int = 1
    tried: list[tuple[Cut, int, bool]] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @property
    def accumulation(self) -> int:
        """Microbatches a step, of each process."""
        if self.cut is None:
            return 0
        return -(-self.batch_examples // (self.cut.microbatch_examples * self.processes))

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON: sizes in bytes, `recipe` with the options to set."""
        cut = self.cut
        return {
            "model": self.model,
            "fits": cut is not None,
            "memory": {
                "total": self.memory.total,
                "in_use": self.memory.in_use,
                "margin": self.memory.margin,
                "runtime": self.memory.runtime,
                "free": self.memory.free,
            },
            "need": {**self.need.parts, "total": self.need.total},
            "processes": self.processes,
            "batch_examples": self.batch_examples,
            "microbatch_examples": cut.microbatch_examples if cut else None,
            "accumulation": self.accumulation if cut else None,
            "recipe": None if cut is None else settings(cut),
            "tried": [
                {
                    "microbatch_examples": each.microbatch_examples,
                    "gradient_checkpointing": each.gradient_checkpointing,
                    "max_length": each.max_length,
                    "bytes": size,
                    "fits": fits,
                }
                for each, size, fits in self.tried
            ],
            "advice": self.advice,
        }


def settings(cut: Cut) -> dict[str, Any]:
    """The recipe's options that take a step so."""
    return {
        "microbatch_tokens": cut.microbatch_examples * cut.max_length,
        "gradient_checkpointing": cut.gradient_checkpointing,
        "max_length": cut.max_length,
    }


def shape(model: str, folder: Path | None = None) -> Any:
    """The configuration of a model's text part: of `configs/models`, or of a local folder's config.json.

    Raises:
        UnknownModelError: if there is none of that name.
        ValueError: if the file is not a configuration that transformers knows.
    """
    file = folder / "config.json" if folder else MODELS / f"{model}.json"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in MODELS.glob("*.json")))
        raise UnknownModelError(f"there is no {file}; name one of {known}, or a folder with a config.json")
    stay_offline()
    from transformers import AutoConfig

    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is not a model's configuration: {error}") from error
    return config.get_text_config()


def make(
    config: Any,
    recipe: Recipe,
    memory: Memory,
    attention: str,
    said: Progress = lambda _: None,
    *,
    processes: int = 1,
) -> Plan:
    """Choose how to take the recipe's step within `memory`.

    Args:
        config: the text model's configuration.
        recipe: `batch_examples` and `max_length` are what is wanted.
        memory: of the device, of each where they are several.
        attention: the kind, as transformers names it.
        said: told what is being tried.
        processes: that share the step's microbatches, and with `sharding: fsdp` the model, one a device.

    Raises:
        HardwareError: if so many processes cannot train by this recipe.
    """
    check_sharding(recipe, processes)
    wanted = Cut(-(-recipe.batch_examples // processes), recipe.gradient_checkpointing, recipe.max_length)
    trials = _Trials(config, recipe, attention, memory.free, said, processes)
    chosen = _chosen(trials, wanted)
    if chosen is None:
        least = Cut(1, True, min(wanted.max_length, SHORTEST))
        need = trials.need(least)
        advice = _advice(recipe, memory, need, least)
        return Plan(recipe.model, memory, recipe.batch_examples, None, need, processes, trials.tried, advice)
    advice = []
    if chosen.max_length < recipe.max_length:
        advice.append(
            f"examples longer than {chosen.max_length} tokens are left out; with"
            f" {_gib(trials.need(Cut(1, True, recipe.max_length)).total - memory.free)} more, none"
        )
    need = trials.need(chosen)
    return Plan(recipe.model, memory, recipe.batch_examples, chosen, need, processes, trials.tried, advice)


class _Trials:
    """What cuts take, each found once; `tried` in the order of asking."""

    def __init__(
        self, config: Any, recipe: Recipe, attention: str, free: int, said: Progress, processes: int
    ) -> None:
        self._config, self._recipe, self._attention = config, recipe, attention
        self._free, self._said, self._processes = free, said, processes
        self._found: dict[Cut, Need] = {}
        self.tried: list[tuple[Cut, int, bool]] = []

    def need(self, cut: Cut) -> Need:
        """What a step takes that is cut so. Every token is reckoned as learned: the most it can be."""
        if cut not in self._found:
            self._said(
                f"{cut.microbatch_examples} x {cut.max_length} tokens,"
                f" checkpointing {'on' if cut.gradient_checkpointing else 'off'}"
            )
            recipe = self._recipe.model_copy(update={"gradient_checkpointing": cut.gradient_checkpointing})
            load = Load(cut.microbatch_examples, cut.max_length, cut.max_length - 1)
            dtype = torch.float32 if recipe.compute_dtype == "float32" else torch.bfloat16
            need = step_memory(self._config, recipe, load, dtype, self._attention, processes=self._processes)
            self._found[cut] = need
            self.tried.append((cut, need.total, need.total <= self._free))
        return self._found[cut]

    def fits(self, cut: Cut) -> bool:
        """Whether a step that is cut so fits."""
        return self.need(cut).total <= self._free

    def largest(self, batch: int, checkpointing: bool, length: int) -> Cut | None:
        """The largest microbatch that fits, of those that divide the batch by two again and again.

        What a step takes grows by the same for each example: two measurements say which to look at.
        """
        one = Cut(1, checkpointing, length)
        if not self.fits(one):
            return None
        sizes = list(_halves(batch))
        if len(sizes) == 1:
            return one
        two = Cut(2, checkpointing, length)
        each = max(1, self.need(two).total - self.need(one).total)
        room = 1 + (self._free - self.need(one).total) // each
        for size in sizes:
            if size <= room and self.fits(Cut(size, checkpointing, length)):
                return Cut(size, checkpointing, length)
        return one


def _halves(batch: int) -> Iterator[int]:
    """`batch`, and its halves rounded up, down to 1."""
    while batch > 1:
        yield batch
        batch = -(-batch // 2)
    yield 1


def _chosen(trials: _Trials, wanted: Cut) -> Cut | None:
    length = wanted.max_length
    while True:
        kept = None
        if not wanted.gradient_checkpointing:
            kept = trials.largest(wanted.microbatch_examples, False, length)
            enough = min(wanted.microbatch_examples * length, FULL_SPEED_TOKENS)
            if kept is not None and kept.microbatch_examples * length >= enough:
                return kept
        again = trials.largest(wanted.microbatch_examples, True, length)
        if again is not None and (kept is None or again.microbatch_examples > kept.microbatch_examples):
            return again
        if kept is not None:
            return kept
        if length <= SHORTEST:
            return None
        length = max(SHORTEST, length // 2)


def _advice(recipe: Recipe, memory: Memory, need: Need, least: Cut) -> list[str]:
    """What would fit, where nothing does."""
    said = [
        f"one example of {least.max_length} tokens with checkpointing takes {_gib(need.total)}, of which"
        f" {_gib(need.parts['weights'])} are weights; {_gib(max(0, memory.free))} are free:"
        f" {_gib(need.total - memory.free)} more would do"
    ]
    if memory.in_use:
        said.append(f"another process holds {_gib(memory.in_use)}: end it, or wait for it")
    if recipe.method == "full":
        said.append("method: lora trains an adapter, and needs no gradients and moments of every weight")
    if recipe.method == "lora" or (recipe.method == "qlora" and recipe.frozen_weights == "dequantized"):
        said.append("method: qlora with frozen_weights: nf4 takes a quarter of the linear layers' memory")
    if recipe.optimizer == "adamw" and recipe.method == "full" and recipe.sharding == "none":
        said.append("optimizer: paged_adamw_8bit takes a quarter of the moments' memory")
    if recipe.sharding == "none":
        said.append("sharding: fsdp divides the model among several such GPUs; --processes 2 says what fits")
    smaller = [path.stem for path in MODELS.glob("*.json") if path.stem != recipe.model]
    said.append(f"or a smaller model: there are shapes of {', '.join(sorted(smaller))}")
    return said


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
