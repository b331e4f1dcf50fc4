"""The processes that train together, one a GPU, as `accelerate launch` starts them; mostly it is one.

Each computes a share of a step's microbatches, and the gradients are added up. Each holds the whole model, or
its part of one that is divided among them (`training.sharding`). The loss is weighted over the whole step, so
that any number of processes takes the same steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

Share = TypeVar("Share")


class ProcessLostError(RuntimeError):
    """Another of the processes that train together does not answer any more."""


@dataclass(frozen=True, slots=True)
class World:
    """`rank` of `size` processes; the first writes the files."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> World:
        """The processes that the launcher started, connected (NCCL on GPUs, else Gloo); or this one alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        # Or transformers would give the base's weights to the first process alone, where accelerate's
        # launcher was told to use FSDP, and expect accelerate's own trainer to hand them on.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes)

    @property
    def first(self) -> bool:
        """Whether this process writes the files, and tells."""
        return self.rank == 0

    def share(self, parts: Sequence[Share]) -> list[Share]:
        """What this process computes of `parts`, by turns."""
        return list(parts[self.rank :: self.size])

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes. A thousand small ones travel as one."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([each.flatten() for each in tensors])
        with self._together():
            dist.all_reduce(flat)
        start = 0
        for each in tensors:
            each.copy_(flat[start : start + each.numel()].view_as(each))
            start += each.numel()

    def total(self, value: float, device: torch.device) -> float:
        """The sum of a number over all processes."""
        if self.size == 1:
            return value
        summed = torch.tensor([value], dtype=torch.float64, device=device)
        with self._together():
            dist.all_reduce(summed)
        return float(summed.item())

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            with self._together():
                dist.barrier()

    def leave(self) -> None:
        """Part from the others."""
        if self.size > 1:
            dist.destroy_process_group()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What Gloo and NCCL say of a lost process is the name of a file of theirs."""
        try:
            yield
        except RuntimeError as error:
            raise ProcessLostError(
                f"process {self.rank} of {self.size} lost another that trains with it"
                f" ({type(error).__name__}); that one's own output says why. Start them again: they go on"
                " from the last checkpoint"
            ) from error
