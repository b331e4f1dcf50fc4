"""What this machine computes on, and which of a recipe's accelerations apply to it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from training.recipe import Recipe

FLASH_CAPABILITY = (8, 0)
"""FlashAttention 2 and bfloat16 want Ampere or newer (https://github.com/Dao-AILab/flash-attention)."""


class HardwareError(ValueError):
    """The recipe asks for what this machine does not have; the text says what to change."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """The GPU that training would use, or the processor (`gpu` is empty)."""

    gpu: str
    capability: tuple[int, int]
    packages: frozenset[str]

    @classmethod
    def here(cls, cuda: Any = torch.cuda, installed: Callable[[str], Any] | None = None) -> Hardware:
        """What is in this machine. `cuda` is PyTorch's module, `installed` finds a package."""
        find = installed or importlib.util.find_spec
        packages = frozenset(name for name in ("flash_attn", "liger_kernel", "triton") if find(name))
        if not cuda.is_available():
            return cls("", (0, 0), packages)
        return cls(cuda.get_device_name(), tuple(cuda.get_device_capability()), packages)

    @property
    def device(self) -> torch.device:
        """Where tensors are put."""
        return torch.device("cuda", torch.cuda.current_device()) if self.gpu else torch.device("cpu")

    @property
    def flash(self) -> bool:
        """Whether FlashAttention 2 runs here."""
        return bool(self.gpu) and self.capability >= FLASH_CAPABILITY and "flash_attn" in self.packages


@dataclass(frozen=True, slots=True)
class Applied:
    """How a model will be run: the kind of attention, which accelerations, and why not the others."""

    attention: str
    liger: bool
    compile: bool
    why_not: dict[str, str]


def applied(recipe: Recipe, hardware: Hardware, *, capped_attention: bool) -> Applied:
    """What of the recipe's accelerations applies.

    Args:
        recipe: the options.
        hardware: what there is.
        capped_attention: whether the model caps its attention scores (Gemma 2), which SDPA cannot.

    Raises:
        HardwareError: if the recipe insists on an attention, or an optimizer, that cannot be had here.
    """
    check(recipe, hardware)
    why_not: dict[str, str] = {}
    attention = recipe.attention
    if attention == "auto":
        attention = "eager" if capped_attention else "sdpa"
        if hardware.flash:
            attention = "flash_attention_2"
        else:
            why_not["flash_attention_2"] = _why_no_flash(hardware)
    elif attention == "sdpa" and capped_attention:
        raise HardwareError(
            "attention is sdpa, which cannot cap attention scores as this model does; set it to auto or eager"
        )
    for name, package in (("liger", "liger_kernel"), ("compile", "triton")):
        if getattr(recipe, name) and not hardware.gpu:
            why_not[name] = "there is no GPU"
        elif getattr(recipe, name) and package not in hardware.packages:
            why_not[name] = f"the package {package} is not installed"
    if recipe.compile and recipe.sharding == "fsdp":
        why_not["compile"] = "sharding is fsdp, which gathers layers in the midst of what would be compiled"
    return Applied(
        attention,
        liger=recipe.liger and "liger" not in why_not,
        compile=recipe.compile and "compile" not in why_not,
        why_not=why_not,
    )


def check(recipe: Recipe, hardware: Hardware) -> None:
    """Refuse a recipe that cannot run here, before anything is loaded.

    Raises:
        HardwareError: naming the option, its value and what to set instead.
    """
    if recipe.optimizer == "paged_adamw_8bit" and not hardware.gpu:
        raise HardwareError(
            "optimizer is paged_adamw_8bit, which needs a GPU, and there is none here; set it to adamw"
        )
    if recipe.attention == "flash_attention_2" and not hardware.flash:
        raise HardwareError(f"attention is flash_attention_2, but {_why_no_flash(hardware)}; set it to auto")


def check_sharding(recipe: Recipe, processes: int) -> None:
    """Refuse a recipe that cannot be trained by so many processes.

    Raises:
        HardwareError: naming the option, its value and what to set instead.
    """
    if recipe.sharding == "none":
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            raise HardwareError(
                "accelerate was told to use FSDP, but sharding is none in the recipe; set it to fsdp"
                " (accelerate's own options for FSDP are not read)"
            )
        return
    if processes == 1:
        raise HardwareError(
            "sharding is fsdp, which divides a model among several processes, and there is one; start them"
            " with accelerate launch --multi_gpu --num_processes 2 -m training finetune, or set it to none"
        )
    if recipe.optimizer == "paged_adamw_8bit":
        raise HardwareError(
            "optimizer is paged_adamw_8bit, which cannot move the parts of a divided weight (sharding: fsdp);"
            " set it to adamw, whose moments are divided too"
        )


def _why_no_flash(hardware: Hardware) -> str:
    if not hardware.gpu:
        return "there is no GPU"
    if hardware.capability < FLASH_CAPABILITY:
        return f"{hardware.gpu} is older than Ampere"
    return "the package flash_attn is not installed"
