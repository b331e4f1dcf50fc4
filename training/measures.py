"""What a model is apart from right answers: does it still know its language, and how fast is it?

Perplexity is of data/sanity.txt, plain English of our own that no model has seen. Speeds are of one sequence,
by llama-bench, all subjects in one run on one machine: their ratio is what counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from training import llama
from training.subjects import Subject
from training.suites import Measure

TEXT = Path(__file__).parent / "data" / "sanity.txt"
PROMPT_TOKENS = 100
"""A usual prompt of the log; its first token comes when it has been read."""


def measure(asked: Sequence[Subject], wanted: Sequence[Measure]) -> dict[str, dict[str, float]]:
    """By subject `perplexity`, `first_token_ms` (of a prompt of 100 tokens) and `tokens_per_s`, as wanted.

    Raises:
        llama.LlamaError: if one of llama.cpp's programs fails.
    """
    known: dict[str, dict[str, float]] = {}
    for subject in asked:
        if subject.sha256 not in known:
            known[subject.sha256] = _measured(subject.gguf, wanted)
    return {subject.name: known[subject.sha256] for subject in asked}


def _measured(gguf: Path, wanted: Sequence[Measure]) -> dict[str, float]:
    found: dict[str, float] = {}
    if "perplexity" in wanted:
        found["perplexity"] = llama.perplexity(gguf, TEXT)
    if "speed" in wanted:
        speed = llama.speed(gguf)
        found["first_token_ms"] = round(1000 * PROMPT_TOKENS / speed["prefill_tokens_per_s"], 1)
        found["tokens_per_s"] = speed["decode_tokens_per_s"]
    return found
