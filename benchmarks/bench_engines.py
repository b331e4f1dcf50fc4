"""Both engines on the same model and the same prompts, in turns.

Gemma 3 270M (Q4_K_M), rendered prompts of the leaderboard, greedy, 64 new tokens: tokens written per second
over all streams, and the median time to the first token, at 1 and at 4 streams, after a warming round.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.line import Line
from grpc_server.adapters.embedded import EmbeddedEngine
from grpc_server.adapters.ollama import OllamaEngine
from grpc_server.adapters.ollama_process import OllamaProcess
from grpc_server.domain.chat_format import STOP, render
from grpc_server.domain.ports import Engine, Finished, Generation
from grpc_server.domain.types import Sampling
from training.bfcl import traffic

BASE = Path(os.environ.get("AGENTLOOP_BASE_GGUF", "var/models/gemma-3-270m-q4_k_m.gguf"))
MODEL = "gemma-3-270m:base"
ROUNDS = 2
ASKED = 12
GREEDY = Sampling(temperature=0, max_tokens=64)


async def _one(engine: Engine, prompt: str) -> tuple[float, int]:
    """Seconds to the first piece, and tokens written."""
    started = time.perf_counter()
    first, tokens = 0.0, 0
    async for event in engine.generate(Generation(MODEL, prompt, GREEDY, STOP)):
        first = first or time.perf_counter() - started
        if isinstance(event, Finished):
            tokens = event.usage.output_tokens
    return first, tokens


async def _round(engine: Engine, prompts: list[str], streams: int) -> tuple[float, float]:
    """Tokens per second over all streams, and the median time to the first token in ms."""
    places = asyncio.Semaphore(streams)

    async def ask(prompt: str) -> tuple[float, int]:
        async with places:
            return await _one(engine, prompt)

    started = time.perf_counter()
    answers = await asyncio.gather(*(ask(prompt) for prompt in prompts))
    seconds = time.perf_counter() - started
    return sum(tokens for _, tokens in answers) / seconds, 1000 * statistics.median(
        first for first, _ in answers
    )


async def _measure(folder: Path, base: Path, sha256: str) -> list[Line]:
    prompts = [render(item.messages, item.tools) for item in traffic(ASKED * (ROUNDS + 1))]
    binary = os.environ.get("AGENTLOOP_OLLAMA_BIN") or shutil.which("ollama") or "ollama"
    lines: list[Line] = []
    async with OllamaProcess(binary, folder / "ollama") as process:
        engines: dict[str, Engine] = {
            "embedded": EmbeddedEngine(folder / "models"),
            "ollama": OllamaEngine(process.url),
        }
        for engine in engines.values():
            await engine.install(MODEL, base, sha256)
            await _round(engine, prompts[:2], 1)
        for streams in (1, 4):
            seen: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
            for turn in range(1, ROUNDS + 1):
                part = prompts[turn * ASKED : (turn + 1) * ASKED]
                for name, engine in engines.items():
                    seen[name].append(await _round(engine, part, streams))
            rates = {name: statistics.median(rate for rate, _ in rounds) for name, rounds in seen.items()}
            firsts = {name: statistics.median(first for _, first in rounds) for name, rounds in seen.items()}
            lines += _lines(streams, rates, firsts)
        for engine in engines.values():
            await engine.close()
    return lines


def _lines(streams: int, rates: dict[str, float], firsts: dict[str, float]) -> Iterator[Line]:
    at = f"at_{streams}_streams" if streams > 1 else "at_1_stream"
    ratio = rates["embedded"] / rates["ollama"]
    yield Line("engines", f"tokens_per_s_{at}", rates["embedded"], "tok/s", "ollama", rates["ollama"])
    yield Line("engines", f"tokens_vs_ollama_{at}", ratio, "ratio", "ollama", 1.0, ">= 0.9")
    yield Line("engines", f"ttft_p50_ms_{at}", firsts["embedded"], "ms", "ollama", firsts["ollama"])


def run() -> list[Line]:
    """Measure both engines, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(
            _measure(Path(folder), BASE.resolve(), hashlib.sha256(BASE.read_bytes()).hexdigest())
        )
