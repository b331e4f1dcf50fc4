"""The steps of a fine-tuning: gradients of microbatches, added up, and one move of the optimizer.

The loss is weighted by learned tokens over the whole step. However a step is cut into microbatches, and
however many processes share them, it is the same step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING, Any

import psutil
import torch

from training import lease
from training.checkpoint import Checkpoint, History
from training.microbatch import grouped
from training.recipe import Recipe
from training.tensors import Example, plan_steps
from training.watching import Progress, unwatched
from training.world import World

if TYPE_CHECKING:
    from training.adapted import Adapted


class LossNotFiniteError(RuntimeError):
    """Training diverged."""


class TooLittleMemoryError(RuntimeError):
    """Not even one example at a time fits."""


class StartAgainError(RuntimeError):
    """Memory ran out where the other processes could not be told; started again they cut steps finer."""


def train_adapter(
    adapted: Adapted,
    examples: Sequence[Example],
    options: Recipe,
    checkpoint: Checkpoint,
    progress: Progress = unwatched,
    world: World | None = None,
) -> History:
    """Take every step of the plan that `checkpoint` has not taken yet; return the history of all.

    Where memory runs out the microbatch is halved, for good, and the same step is taken in more parts; of a
    divided model, when it is started again.

    Raises:
        LossNotFiniteError: if the loss is no longer a number.
        TooLittleMemoryError: if memory runs out at one example a microbatch.
        StartAgainError: if it runs out while a divided model computes.
        LeaseLostError: if the GPU was lent to us, and is not any more; what was learned is kept.
    """
    world = world or World()
    steps = plan_steps(
        examples,
        epochs=options.epochs,
        batch_examples=options.batch_examples,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )
    optimizer = optimizer_of(adapted, options)
    history = checkpoint.restore(adapted, optimizer)
    history.microbatch_tokens = history.microbatch_tokens or options.microbatch_tokens
    progress(len(history.lines), len(steps))
    for number in range(len(history.lines), len(steps)):
        if _lease_over(adapted, world):
            checkpoint.save(adapted, optimizer, history, world)
            raise lease.LeaseLostError(
                f"serving has taken the GPU back after step {number} of {len(steps)}; start the training"
                " again: it goes on from there"
            )
        began = monotonic()
        batch = [examples[index] for index in steps[number]]
        rate = learning_rate(number, len(steps), options)
        for group in optimizer.param_groups:
            group["lr"] = rate
        try:
            loss = _step(adapted, optimizer, batch, options, history, world)
        except StartAgainError:
            checkpoint.cut_finer(history)
            raise
        tokens, seconds = sum(map(len, batch)), monotonic() - began
        history.tokens += tokens
        history.seconds += seconds
        history.lines.append(
            {
                "step": number + 1,
                "loss": round(loss, 6),
                "lr": rate,
                "tokens_per_s": round(tokens / seconds, 1),
                "memory_gb": round(psutil.Process().memory_info().rss / 1e9, 3),
                "microbatch_tokens": history.microbatch_tokens,
            }
        )
        if (number + 1) % options.checkpoint_steps == 0:
            checkpoint.save(adapted, optimizer, history, world)
        progress(number + 1, len(steps))
    return history


def _lease_over(adapted: Adapted, world: World) -> bool:
    """Whether the GPU was lent, and is not any more, for any of the processes: all stop at the same step."""
    return lease.ours() is not None and world.total(float(lease.over()), adapted.device) > 0


def optimizer_of(adapted: Adapted, options: Recipe) -> torch.optim.Optimizer:
    """The optimizer of what is trained."""
    kind: Any = torch.optim.AdamW
    if options.optimizer == "paged_adamw_8bit":
        import bitsandbytes

        kind = bitsandbytes.optim.PagedAdamW8bit
    made: torch.optim.Optimizer = kind(
        adapted.masters,
        lr=options.learning_rate,
        betas=(0.9, options.adam_beta2),
        weight_decay=options.weight_decay,
    )
    return made


def _step(
    adapted: Adapted,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Example],
    options: Recipe,
    history: History,
    world: World,
) -> float:
    """One step of the optimizer; the mean loss before it, in nats a learned token."""
    loss = _gradients_that_fit(adapted, batch, options, history, world)
    if not math.isfinite(loss):
        raise LossNotFiniteError(f"the loss is {loss}; lower learning_rate in the recipe")
    if not adapted.divided:  # whose gradients were added up on their way
        world.add(_every_gradient(adapted, world))
    torch.nn.utils.clip_grad_norm_(adapted.masters, options.clip_gradient)
    optimizer.step()
    adapted.forget_gradients()
    adapted.take_over_masters()
    return loss


def _every_gradient(adapted: Adapted, world: World) -> list[torch.Tensor]:
    """The gradients; zeros where a process had no part of the step, as all must add up as many."""
    if world.size > 1:
        for each in adapted.masters:
            if each.grad is None:
                each.grad = torch.zeros_like(each)
    return [each.grad for each in adapted.masters if each.grad is not None]


def _gradients_that_fit(
    adapted: Adapted, batch: Sequence[Example], options: Recipe, history: History, world: World
) -> float:
    """Leave the gradients of the whole step in the masters, whatever microbatch it takes; its loss."""
    random = torch.get_rng_state()
    while True:
        groups = grouped(batch, history.microbatch_tokens, packing=options.packing)
        shared = world.share(_as_many_for_each(groups, world) if adapted.divided else groups)
        part = _gradients(adapted, shared, sum(one.weight * one.learned for one in batch))
        if not adapted.divided:
            part.failed = world.total(part.failed, adapted.device)
        if not part.failed:
            return world.total(part.loss, adapted.device)
        adapted.forget_gradients()
        torch.set_rng_state(random)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what is left in pieces of the former size is of no use
        smaller = _halved(batch, groups, history.microbatch_tokens, options)
        history.halved.append(
            {"step": len(history.lines) + 1, "from_tokens": history.microbatch_tokens, "to_tokens": smaller}
        )
        history.microbatch_tokens = smaller
        if adapted.divided:
            raise StartAgainError(
                f"memory ran out in process {world.rank} of {world.size}, while the others waited for its"
                " part of a layer. Start them again (accelerate launch --max_restarts does): they go on"
                f" from the last checkpoint, with microbatches of {smaller} tokens"
            )


def _as_many_for_each(groups: Sequence[Sequence[Example]], world: World) -> list[Sequence[Example]]:
    """`groups`, and ones that weigh nothing, so that each process has as many.

    A divided layer computes where all processes compute it.
    """
    shortest = min((one for group in groups for one in group), key=len)
    return [*groups, *[[replace(shortest, weight=0.0)]] * (-len(groups) % world.size)]


@dataclass(slots=True)
class _Part:
    """What a process had of a step; `failed` is not 0 where memory ran out."""

    loss: float
    failed: float = 0.0


def _gradients(adapted: Adapted, groups: Sequence[Sequence[Example]], weight: float) -> _Part:
    """Add the gradients of `groups` up. The failed allocation's frames are let go before it returns."""
    loss = 0.0
    try:
        for group in groups:
            part = adapted.loss(group) / weight
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        adapted.hand_over_gradients()
    except (MemoryError, RuntimeError) as error:
        if not memory_ran_out(error):
            raise
        return _Part(0.0, failed=1.0)
    return _Part(loss)


def memory_ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, the GPU's, or that of PyTorch's CPU allocator.

    The last is a plain RuntimeError, known by its text (c10/core/impl/alloc_cpu.cpp).
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def _halved(
    batch: Sequence[Example], groups: Sequence[Sequence[Example]], tokens: int, options: Recipe
) -> int:
    """Half of `tokens`, and again half until that makes other groups."""
    if all(len(group) == 1 for group in groups):
        longest = max(map(len, batch))
        raise TooLittleMemoryError(
            f"memory ran out at one example a microbatch, the longest of {longest} tokens; set"
            f" gradient_checkpointing: true or a lower max_length (now {options.max_length}) in the recipe."
            " `python -m training plan` says what fits"
        )
    while True:
        tokens = max(1, tokens // 2)
        if len(grouped(batch, tokens, packing=options.packing)) > len(groups):
            return tokens


def learning_rate(step: int, steps: int, options: Recipe) -> float:
    """The learning rate of step `step` (from 0) of `steps`: a linear rise, then half a cosine down."""
    rising = max(1, round(options.warmup_share * steps))
    if step < rising:
        return options.learning_rate * (step + 1) / rising
    low = options.final_learning_rate_share
    falling = 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
    return options.learning_rate * (low + (1 - low) * falling)
