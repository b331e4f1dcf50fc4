"""What stands in a model for layers that have no kernel without contents, and takes what they take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from training.memory import Ledger

FUSED = "reckoned"
"""The name of `fused_attention` in transformers' register."""

NF4_BLOCK = 64
"""Weights that share a float32 scale in bitsandbytes' NF4."""


def pack(model: Any, ledger: Ledger) -> None:
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


def fused_attention(
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
