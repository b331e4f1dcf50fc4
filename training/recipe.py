"""The options of a fine-tuning: one flat YAML file, checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

CONFIGS = Path(__file__).parent / "configs"
DEFAULT = CONFIGS / "gemma3-270m.yaml"


class Recipe(BaseModel):
    """What `configs/*.yaml` may say; each option's trade-off is beside it in `configs/gemma3-270m.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(pattern=r"^[a-z0-9.-]{1,64}$")
    method: Literal["qlora", "lora", "full"]
    seed: int = Field(ge=0)
    rank: int = Field(ge=1, le=512)
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    targets: list[str] = Field(min_length=1)
    learning_rate: float = Field(gt=0)
    warmup_share: float = Field(ge=0, le=1)
    final_learning_rate_share: float = Field(ge=0, le=1)
    weight_decay: float = Field(ge=0)
    adam_beta2: float = Field(gt=0, lt=1)
    clip_gradient: float = Field(gt=0)
    optimizer: Literal["adamw", "paged_adamw_8bit"]
    epochs: int = Field(ge=1)
    max_tokens: int = Field(ge=1)
    max_length: int = Field(ge=8)
    batch_examples: int = Field(ge=1)
    microbatch_tokens: int = Field(ge=1)
    packing: bool
    gradient_checkpointing: bool
    compute_dtype: Literal["auto", "bfloat16", "float32"]
    frozen_weights: Literal["dequantized", "nf4"]
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"]
    liger: bool
    compile: bool
    sharding: Literal["none", "fsdp"]
    checkpoint_steps: int = Field(ge=1)


def read(path: Path = DEFAULT) -> Recipe:
    """The recipe in a YAML file.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is not a mapping, or an option is missing, unknown or out of range.
    """
    value: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a list of `option: value` lines")
    return Recipe.model_validate(value)
