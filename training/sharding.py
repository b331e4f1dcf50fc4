"""A model divided among the processes that train it (FSDP2, https://arxiv.org/abs/2304.11277).

Each process keeps a part of every weight, of its gradient and of its moments. A layer is gathered while it
computes, forwards and backwards, and let go; the embeddings, which the loss needs too, stay for a microbatch.
What is trained is kept in float32, and gathered in the compute type.

Scales of packed weights are not divided: each process holds those of the whole model, an eighth of
what the packed weights are.

Call `training.base.stay_offline` before importing this: it loads bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from training.microbatch import Microbatch

Loss = Callable[[Microbatch], torch.Tensor]


class Divided(torch.nn.Module):
    """A causal model with its loss: what is gathered for the one is there for the other."""

    def __init__(self, causal: Any, loss: Loss) -> None:
        super().__init__()
        self.causal = causal
        self._loss = loss

    def forward(self, microbatch: Microbatch) -> torch.Tensor:
        """The loss of a microbatch, in nats."""
        return self._loss(microbatch)


def parts(causal: Any) -> list[torch.nn.Module]:
    """What is gathered one after the other: the layers, and embeddings beside those of words (Gemma 3n)."""
    words = causal.get_input_embeddings()
    beside = [each for each in causal.modules() if isinstance(each, torch.nn.Embedding) and each is not words]
    return [*causal.model.layers, *beside]


def divided(causal: Any, loss: Loss, dtype: torch.dtype, device: torch.device) -> Divided:
    """Divide a model among all processes of the group, in place; all must call this.

    Args:
        causal: a model of transformers, the same in each process, with what is trained in float32.
        loss: computes with it.
        dtype: the compute type.
        device: where the parts are to be; the model may be elsewhere.
    """
    for module in causal.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # A plain tensor of bytes can be divided; the layer finds its scales in itself when it computes.
            module.quant_state = module.weight.quant_state
            module.weight = torch.nn.Parameter(module.weight.data.view(torch.uint8), requires_grad=False)
            module.quant_state.to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    whole = Divided(causal, loss)
    for module in (*parts(causal), whole):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in whole.modules():
        if isinstance(module, FSDPModule):
            # Gradients are added up, not averaged: the loss is weighted over the whole step. Gloo only adds.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return whole


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in one piece, gathered from all processes if it is divided; then all must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, divided as `now` is."""
    if not isinstance(now, DTensor):
        return tensor
    return distribute_tensor(tensor.to(now.device), now.device_mesh, now.placements, src_data_rank=None)


def whole_moments(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state in one piece; all processes must call this."""
    return state | {
        "state": {
            number: {name: whole(value) if torch.is_tensor(value) else value for name, value in each.items()}
            for number, each in state["state"].items()
        }
    }


def part_of_moments(state: dict[str, Any], masters: list[torch.Tensor]) -> dict[str, Any]:
    """This process's part of a whole state of an optimizer that moves `masters`."""

    def part(value: Any, master: torch.Tensor) -> Any:
        same = torch.is_tensor(value) and value.shape == master.shape
        return part_like(value, master) if same else value

    return state | {
        "state": {
            number: {name: part(value, masters[number]) for name, value in each.items()}
            for number, each in state["state"].items()
        }
    }
