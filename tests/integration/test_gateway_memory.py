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
    "messages",
    [
        pytest.param(10_000, id="10,000 messages"),
        pytest.param(1_000_000, id="1,000,000 messages", marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
    ],
)
async def test_memory_is_flat_over_many_messages(messages: int, gateway: Gateway) -> None:
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
            messages=at_least,
        )

    await asyncio.to_thread(ask, 10_000)
    process = psutil.Process(gateway.server.process.pid)
    counted: list[dict[str, float]] = []
    growth = await asyncio.to_thread(memory_growth, process, lambda: counted.append(ask(messages)))
    assert counted[0]["messages"] >= messages
    assert counted[0]["messages"] == counted[0]["answers"] * (256 + 2), "Started, tokens, Completed"
    assert growth < FLAT_MIB
