"""Fine-tune: train a LoRA adapter on the untouched base, from `dataset/train.jsonl` to `adapter/`.

It goes on from its last checkpoint after a kill, and the result is then the same as without one; the same
inputs, options and processor give the same adapter.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import psutil
import torch
import yaml

from training import cycle, recipe
from training.base import hugging_face_folder, stay_offline
from training.compute import compute_dtype
from training.recipe import Recipe
from training.tensors import Example, check_end_of_turn, microbatches, plan_steps, read_examples

if TYPE_CHECKING:
    from training.qlora import Adapted

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
Progress = Callable[[int, int], None]


def _unwatched(_done: int, _total: int) -> None:
    """The progress that nobody looks at."""


class LossNotFiniteError(RuntimeError):
    """Training diverged."""


class NothingToTrainError(ValueError):
    """There is no example in the training set that fits."""


@dataclass(slots=True)
class History:
    """What was written of each step so far, in order: the lines of `training.jsonl`."""

    lines: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


def run(
    directory: Path,
    base_gguf: Path,
    state_dir: Path,
    recipe_file: Path = recipe.DEFAULT,
    progress: Progress = _unwatched,
) -> dict[str, Any]:
    """Write `<cycle>/adapter/`, unless it is there of the same inputs; return what finetune.json holds.

    Args:
        directory: the cycle, with `dataset/train.jsonl`.
        base_gguf: the untouched base; every cycle begins with it.
        state_dir: where the base, converted for transformers (`cache/hf`), and the type that this processor
            computes fastest (`cache/compute.json`) are kept.
        recipe_file: the options.
        progress: told after each step how many of how many are done.

    Raises:
        FileNotFoundError: if the training set, the base or the recipe is not there.
        MaskedEndOfTurnError: if an example does not teach where to stop.
        NothingToTrainError: if no example is short enough.
        LossNotFiniteError: if the loss is no longer a number.
    """
    options = recipe.read(recipe_file)
    train = directory / "dataset" / "train.jsonl"
    inputs = cycle.inputs_of({"train.jsonl": train, "base": base_gguf}, options.model_dump())
    output = directory / "adapter"
    if cycle.done(output / "finetune.json", inputs, [output / "adapter_model.safetensors"]):
        return cycle.read_json(output / "finetune.json")
    stay_offline()
    from training.qlora import Adapted

    with cycle.step(directory, "finetune", seed=options.seed, packages=PACKAGES, outputs=["adapter"]):
        base = hugging_face_folder(base_gguf, state_dir)
        examples, too_long = _examples(train, base, options)
        checkpoint = Checkpoint.open(directory / "adapter.partial", inputs, options, state_dir)
        adapted = Adapted(base, options, compute_dtype(checkpoint.dtype, state_dir))
        history = train_adapter(adapted, examples, options, checkpoint, progress)
        resolved = options.model_dump() | {"compute_dtype": checkpoint.dtype}
        with cycle.new_directory(output) as building:
            adapted.save(building)
            _write_lines(building / "training.jsonl", history.lines)
            (building / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")
            found = {
                "inputs": inputs,
                "config": resolved,
                "examples": len(examples),
                "examples_too_long": too_long,
                **_summary(history),
                "threads": torch.get_num_threads(),
                "seed": options.seed,
                "versions": {name: version(name) for name in PACKAGES},
            }
            cycle.write_json(building / "finetune.json", found)
        shutil.rmtree(checkpoint.folder)
    return found


def _examples(train: Path, base: Path, options: Recipe) -> tuple[list[Example], int]:
    """The examples that are not too long, checked, and the number of those that are."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    every = read_examples(train, tokenizer)
    check_end_of_turn(every, tokenizer)
    examples = [one for one in every if len(one) <= options.max_length]
    if not examples:
        raise NothingToTrainError(
            f"{train} has {len(every)} examples, none within max_length ({options.max_length} tokens)"
        )
    return examples, len(every) - len(examples)


def train_adapter(
    adapted: Adapted,
    examples: Sequence[Example],
    options: Recipe,
    checkpoint: Checkpoint,
    progress: Progress = _unwatched,
) -> History:
    """Take every step of the plan that `checkpoint` has not taken yet; return the history of all."""
    steps = plan_steps(
        examples,
        epochs=options.epochs,
        batch_examples=options.batch_examples,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )
    optimizer = torch.optim.AdamW(
        adapted.masters,
        lr=options.learning_rate,
        betas=(0.9, options.adam_beta2),
        weight_decay=options.weight_decay,
    )
    history = checkpoint.restore(adapted, optimizer)
    progress(len(history.lines), len(steps))
    for number in range(len(history.lines), len(steps)):
        began = monotonic()
        batch = [examples[index] for index in steps[number]]
        rate = learning_rate(number, len(steps), options)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _step(adapted, optimizer, batch, options)
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
            }
        )
        if (number + 1) % options.checkpoint_steps == 0:
            checkpoint.save(adapted, optimizer, history)
        progress(number + 1, len(steps))
    return history


def _step(
    adapted: Adapted, optimizer: torch.optim.Optimizer, batch: Sequence[Example], options: Recipe
) -> float:
    """One step of the optimizer; the mean loss before it, in nats a learned token."""
    weight = sum(one.weight * one.learned for one in batch)
    loss = 0.0
    for group in microbatches(batch, options.microbatch_tokens):
        part = adapted.loss(group) / weight
        part.backward()  # type: ignore[no-untyped-call]
        loss += part.item()
    if not math.isfinite(loss):
        raise LossNotFiniteError(f"the loss is {loss}; lower learning_rate in the recipe")
    adapted.hand_over_gradients()
    torch.nn.utils.clip_grad_norm_(adapted.masters, options.clip_gradient)
    optimizer.step()
    adapted.take_over_masters()
    return loss


def learning_rate(step: int, steps: int, options: Recipe) -> float:
    """The learning rate of step `step` (from 0) of `steps`: a linear rise, then half a cosine down."""
    rising = max(1, round(options.warmup_share * steps))
    if step < rising:
        return options.learning_rate * (step + 1) / rising
    low = options.final_learning_rate_share
    falling = 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
    return options.learning_rate * (low + (1 - low) * falling)


@dataclass(slots=True)
class Checkpoint:
    """The folder `adapter.partial/`: how far an unfinished training has come."""

    folder: Path
    dtype: str

    @classmethod
    def open(cls, folder: Path, inputs: dict[str, Any], options: Recipe, state_dir: Path) -> Checkpoint:
        """The checkpoint of a training of these inputs; one of any others is thrown away."""
        record = folder / "checkpoint.json"
        if not cycle.done(record, inputs):
            shutil.rmtree(folder, ignore_errors=True)
            dtype = str(compute_dtype(options.compute_dtype, state_dir)).removeprefix("torch.")
            cycle.write_json(record, {"inputs": inputs, "compute_dtype": dtype})
        checkpoint = cls(folder, cycle.read_json(record)["compute_dtype"])
        cycle.discard_unfinished(checkpoint._state)
        return checkpoint

    @property
    def _state(self) -> Path:
        return self.folder / "state.pt"

    def save(self, adapted: Adapted, optimizer: torch.optim.Optimizer, history: History) -> None:
        """Keep all that the next step depends on."""
        state = {
            "masters": [each.detach() for each in adapted.masters],
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "history": json.dumps([history.lines, history.tokens, history.seconds]),
        }
        with cycle.new_file(self._state) as building:
            torch.save(state, building)

    def restore(self, adapted: Adapted, optimizer: torch.optim.Optimizer) -> History:
        """Set adapter, optimizer and random numbers to what was kept, if anything was."""
        if not self._state.is_file():
            return History()
        state = torch.load(self._state, weights_only=True)
        with torch.no_grad():
            for master, kept in zip(adapted.masters, state["masters"], strict=True):
                master.copy_(kept)
        adapted.take_over_masters()
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        return History(*json.loads(state["history"]))


def _summary(history: History) -> dict[str, Any]:
    return {
        "steps": len(history.lines),
        "loss_first": history.lines[0]["loss"],
        "loss_last": history.lines[-1]["loss"],
        "tokens": history.tokens,
        "tokens_per_s": round(history.tokens / history.seconds, 1),
        "seconds": round(history.seconds, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
    }


def _write_lines(path: Path, lines: Sequence[dict[str, float]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
