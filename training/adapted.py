"""A base and what is trained of it: a LoRA adapter on NF4 or plain weights, or every weight.

Call `training.base.stay_offline` before importing this: it loads transformers, peft and bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from training.hardware import Applied, Hardware, applied
from training.label_loss import label_loss
from training.microbatch import Microbatch, masks, packed, padded
from training.qlora import dequantize, load_nf4
from training.recipe import Recipe
from training.sharding import Divided, divided, whole
from training.tensors import Example


def load(base: Path, recipe: Recipe, dtype: torch.dtype, hardware: Hardware) -> Adapted:
    """The base from its folder, as the recipe's method wants it, ready to be trained.

    With `sharding: fsdp` every process of the group must call this; each has the whole base in the main
    memory while it loads, and no more than its part and a layer on its GPU.

    Raises:
        HardwareError: if the recipe asks for what this machine does not have.
    """
    config = AutoConfig.from_pretrained(base)
    shared = recipe.sharding == "fsdp"
    device = torch.device("cpu") if shared else hardware.device
    run_as = applied(recipe, hardware, capped_attention=caps_attention(config))
    if recipe.method == "qlora":
        model = load_nf4(base, dtype, run_as.attention, device)
        if recipe.frozen_weights == "dequantized":
            dequantize(model, dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, attn_implementation=run_as.attention, device_map=str(device)
        )
    adapted = Adapted(model, recipe, dtype, run_as)
    if shared:
        adapted.divide(hardware.device)
    return adapted


def caps_attention(config: Any) -> bool:
    """Whether a model caps its attention scores, as Gemma 2 does."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


class Adapted:
    """A model and what is trained of it.

    What is trained is computed in the compute type; `masters` are its float32 originals, which the optimizer
    moves: in bfloat16 alone its small steps would be rounded away. Where the compute type is float32 they are
    the very same. Where the model is `divided` among processes, both are this process's parts.
    """

    def __init__(self, model: Any, recipe: Recipe, dtype: torch.dtype, run_as: Applied) -> None:
        self.run_as = run_as
        self._divided: Divided | None = None
        self._packing = recipe.packing
        self._dtype = dtype
        torch.manual_seed(recipe.seed)  # the adapter begins random
        if recipe.method != "full":
            adapter = LoraConfig(
                r=recipe.rank,
                lora_alpha=recipe.alpha,
                lora_dropout=recipe.dropout,
                target_modules=recipe.targets,
                task_type="CAUSAL_LM",
            )
            self.model = get_peft_model(model, adapter)
            self._causal = self.model.get_base_model()
        else:
            self.model = self._causal = model
        self.model.train()
        self._computed = [each for each in self.model.parameters() if each.requires_grad]
        if dtype is torch.float32:
            for each in self._computed:
                each.data = each.data.float()
            self.masters: list[torch.Tensor] = list(self._computed)
        else:
            self.masters = [each.detach().float().clone().requires_grad_() for each in self._computed]
            for each in self._computed:
                each.data = each.data.to(dtype)
        self._accelerate(recipe)

    def _accelerate(self, recipe: Recipe) -> None:
        if recipe.gradient_checkpointing:
            # The random state is worth keeping only for dropout.
            options = {"use_reentrant": False, "preserve_rng_state": recipe.dropout > 0}
            self._causal.gradient_checkpointing_enable(options)
        if self.run_as.liger:
            from transformers.integrations.liger import apply_liger_kernel

            apply_liger_kernel(self._causal, {})
        if self.run_as.compile:
            self._causal.model.compile(dynamic=True)

    def divide(self, device: torch.device) -> None:
        """Keep on `device` only this process's part of every weight; all processes must call this."""
        for computed, master in zip(self._computed, self.masters, strict=True):
            computed.data = master.detach()
        self._divided = divided(self._causal, self._loss_of, self._dtype, device)
        self._computed = [each for each in self.model.parameters() if each.requires_grad]
        self.masters = list(self._computed)

    @property
    def divided(self) -> bool:
        """Whether this process has only its part."""
        return self._divided is not None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = self._causal.device
        return device

    def loss(self, group: Sequence[Example]) -> torch.Tensor:
        """The weighted sum of the cross-entropies of a group of examples, in nats."""
        return self.loss_on((packed if self._packing else padded)(group).to(self.device))

    def loss_on(self, microbatch: Microbatch) -> torch.Tensor:
        """The same of a microbatch. A divided model may be asked only this: it gathers what it computes."""
        if self._divided is None:
            return self._loss_of(microbatch)
        loss: torch.Tensor = self._divided(microbatch)
        return loss

    def _loss_of(self, microbatch: Microbatch) -> torch.Tensor:
        return self.loss_at(self.hidden(microbatch), microbatch)

    def hidden(self, microbatch: Microbatch) -> torch.Tensor:
        """The last hidden states at the labels, (labels, width)."""
        config = self._causal.config
        window = getattr(config, "sliding_window", None)
        attention: dict[str, torch.Tensor | None] = {"full_attention": None, "sliding_attention": None}
        if self.run_as.attention != "flash_attention_2":  # which reads the positions, and has windows itself
            dense = self._dtype if self.run_as.attention == "eager" else None
            attention = masks(microbatch, window, dense=dense)
        hidden: torch.Tensor = self._causal.model(
            input_ids=microbatch.ids,
            attention_mask=attention,
            position_ids=microbatch.positions,
            use_cache=False,
        ).last_hidden_state
        return hidden.flatten(0, 1)[microbatch.places]

    def loss_at(self, hidden: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
        """The weighted sum of the cross-entropies at the labels, in nats."""
        return label_loss(
            hidden,
            self._causal.get_output_embeddings().weight,
            microbatch.labels,
            microbatch.weights,
            getattr(self._causal.config, "final_logit_softcapping", None),
        )

    def hand_over_gradients(self) -> None:
        """Move the gradients to the masters, where the optimizer looks for them."""
        for computed, master in zip(self._computed, self.masters, strict=True):
            if master is not computed:
                master.grad = None if computed.grad is None else computed.grad.float()
                computed.grad = None

    def forget_gradients(self) -> None:
        """Let go of every gradient, of the masters and of what is computed."""
        for each in (*self._computed, *self.masters):
            each.grad = None

    @torch.no_grad()
    def take_over_masters(self) -> None:
        """Compute with what the masters are now."""
        for computed, master in zip(self._computed, self.masters, strict=True):
            if master is not computed:
                computed.copy_(master)

    @torch.no_grad()
    def gathered(self, *, keep: bool) -> dict[str, torch.Tensor] | None:
        """What was trained, by name, in one piece; None if it is not divided. All processes must call this.

        Args:
            keep: whether this process is the one that saves; the others get nothing.
        """
        if not self.divided:
            return None
        dtype = torch.bfloat16 if self.model is self._causal else torch.float32
        found: dict[str, torch.Tensor] = {}
        for name, each in self.model.named_parameters():
            if each.requires_grad:
                one_piece = whole(each.detach())
                if keep:
                    found[name] = one_piece.to("cpu", dtype)
        return found

    @torch.no_grad()
    def save(self, folder: Path, gathered: dict[str, torch.Tensor] | None = None) -> None:
        """Write what was trained: the adapter as peft does, in float32, or the whole model in bfloat16.

        Args:
            folder: where to.
            gathered: of a divided model, what `gathered` said.
        """
        whole_model = self.model is self._causal
        if gathered is None:
            for computed, master in zip(self._computed, self.masters, strict=True):
                computed.data = master.detach()
            if whole_model:
                self.model.to(torch.bfloat16)
        self.model.save_pretrained(folder, state_dict=gathered)
        if gathered is not None and whole_model:  # or the configuration would tell of the parts' type
            self.model.config.dtype = torch.bfloat16
            self.model.config.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # a template, with nothing filled in
