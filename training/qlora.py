"""The base's linear layers in NF4 (QLoRA, https://arxiv.org/abs/2305.14314): packed, or unpacked once.

Call `training.base.stay_offline` before importing this: it loads transformers and bitsandbytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

KEPT_PLAIN = ["lm_head", "prediction_coefs", "correction_coefs"]
"""Layers that are not packed: the output, and Gemma 3n's AltUp, which clamps the numbers of its weights in
place at each step of a training (transformers' `altup_coef_clip`), and would clamp packed bytes."""


def load_nf4(base: Path, dtype: torch.dtype, attention: str, device: torch.device) -> Any:
    """The base with its linear layers packed in NF4."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=KEPT_PLAIN,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=nf4, attn_implementation=attention, device_map=str(device)
    )
    for each in linear4bits(model):
        # Or a forward under eval() repacks the weights for AVX512-BF16, and train() never unpacks them.
        each.support_avx512bf16_for_cpu = False
    return model


def dequantize(model: Any, dtype: torch.dtype) -> None:
    """Replace each NF4 layer by a plain one with the very values that it stands for."""
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            values = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).to(dtype)
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            plain.weight = torch.nn.Parameter(values, requires_grad=False)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, plain)
    model.hf_quantizer = None
    model.is_quantized = False
    model.is_loaded_in_4bit = False
    del model.config.quantization_config


def linear4bits(model: Any) -> list[Any]:
    """The NF4 layers of a model."""
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
