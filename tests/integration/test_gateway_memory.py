"""Memory does not grow with what has been served."""

from __future__ import annotations

import asyncio

import psutil
import pytest

from benchmarks.bench_gateway import memory_growth
from benchmarks.gateway.counting import count
from tests.integration.conftest_gateway import PARALLEL, Gateway
from tests.scripted_ollama import Script

FLAT_MIB = 8


@pytest.mark.parametrize(
    "tokens",
    [
        pytest.param(10_000, id="10,000 tokens"),
        pytest.param(1_000_000, id="1,000,000 tokens", marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
    ],
)
async def test_memory_is_flat_over_many_tokens(tokens: int, gateway: Gateway) -> None:
    """The first answers fill pools and caches; what counts is what comes after them."""
    gateway.ollama.play(Script())
    assert gateway.server.process is not None

    def ask(at_least: int) -> dict[str, float]:
        return count(
            gateway.server.grpc_address,
            gateway.token,
            streams=PARALLEL,
            connections=4,
            tokens=256,
            seconds=0,
            answers=-(-at_least // 256),
        )

    await asyncio.to_thread(ask, 10_000)
    process = psutil.Process(gateway.server.process.pid)
    counted: list[dict[str, float]] = []
    growth = await asyncio.to_thread(memory_growth, process, lambda: counted.append(ask(tokens)))
    assert counted[0]["answers"] * 256 >= tokens
    assert counted[0]["answers"] * 3 <= counted[0]["messages"], "Started, tokens, Completed"
    assert counted[0]["messages"] <= counted[0]["answers"] * (256 + 2)
    assert growth < FLAT_MIB
