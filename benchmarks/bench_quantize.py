"""What each type of quantization costs a candidate, and which is the smallest that may serve.

The candidate is trained for a minute on 200 of the leaderboard's playable demonstrations, merged in bf16,
and made small by `python -m training quantize --all`: each type with and without an importance matrix of the
training set's own prompts and answers (12,000 characters). The peer is the bf16 model itself, in one run.

`kl_divergence_<type>` (nats a token) and `same_top_<type>` (share of tokens whose likeliest successor stays
the same) are llama-perplexity's, over 12,000 characters of other examples; `decode_tokens_per_s` of one
sequence are llama-bench's. `smallest_that_passes` is the size of the smallest within the thresholds of
`training/configs/quantize.yaml`, which are the goals of Q8_0 here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.line import Line
from grpc_server.domain.chat_format import render, render_answer
from grpc_server.domain.types import Message, Role
from training import bfcl, cycle, quantize, recipe

HOME = Path(__file__).resolve().parents[1]
STATE = HOME / "var"
BASE = STATE / "models" / "gemma-3-270m-q4_k_m.gguf"
EXAMPLES = 200
TOKENS = 12_000
IMPORTANCE = 12_000


def run() -> Iterator[Line]:
    """Train, quantize by every type, and tell what each cost."""
    with tempfile.TemporaryDirectory(dir=STATE, prefix=".bench-quantize.") as folder:
        directory = Path(folder) / "20260101T020000Z"
        made = candidate(directory)
    yield from lines(made, quantize.read_config())


def candidate(directory: Path) -> dict[str, Any]:
    """What quantize.json says of a candidate made in `directory`."""
    write_dataset(directory)
    options = directory / "recipe.yaml"
    changed = {"max_tokens": TOKENS, "learning_rate": 2.0e-3, "batch_examples": 4}
    options.write_text(yaml.safe_dump(recipe.read().model_dump() | changed))
    types = directory / "types.yaml"
    config = quantize.read_config().model_dump(mode="json") | {"importance_characters": IMPORTANCE}
    types.write_text(yaml.safe_dump(config))
    _step("finetune", directory, "--config", options)
    _step("quantize", directory, "--config", types, "--all")
    return cycle.read_json(directory / quantize.RECORD)


def write_dataset(directory: Path) -> None:
    """A training set as curation writes it, of the shortest demonstrations."""
    train = directory / "dataset" / "train.jsonl"
    train.parent.mkdir(parents=True)
    with train.open("w", encoding="utf-8") as file:
        for item in bfcl.traffic(EXAMPLES):
            answer = Message(Role.ASSISTANT, tool_calls=(item.demonstration,))
            line = {"prompt": render(item.messages, item.tools), "completion": render_answer(answer)}
            file.write(json.dumps({"inference_id": item.id, **line}) + "\n")


def lines(made: Mapping[str, Any], config: quantize.Config) -> Iterator[Line]:
    """The lines of what quantize.json holds, made with `--all`."""
    whole = made["unquantized"]
    for each in made["tried"]:
        name = each["type"].lower() + ("_importance" if each["importance_matrix"] else "")
        goals = ("", "")
        if name == "q8_0":
            goals = (f"<= {config.most_divergence:g}", f">= {config.least_same_top:g}")
        yield _line(f"kl_divergence_{name}", each["kl_divergence"], "nats a token", 0.0, goals[0])
        yield _line(f"same_top_{name}", each["same_top_share"], "share", 1.0, goals[1])
        yield _line(f"size_{name}", each["size_bytes"] / 1e6, "MB", whole["size_bytes"] / 1e6)
        speed = "decode_tokens_per_s"
        yield _line(f"{speed}_{name}", each[speed], "tokens/s", whole[speed])
    passes = smallest(made["tried"], config)
    with_matrix = " with importance" if passes["importance_matrix"] else ""
    size = passes["size_bytes"] / whole["size_bytes"]
    yield _line("smallest_that_passes", size, f"of bf16: {passes['type']}{with_matrix}", 1.0, "<= 0.6")


def smallest(tried: Sequence[Mapping[str, Any]], config: quantize.Config) -> Mapping[str, Any]:
    """The smallest file that is faithful; of equals the one that needs no matrix."""
    faithful = [each for each in tried if config.faithful(each)]
    return min(faithful, key=lambda each: (each["size_bytes"], each["importance_matrix"]))


def _line(metric: str, value: float, unit: str, peer_value: float, goal: str = "") -> Line:
    return Line("quantize", metric, round(value, 4), unit, "bf16", round(peer_value, 4), goal)


def _step(name: str, directory: Path, *words: object) -> None:
    place = ("--cycle", directory, "--state-dir", STATE, "--base-gguf", BASE)
    command = [sys.executable, "-m", "training", name, *map(str, (*place, *words))]
    subprocess.run(command, cwd=HOME, stdout=sys.stderr, check=True)
