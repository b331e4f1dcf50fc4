"""How much memory a training step takes, by part, found without weights and without computing.

The very code that trains is run on tensors that have shapes and no contents (PyTorch's meta device,
https://docs.pytorch.org/docs/stable/meta.html), and every allocation it would make is written down until it
would be let go. So there is no formula to fall behind a model's code; what a kernel allocates inside itself
is not seen, and is in the margin. Only fused attention stands here by what it keeps, as it has no kernel
without contents.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.base import stay_offline
from training.hardware import Applied
from training.microbatch import Microbatch
from training.recipe import Recipe

PARTS = ("weights", "adapter", "optimizer", "activations", "logits", "workspace")
"""`adapter`: what is trained, its float32 originals and gradients. `workspace`: what the backward pass, and
packed weights while they are used, take on top."""

NF4_BLOCK = 64
"""Weights that share a float32 scale in bitsandbytes' NF4."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes at the moment when a step takes most, by part (PARTS)."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Load:
    """A microbatch: so many examples of so many tokens, `learned` of each being labels."""

    examples: int
    length: int
    learned: int


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes that are allocated now, and were at the peak, by the part that was named when they were."""

    def __init__(self, part: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = part
        self.now: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self._most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and write down the storages that it made."""
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor):
                self._note(each.untyped_storage())
        return made

    def begin(self) -> None:
        """Forget the peak so far."""
        self._most = 0
        self._compare()

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now[self.part] += size
        weakref.finalize(storage, self._let_go, key, self.part, size)
        self._compare()

    def _let_go(self, key: int, part: str, size: int) -> None:
        self._known.discard(key)
        self.now[part] -= size

    def _compare(self) -> None:
        total = self.now.total()
        if total > self._most:
            self._most, self.peak = total, dict(self.now)


def step_memory(
    config: Any, recipe: Recipe, load: Load, dtype: torch.dtype, attention: str, *, on_gpu: bool = True
) -> Need:
    """What a step takes that is not the first, in its second microbatch, where gradients are there already.

    Args:
        config: the text model's configuration, of transformers.
        recipe: method, adapter, optimizer and checkpointing are read from it.
        load: the microbatch.
        dtype: the compute type.
        attention: the kind, as transformers names it.
        on_gpu: whether the optimizer works as it does there.
    """
    stay_offline()
    from transformers import AttentionInterface, AutoModelForCausalLM

    from training.adapted import Adapted

    AttentionInterface.register(_FUSED, _fused_attention)
    kind = "eager" if attention == "eager" else _FUSED
    run_as = Applied(attention, liger=False, compile=False, why_not={})
    validated = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)  # it would look at contents
    ledger = Ledger("weights")
    try:
        with torch.device("meta"), ledger:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kind)
            if recipe.method == "qlora" and recipe.frozen_weights == "nf4":
                _pack(model, ledger)
            ledger.part = "adapter"
            adapted = Adapted(model, recipe, dtype, run_as)
            del model
            ledger.part = "optimizer"
            eight_bit = recipe.optimizer == "paged_adamw_8bit"
            optimizer = _Moments(adapted.masters, eight_bit=eight_bit, at_once=on_gpu)
            ledger.part = "adapter"
            for each in adapted.model.parameters():
                if each.requires_grad:
                    each.grad = torch.zeros_like(each)
            ledger.begin()
            ledger.part = "activations"
            microbatch = _microbatch(load)
            hidden = adapted.hidden(microbatch)
            ledger.part = "logits"
            loss = adapted.loss_at(hidden, microbatch)
            ledger.part = "workspace"
            loss.backward()  # type: ignore[no-untyped-call]
            del hidden, loss
            adapted.hand_over_gradients()
            torch.nn.utils.clip_grad_norm_(adapted.masters, recipe.clip_gradient)
            optimizer.step()
    finally:
        torch.distributions.Distribution.set_default_validate_args(validated)
    return Need({part: ledger.peak.get(part, 0) for part in PARTS})


def _microbatch(load: Load) -> Microbatch:
    labels = load.examples * load.learned
    return Microbatch(
        ids=torch.zeros(load.examples, load.length, dtype=torch.long),
        places=torch.zeros(labels, dtype=torch.long),
        labels=torch.zeros(labels, dtype=torch.long),
        weights=torch.ones(labels),
    )


class _Moments:
    """Stands for AdamW: two moments of each parameter, and what it takes on top while it moves them.

    PyTorch's own looks at its step's number, which has no contents here. In float32 a moment takes four
    bytes. bitsandbytes' in 8 bits takes one, and a float32 scale for 256 of each; what it pages out of a
    GPU's memory when it must is reckoned as being in. On a GPU PyTorch moves all parameters at once, and
    takes as much again for it as one moment; on a processor one after the other.
    """

    def __init__(self, masters: list[torch.Tensor], *, eight_bit: bool, at_once: bool) -> None:
        counts = [each.numel() for each in masters]
        if eight_bit:
            self.kept = [torch.empty(2 * count, dtype=torch.uint8) for count in counts]
            self.kept += [torch.empty(2 * -(-count // 256)) for count in counts]
            self._working = 0
        else:
            self.kept = [torch.empty(2 * count) for count in counts]
            self._working = sum(counts) if at_once else 2 * max(counts)

    def step(self) -> None:
        """Move the parameters, in place."""
        torch.empty(self._working)


def _pack(model: Any, ledger: Ledger) -> None:
    """Put layers in place of the linear ones that take what NF4 takes."""
    from training.qlora import KEPT_PLAIN

    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if isinstance(module, torch.nn.Linear) and last not in KEPT_PLAIN:
            setattr(model.get_submodule(parent), last, _PackedLinear(module, ledger))


class _PackedLinear(torch.nn.Linear):
    """A layer of half a byte a weight, unpacked at each use, forwards and backwards, as bitsandbytes does."""

    def __init__(self, plain: torch.nn.Linear, ledger: Ledger) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.register_parameter("bias", None)
        self._dtype, self._ledger = plain.weight.dtype, ledger
        count = plain.weight.numel()
        self.weight = torch.nn.Parameter(torch.empty(count // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.scales = torch.nn.Buffer(torch.empty(-(-count // NF4_BLOCK)))

    def unpacked(self) -> torch.Tensor:
        """The weights in the compute type, as `workspace`."""
        part, self._ledger.part = self._ledger.part, "workspace"
        whole = torch.empty(self.out_features, self.in_features, dtype=self._dtype)
        self._ledger.part = part
        return whole

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The product; nothing but the packed weights is kept for the backward pass."""
        made: torch.Tensor = _PackedProduct.apply(input, self)
        return made


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, read: torch.Tensor, layer: _PackedLinear) -> torch.Tensor:
        ctx.layer = layer
        return read @ layer.unpacked().t()

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> Any:
        return outer @ ctx.layer.unpacked(), None


_FUSED = "reckoned"


def _fused_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA's and FlashAttention's part in a model of transformers: (examples, length, heads, width)."""
    if attention_mask is not None and module.num_key_value_groups > 1:  # as transformers does for SDPA
        key, value = (each.repeat_interleave(module.num_key_value_groups, dim=1) for each in (key, value))
    made: torch.Tensor = _FusedAttention.apply(query, key, value, attention_mask)
    return made.transpose(1, 2).contiguous(), None


class _FusedAttention(torch.autograd.Function):
    """Keeps what goes in and comes out, and a number a row; a mask as numbers of the compute type."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        examples, heads, length, width = query.shape
        out = query.new_empty(examples, length, heads, width).transpose(1, 2)
        rows = query.new_empty(examples, heads, length, dtype=torch.float32)
        added = None if mask is None else query.new_empty(mask.shape)
        ctx.save_for_backward(query, key, value, out, rows, added)
        return out

    @staticmethod
    def backward(ctx: Any, *_outer: torch.Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return *(torch.empty_like(each) for each in (query, key, value)), None
