"""A short fine-tuning of Gemma 3 270M, ours beside transformers' Trainer and TRL's SFTTrainer.

The same examples of the leaderboard, adapter, schedule and steps, on the processor, each in a process of its
own, one after the other. The Trainer works as peft's documentation shows QLoRA: NF4 weights, and logits of
every token. TRL has the settings that are fastest here: LoRA on plain weights, the loss only on answers, its
own chunked cross-entropy. Ours is the nightly recipe on plain weights, too (NF4 that is unpacked saves no
memory), and with smaller microbatches (RECIPE). Tokens are those of the examples, padding not counted, in
the seconds of training; memory is the most that the process had resident while it trained, libraries and
weights included. The loss on what was held out is reckoned by the same code for each. Ours may be higher by
what the seed alone changes: two standard deviations over SEEDS (`holdout_noise`), measured in the same run.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.line import Line
from grpc_server.domain.chat_format import render, render_answer
from grpc_server.domain.types import Message, Role
from training.base import hugging_face_folder
from training.bfcl import Item, traffic
from training.compute import compute_dtype

BASE = Path(os.environ.get("AGENTLOOP_BASE_GGUF", "var/models/gemma-3-270m-q4_k_m.gguf"))
STATE = Path(os.environ.get("AGENTLOOP_STATE_DIR", "var"))
RECIPE: dict[str, Any] = {"method": "lora", "epochs": 1, "max_tokens": 10**9, "microbatch_tokens": 512}
TRAIN = int(os.environ.get("AGENTLOOP_BENCH_EXAMPLES", "40"))
HOLDOUT = 24
SEEDS = (7, 8, 9)
CHARACTERS = 800
"""Of a prompt at most: eight of twice that took the Trainer 18 GB, most of it logits."""


def line(item: Item) -> dict[str, Any]:
    """A line of `train.jsonl`."""
    answer = Message(Role.ASSISTANT, tool_calls=(item.demonstration,))
    return {"prompt": render(item.messages, item.tools), "completion": render_answer(answer)}


def prepare(folder: Path) -> None:
    """Write what every contender reads."""
    every = [item for item in traffic() if item.prompt_characters <= CHARACTERS]
    chosen = random.Random(7).sample(every, TRAIN + HOLDOUT)  # the same items each time
    for name, items in (("train", chosen[:TRAIN]), ("holdout", chosen[TRAIN:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line(item)) + "\n" for item in items))
    about = {
        "base": str(hugging_face_folder(BASE, STATE)),
        "dtype": str(compute_dtype("auto", STATE)).removeprefix("torch."),
        "recipe": RECIPE,
    }
    (folder / "setup.json").write_text(json.dumps(about))


def contend(name: str, folder: Path, seed: int = SEEDS[0]) -> dict[str, float]:
    """What one contender took."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training_contender", name, str(folder), str(seed)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(name, f"seed {seed}", found, file=sys.stderr)
    return found


def run() -> list[Line]:
    """Train in three ways."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        ours, trainer, trl = (contend(each, folder) for each in ("ours", "trainer", "trl"))
        losses = [
            ours["holdout_loss"],
            *(contend("ours", folder, seed)["holdout_loss"] for seed in SEEDS[1:]),
        ]
    noise = 2 * stdev(losses) / mean(losses)
    no_worse = f"<= {1 + noise:.4f}"
    return [
        _ratio("training_memory_vs_trainer", "peak_bytes", ours, trainer, "transformers.Trainer", "<= 0.4"),
        _ratio("training_tokens_vs_trainer", "tokens_per_s", ours, trainer, "transformers.Trainer", ">= 2"),
        _ratio("holdout_loss_vs_trainer", "holdout_loss", ours, trainer, "transformers.Trainer", no_worse),
        _ratio("training_tokens_vs_trl", "tokens_per_s", ours, trl, "trl.SFTTrainer", "> 1"),
        _ratio("training_memory_vs_trl", "peak_bytes", ours, trl, "trl.SFTTrainer"),
        _ratio("holdout_loss_vs_trl", "holdout_loss", ours, trl, "trl.SFTTrainer", no_worse),
        Line(
            "training",
            "tokens_per_s",
            ours["tokens_per_s"],
            "tok/s",
            "transformers.Trainer",
            trainer["tokens_per_s"],
        ),
        Line(
            "training",
            "peak_gb",
            ours["peak_bytes"] / 1e9,
            "GB",
            "transformers.Trainer",
            trainer["peak_bytes"] / 1e9,
        ),
        Line("training", "holdout_noise", noise, "share", f"{len(SEEDS)} seeds", 0.0),
        Line("training", "holdout_loss", ours["holdout_loss"], "nats", "before", ours["holdout_before"]),
    ]


def _ratio(
    metric: str, of: str, ours: dict[str, float], theirs: dict[str, float], peer: str, goal: str = ""
) -> Line:
    return Line("training", metric, ours[of] / theirs[of], "ratio", peer, 1.0, goal)
