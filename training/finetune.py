"""Fine-tune: train a LoRA adapter on the untouched base, from `dataset/train.jsonl` to `adapter/`.

It goes on from its last checkpoint after a kill, and the result is then the same as without one; the same
inputs, options and processor give the same adapter.
"""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from training import cycle, recipe
from training.base import hugging_face_folder, stay_offline
from training.checkpoint import Checkpoint, History
from training.compute import compute_dtype
from training.hardware import Applied, Hardware, check, check_sharding
from training.recipe import Recipe
from training.steps import train_adapter
from training.tensors import Example, check_end_of_turn, read_examples
from training.watching import Progress, unwatched
from training.world import World

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
WEIGHTS = {
    "qlora": "adapter_model.safetensors",
    "lora": "adapter_model.safetensors",
    "full": "config.json",
}
"""The file that is there when what was trained is: of a whole model there may be several."""


class NothingToTrainError(ValueError):
    """There is no example in the training set that fits."""


def run(
    directory: Path,
    base_gguf: Path,
    state_dir: Path,
    recipe_file: Path = recipe.DEFAULT,
    progress: Progress = unwatched,
    *,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Write `<cycle>/adapter/`, unless it is there of the same inputs; return what finetune.json holds.

    Args:
        directory: the cycle, with `dataset/train.jsonl`.
        base_gguf: the untouched base; every cycle begins with it.
        state_dir: where the base, converted for transformers (`cache/hf`), and the type that this processor
            computes fastest (`cache/compute.json`) are kept.
        recipe_file: the options.
        progress: told after each step how many of how many are done.
        max_tokens: to read in all, where the recipe allows more: what a short night has time for.

    Raises:
        FileNotFoundError: if the training set, the base or the recipe is not there.
        MaskedEndOfTurnError: if an example does not teach where to stop.
        NothingToTrainError: if no example is short enough.
        HardwareError: if the recipe asks for what this machine does not have, or to divide the model, and
            this process is alone.
        LossNotFiniteError: if the loss is no longer a number.
        TooLittleMemoryError: if memory runs out at one example a microbatch.
        StartAgainError: if it runs out while a divided model computes.
    """
    options = recipe.read(recipe_file)
    if max_tokens is not None:
        options = options.model_copy(update={"max_tokens": min(max_tokens, options.max_tokens)})
    hardware = Hardware.here()
    check(options, hardware)
    train = directory / "dataset" / "train.jsonl"
    inputs = cycle.inputs_of({"train.jsonl": train, "base": base_gguf}, options.model_dump())
    output = directory / "adapter"
    if cycle.done(output / "finetune.json", inputs, [output / WEIGHTS[options.method]]):
        return cycle.read_json(output / "finetune.json")
    stay_offline()
    world = World.join()
    check_sharding(options, world.size)
    step = cycle.step(directory, "finetune", seed=options.seed, packages=PACKAGES, outputs=["adapter"])
    with step if world.first else nullcontext():
        if world.first:
            hugging_face_folder(base_gguf, state_dir)
            Checkpoint.open(directory / "adapter.partial", inputs, options, state_dir)
        world.wait()
        base = hugging_face_folder(base_gguf, state_dir)
        checkpoint = Checkpoint.join(directory / "adapter.partial")
        examples, too_long = _examples(train, base, options)
        from training.adapted import load

        adapted = load(base, options, compute_dtype(checkpoint.dtype, state_dir), hardware)
        history = train_adapter(adapted, examples, options, checkpoint, progress, world)
        gathered = adapted.gathered(keep=world.first)
        world.wait()
        resolved = options.model_dump() | {"compute_dtype": checkpoint.dtype}
        found = {
            "inputs": inputs,
            "config": resolved,
            "examples": len(examples),
            "examples_too_long": too_long,
            **_summary(history),
            **_machine(hardware, adapted.run_as, world),
            "seed": options.seed,
            "versions": {name: version(name) for name in PACKAGES},
        }
        if world.first:
            with cycle.new_directory(output) as building:
                adapted.save(building, gathered)
                _write_lines(building / "training.jsonl", history.lines)
                (building / "config.yaml").write_text(
                    yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8"
                )
                cycle.write_json(building / "finetune.json", found)
            shutil.rmtree(checkpoint.folder)
        world.leave()
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


def _summary(history: History) -> dict[str, Any]:
    return {
        "steps": len(history.lines),
        "loss_first": history.lines[0]["loss"],
        "loss_last": history.lines[-1]["loss"],
        "tokens": history.tokens,
        "tokens_per_s": round(history.tokens / history.seconds, 1),
        "seconds": round(history.seconds, 1),
        "microbatch_tokens": history.microbatch_tokens,
        "out_of_memory": history.halved,
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
    }


def _machine(hardware: Hardware, run_as: Applied, world: World) -> dict[str, Any]:
    """What it ran on, and which accelerations were in use, or why not."""
    found: dict[str, Any] = {
        "device": hardware.gpu or "cpu",
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "attention": run_as.attention,
        "liger": run_as.liger,
        "compile": run_as.compile,
        "not_applied": run_as.why_not,
    }
    if hardware.gpu:
        found["peak_gpu_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return found


def _write_lines(path: Path, lines: Sequence[dict[str, float]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
