"""A base with its linear layers in NF4, and a LoRA adapter on it (QLoRA, https://arxiv.org/abs/2305.14314).

Call `training.base.stay_offline` before importing this: it loads transformers, peft and bitsandbytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from training.label_loss import label_loss
from training.recipe import Recipe
from training.tensors import IGNORED, Example, padded


class Adapted:
    """The base and its adapter, ready to be trained.

    The adapter is computed in the compute type; `masters` are its float32 originals, which the optimizer
    moves: in bfloat16 alone its small steps would be rounded away.
    """

    def __init__(self, base: Path, recipe: Recipe, dtype: torch.dtype) -> None:
        frozen = _load_nf4(base, dtype)
        if recipe.frozen_weights == "dequantized":
            _dequantize(frozen, dtype)
        adapter = LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            lora_dropout=recipe.dropout,
            target_modules=recipe.targets,
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(recipe.seed)  # the adapter begins random
        self.model: PeftModel = get_peft_model(frozen, adapter)
        self.model.train()
        self._computed = [each for each in self.model.parameters() if each.requires_grad]
        self.masters = [each.detach().float().clone().requires_grad_() for each in self._computed]
        for each in self._computed:
            each.data = each.data.to(dtype)

    def loss(self, group: list[Example]) -> torch.Tensor:
        """The weighted sum of the cross-entropies of a microbatch, in nats."""
        ids, labels, weights = padded(group)
        causal = self.model.get_base_model()
        hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state
        learned = labels != IGNORED
        return label_loss(
            hidden[learned],
            causal.get_output_embeddings().weight,
            labels[learned],
            weights[:, None].expand_as(labels)[learned],
        )

    def hand_over_gradients(self) -> None:
        """Move the gradients to the masters, where the optimizer looks for them."""
        for computed, master in zip(self._computed, self.masters, strict=True):
            master.grad = None if computed.grad is None else computed.grad.float()
            computed.grad = None

    @torch.no_grad()
    def take_over_masters(self) -> None:
        """Compute with what the masters are now."""
        for computed, master in zip(self._computed, self.masters, strict=True):
            computed.copy_(master)

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Write the adapter, in float32, as peft does: adapter_model.safetensors, adapter_config.json."""
        for computed, master in zip(self._computed, self.masters, strict=True):
            computed.data = master.detach()
        self.model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # a template, with nothing filled in


def _load_nf4(base: Path, dtype: torch.dtype) -> Any:
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=nf4, attn_implementation="sdpa", device_map="cpu"
    )
    for each in linear4bits(model):
        # Or a forward under eval() repacks the weights for AVX512-BF16, and train() never unpacks them.
        each.support_avx512bf16_for_cpu = False
    return model


def _dequantize(model: Any, dtype: torch.dtype) -> None:
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
