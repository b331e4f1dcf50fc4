"""llama.cpp's own programs: quantize, importance, divergence, speed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from training.base import OFFLINE

_CONTEXT_TOKENS = 256
_CHUNKS = 6  # the unquantized distributions take 128 tokens x 262,144 words x 2 bytes a chunk: 67 MB
_MEAN_KLD = re.compile(r"Mean\s+KLD:\s*(-?\d+\.\d+)")
_SAME_TOP = re.compile(r"Same top p:\s*(\d+\.\d+)")
_PERPLEXITY = re.compile(r"Final estimate: PPL = (\d+\.\d+)")
_COUNT = ("--ids", "--show-count", "--log-disable")
_TOKENS = re.compile(r"^Total number of tokens: (\d+)$", re.MULTILINE)
_NO_CHUNK_BYTES = 64  # of a file of distributions that has none
_ATTEMPTS = 8
_SPEED = ("-p", 64, "-n", 32, "-r", 2)


class LlamaError(RuntimeError):
    """A program failed; the text ends with the last of what it said."""


def quantize(unquantized: Path, quantized: Path, kind: str, importance: Path | None = None) -> None:
    """Write `unquantized` as that type; `importance` is what the file of the same name holds.

    Raises:
        LlamaError: if llama-quantize fails.
    """
    matrix = ("--imatrix", importance) if importance else ()
    run_program(tool("llama-quantize"), *matrix, unquantized, quantized, kind)


def importance(unquantized: Path, text: str, scratch: Path) -> Path | None:
    """The importance matrix of `text`, rendered prompts and answers with their turn marks, in `scratch`.

    None where the text is shorter than llama-imatrix needs (two contexts of 256 tokens).

    Raises:
        LlamaError: if llama-tokenize or llama-imatrix fails.
    """
    text_file, matrix = scratch / "importance.txt", scratch / "importance.gguf"
    text_file.write_text(text, encoding="utf-8")
    if _tokens(unquantized, text_file) < 2 * _CONTEXT_TOKENS:
        return None
    options = ("--ctx-size", _CONTEXT_TOKENS, "--no-ppl", "--parse-special")
    run_program(tool("llama-imatrix"), "-m", unquantized, "-f", text_file, "-o", matrix, *options)
    return matrix


def _tokens(gguf: Path, text_file: Path) -> int:
    """How many tokens a text has, turn marks as one each.

    Counted first, because llama-imatrix says that a text is too short, and ends, before it has written that.
    """
    said = run_program(tool("llama-tokenize"), "-m", gguf, "-f", text_file, *_COUNT, errors=False)
    found = _TOKENS.search(said)
    if found is None:
        raise LlamaError(f"llama-tokenize did not say how many tokens: {said[-500:]}")
    return int(found[1])


def divergence(unquantized: Path, quantized: Path, text: str, scratch: Path) -> dict[str, float | None]:
    """`kl_divergence` (mean, nats a token) and `same_top_share` of two models' next tokens over `text`.

    The distributions of `unquantized` are kept in `scratch`, for the next type.

    Both are None where `text` is shorter than llama-perplexity needs (two contexts of 256 tokens).

    Raises:
        LlamaError: if llama-perplexity fails, or does not say them.
    """
    text_file, logits = scratch / "text.txt", scratch / "logits"
    text_file.write_text(text, encoding="utf-8")
    common = ("--ctx-size", _CONTEXT_TOKENS, "--chunks", _CHUNKS, "--kl-divergence-base", logits)
    perplexity = tool("llama-perplexity")
    if not logits.is_file():
        run_program(perplexity, "-m", unquantized, "-f", text_file, *common)
    if not logits.is_file() or logits.stat().st_size < _NO_CHUNK_BYTES:
        logits.unlink(missing_ok=True)
        return {"kl_divergence": None, "same_top_share": None}
    command = (perplexity, "-m", quantized, "--kl-divergence", *common)
    mean, top = _figures("the KL divergence", (_MEAN_KLD, _SAME_TOP), *command)
    return {"kl_divergence": float(mean), "same_top_share": round(float(top) / 100, 5)}


def perplexity(gguf: Path, text_file: Path) -> float:
    """Perplexity a token of a text, in contexts of 256 tokens; it must have two of them.

    Raises:
        LlamaError: if llama-perplexity fails, or does not say it.
    """
    command = (tool("llama-perplexity"), "-m", gguf, "-f", text_file, "--ctx-size", _CONTEXT_TOKENS)
    (found,) = _figures("the perplexity", (_PERPLEXITY,), *command)
    return float(found)


def _figures(what: str, patterns: Sequence[re.Pattern[str]], *command: object) -> list[str]:
    """What llama-perplexity says of each pattern.

    A thread of its own writes what it says, and it does not wait for that when it ends: on a busy machine the
    last lines, which are the figures, may be lost (its common/log.cpp says so). Then it is run again.
    """
    said = ""
    for _ in range(_ATTEMPTS):
        said = run_program(*command)
        found = [each.search(said) for each in patterns]
        if all(found):
            return [each[1] for each in found if each]
    raise LlamaError(f"llama-perplexity did not say {what} {_ATTEMPTS} times: {said[-500:]}")


def speed(gguf: Path) -> dict[str, float]:
    """`prefill_tokens_per_s` and `decode_tokens_per_s`, of one sequence, by llama-bench.

    Raises:
        LlamaError: if llama-bench fails.
    """
    said = run_program(tool("llama-bench"), "-m", gguf, "-o", "json", *_SPEED, errors=False)
    found = {("decode" if row["n_gen"] else "prefill"): row["avg_ts"] for row in json.loads(said)}
    return {f"{what}_tokens_per_s": round(found[what], 2) for what in ("prefill", "decode")}


def tool(name: str) -> Path:
    """One of the programs: beside this interpreter, where `make install` links them, or on PATH.

    Raises:
        LlamaError: if it is in neither place.
    """
    found = Path(sys.prefix) / "llama.cpp" / name
    if found.is_file():
        return found
    on_path = shutil.which(name)
    if on_path is None:
        raise LlamaError(f"{name} is not installed: run `make install`, or put it on PATH")
    return Path(on_path)


def run_program(*command: object, errors: bool = True) -> str:
    """What a program said on its outputs, without the second where no `errors` are wanted.

    Libraries are looked for beside it.

    Raises:
        LlamaError: if it fails.
    """
    words = [str(word) for word in command]
    environment = {**os.environ, **OFFLINE, "LD_LIBRARY_PATH": str(Path(words[0]).parent)}
    done = subprocess.run(
        words, capture_output=True, text=True, errors="replace", env=environment, check=False
    )
    said = done.stdout + done.stderr
    if done.returncode != 0:
        raise LlamaError(f"{Path(words[0]).name} ended with {done.returncode}: {said.strip()[-1500:]}")
    return said if errors else done.stdout
