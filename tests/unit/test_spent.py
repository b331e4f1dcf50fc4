"""How looks at a server's stack are divided among its parts."""

from __future__ import annotations

import pytest

from benchmarks.gateway import spent

ROOT = "main (grpc_server/__main__.py:133);run_forever (asyncio/base_events.py:607)"


@pytest.mark.parametrize(
    ("calls", "part"),
    [
        ("write (grpc_server/servicers/reader.py:53)", "gRPC"),
        ("append (grpc_server/adapters/spool.py:9);dumps (json/__init__.py:2)", "spool"),
        (
            "_streamed (grpc_server/inference.py:7);generate (grpc_server/adapters/ollama.py:9)",
            "the engine's HTTP",
        ),
        ("_streamed (grpc_server/inference.py:7);time (asyncio/base_events.py:1)", "pipeline"),
        ("_run (asyncio/events.py:80)", spent.LOOP),
    ],
)
def test_a_look_counts_for_the_innermost_part_on_the_stack(calls: str, part: str) -> None:
    assert spent.part_of(f"{ROOT};{calls}".split(";")) == part


def test_only_the_first_thread_is_divided() -> None:
    stacks = [
        f"MainThread (0x7f);{ROOT};write (grpc_server/servicers/reader.py:53) 3",
        f"MainThread (0x7f);{ROOT} 1",
        "thread (0x7e);run (threading.py:982) 50",
    ]
    assert spent.shares(stacks) == {"gRPC": 0.75, spent.LOOP: 0.25}
    assert spent.shares([]) == {spent.LOOP: 1.0}
