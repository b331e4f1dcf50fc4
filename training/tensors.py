"""From lines of `train.jsonl` to token ids with labels, and to the steps that read them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from grpc_server.domain.chat_format import BOS, END_OF_TURN

IGNORED = -100
"""A label that is not learned (PyTorch's own default)."""

PADDING = 0

LIKE_BATCHES = 8
"""Batches that share their examples out by length: 4 % of what is computed is padding then, not 17 %."""


class MaskedEndOfTurnError(ValueError):
    """The end of a turn is not among what is learned: such a model would never stop."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer of transformers."""

    def convert_tokens_to_ids(self, tokens: str) -> Any:
        """The id of one token."""

    def encode(self, text: str, *, add_special_tokens: bool) -> Any:
        """The ids of a text."""


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids; `labels[i]` is the token to predict after `ids[i]`, or IGNORED."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def learned(self) -> int:
        """How many labels there are."""
        return sum(label != IGNORED for label in self.labels)


def read_examples(train: Path, tokenizer: Tokenizer) -> list[Example]:
    """The lines of `train.jsonl` as token ids, `<bos>` before the prompt; only the completion is learned."""
    with train.open(encoding="utf-8") as lines:
        return [example(json.loads(line), tokenizer) for line in lines]


def example(line: Mapping[str, Any], tokenizer: Tokenizer) -> Example:
    """One line of `train.jsonl` as token ids."""
    prompt = [
        tokenizer.convert_tokens_to_ids(BOS),
        *tokenizer.encode(line["prompt"], add_special_tokens=False),
    ]
    completion = tokenizer.encode(line["completion"], add_special_tokens=False)
    ids = [*prompt, *completion]
    labels = [IGNORED] * (len(prompt) - 1) + completion + [IGNORED]
    return Example(tuple(ids), tuple(labels), float(line.get("weight", 1.0)))


def check_end_of_turn(examples: Iterable[Example], tokenizer: Tokenizer) -> None:
    """Refuse examples that do not teach, as their last label, where to stop.

    Raises:
        MaskedEndOfTurnError: naming the first such example.
    """
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    for number, one in enumerate(examples, start=1):
        learned = [label for label in one.labels if label != IGNORED]
        if not learned or learned[-1] != end:
            raise MaskedEndOfTurnError(
                f"line {number} of the training set does not teach {END_OF_TURN} as its last token;"
                " a model trained on it would not stop"
            )


def plan_steps(
    examples: Sequence[Example], *, epochs: int, batch_examples: int, max_tokens: int, seed: int
) -> list[list[int]]:
    """The examples of each step, by index: `epochs` shuffled passes, cut where `max_tokens` are read.

    A step's examples are of like length, so that little is padded. There is always one step. The same
    arguments give the same plan.
    """
    shuffled = random.Random(seed)  # noqa: S311 - an order, not a secret
    steps: list[list[int]] = []
    tokens = 0
    for _ in range(epochs):
        order = list(range(len(examples)))
        shuffled.shuffle(order)
        for batch in _of_like_length(order, examples, batch_examples, shuffled):
            tokens += sum(len(examples[index]) for index in batch)
            if steps and tokens > max_tokens:
                return steps
            steps.append(batch)
    return steps


def _of_like_length(
    order: Sequence[int], examples: Sequence[Example], size: int, shuffled: random.Random
) -> list[list[int]]:
    """`order` in shuffled batches, each of like length among those of LIKE_BATCHES in a row."""
    batches = []
    for start in range(0, len(order), size * LIKE_BATCHES):
        near = sorted(order[start : start + size * LIKE_BATCHES], key=lambda index: len(examples[index]))
        batches += [near[first : first + size] for first in range(0, len(near), size)]
    shuffled.shuffle(batches)
    return batches
