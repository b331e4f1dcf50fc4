"""One way to train, in a process of its own: `python -m benchmarks.training_contender NAME FOLDER SEED`.

FOLDER holds `setup.json`, `train.jsonl` and `holdout.jsonl`. Prints one JSON line: tokens read a second of
training, peak bytes of the process while it trained, and the loss on what was held out, reckoned by the same
code for each.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from training.base import stay_offline
from training.label_loss import label_loss
from training.microbatch import Microbatch, grouped, padded
from training.recipe import Recipe, read
from training.tensors import Example, read_examples

Run = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Setup:
    """What is the same for all."""

    base: Path
    dtype: torch.dtype
    train: list[Example]
    recipe: Recipe
    scratch: Path


def ours(setup: Setup) -> tuple[Any, Run]:
    """This project's own: `training.steps` with the recipe's settings."""
    from training.adapted import load
    from training.checkpoint import Checkpoint
    from training.hardware import Hardware
    from training.steps import train_adapter

    recipe = setup.recipe.model_copy(update={"checkpoint_steps": 10**6})
    adapted = load(setup.base, recipe, setup.dtype, Hardware.here())
    checkpoint = Checkpoint(setup.scratch, str(setup.dtype))
    return adapted.model, lambda: void(train_adapter(adapted, setup.train, recipe, checkpoint))


def trainer(setup: Setup) -> tuple[Any, Run]:
    """Trainer of transformers on NF4, prepared as peft's documentation says, with logits of every token."""
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=setup.dtype)
    model = loaded(setup, quantization_config=nf4)
    unpack_correctly(model)
    model = get_peft_model(
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False), adapter(setup.recipe)
    )
    arguments = TrainingArguments(**common(setup), remove_unused_columns=False)
    made = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(setup, "labels"),
        data_collator=DataCollatorForSeq2Seq(tokenizer(setup)),
    )
    return model, lambda: void(made.train())


def trl(setup: Setup) -> tuple[Any, Run]:
    """TRL's SFTTrainer at the settings that are fastest here: LoRA on plain weights, its own chunked loss."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    made = SFTTrainer(
        model=loaded(setup),
        args=SFTConfig(
            **common(setup), max_length=setup.recipe.max_length, completion_only_loss=True, packing=False
        ),
        train_dataset=Dataset.from_list(rows(setup, "completion_mask")),
        processing_class=tokenizer(setup),
        peft_config=adapter(setup.recipe),
    )
    return made.model, lambda: void(made.train())


CONTENDERS = {"ours": ours, "trainer": trainer, "trl": trl}


def void(_result: object) -> None:
    """Nothing."""


def loaded(setup: Setup, **more: Any) -> Any:
    """The base, for the others."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        setup.base, dtype=setup.dtype, attn_implementation="sdpa", device_map="cpu", **more
    )


def unpack_correctly(model: Any) -> None:
    """Keep bitsandbytes from repacking weights in a way that training cannot read (see training.qlora)."""
    from training.qlora import linear4bits

    for each in linear4bits(model):
        each.support_avx512bf16_for_cpu = False


def adapter(recipe: Recipe) -> Any:
    """The same adapter for all."""
    from peft import LoraConfig

    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=recipe.targets,
        task_type="CAUSAL_LM",
    )


def common(setup: Setup) -> dict[str, Any]:
    """The same schedule for all: steps of as many examples, of like length; rates that rise and fall so."""
    recipe = setup.recipe
    steps = math.ceil(len(setup.train) / recipe.batch_examples)
    return {
        "output_dir": str(setup.scratch / "out"),
        "use_cpu": True,
        "bf16": setup.dtype is torch.bfloat16,
        "per_device_train_batch_size": recipe.batch_examples,
        "num_train_epochs": 1,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "cosine",
        # Theirs begins at a rate of 0, ours at the first of so many parts.
        "warmup_steps": max(1, round(recipe.warmup_share * steps)) - 1,
        "adam_beta2": recipe.adam_beta2,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.clip_gradient,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "group_by_length",
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": recipe.seed,
    }


def rows(setup: Setup, learned: str) -> list[dict[str, Any]]:
    """The examples as the others want them: labels are the tokens themselves, moved by one inside."""
    made = []
    for one in setup.train:
        first = next(place for place, label in enumerate(one.labels) if label >= 0) + 1
        row: dict[str, Any] = {"input_ids": list(one.ids)}
        if learned == "labels":
            row["attention_mask"] = [1] * len(one)
            row["labels"] = [-100] * first + list(one.ids[first:])
        else:
            row["completion_mask"] = [0] * first + [1] * (len(one) - first)
        made.append(row)
    return made


def tokenizer(setup: Setup) -> Any:
    """The base's."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(setup.base)


@torch.no_grad()
def loss_on(model: Any, examples: list[Example]) -> float:
    """The mean cross-entropy of what is to be learned, in nats a token."""
    causal = model.get_base_model()
    model.train()  # eval() would have bitsandbytes repack its weights; there is no dropout
    total, tokens = 0.0, 0
    for group in grouped(examples, 512, packing=False):
        read_: Microbatch = padded(group)
        hidden = causal.model(input_ids=read_.ids, use_cache=False).last_hidden_state.flatten(0, 1)
        words = causal.get_output_embeddings().weight
        at = hidden[read_.places].to(words.dtype)
        total += float(label_loss(at, words, read_.labels, torch.ones(len(read_.labels))))
        tokens += len(read_.labels)
    return total / tokens


def peak() -> int:
    """The most that this process had resident since `clear_refs`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main(name: str, folder: Path, seed: int) -> None:
    """Train, and print what it took."""
    stay_offline()
    about = json.loads((folder / "setup.json").read_text())
    words = tokenizer(Setup(Path(about["base"]), torch.bfloat16, [], read(), folder))
    recipe = read().model_copy(update={**about["recipe"], "seed": seed})
    train, holdout = (read_examples(folder / f"{part}.jsonl", words) for part in ("train", "holdout"))
    scratch = folder / f"{name}-{seed}"
    scratch.mkdir()
    setup = Setup(Path(about["base"]), getattr(torch, about["dtype"]), train, recipe, scratch)
    model, run = CONTENDERS[name](setup)
    before = loss_on(model, holdout)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (man 5 proc)
    began = perf_counter()
    run()
    seconds = perf_counter() - began
    found = {
        "tokens_per_s": sum(map(len, train)) / seconds,
        "peak_bytes": peak(),
        "holdout_before": before,
        "holdout_loss": loss_on(model, holdout),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
