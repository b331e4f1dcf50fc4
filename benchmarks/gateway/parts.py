"""The processes of the benchmark, each on its cores."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.gateway.asking import Asked
from benchmarks.gateway.cores import OTHERS, SERVERS, on
from grpc_server.adapters.local_postgres import LocalPostgres
from grpc_server.adapters.ollama import OllamaEngine
from grpc_server.adapters.ollama_process import OllamaProcess
from grpc_server.domain.types import Limits
from grpc_server.migrations import migrate
from tests.live_server import LiveServer

_ROOT = Path(__file__).parents[2]
MODEL = "gemma-3-270m:base"
COPY = "gemma-3-270m:litellm"
"""The same bytes: LiteLLM asks with other load options than we do; Ollama would load one model in turns."""
UNREACHED = Limits(10**6, 10**9, 1000, frozenset({"default"}))
"""Quotas that are counted, and never used up."""


class Worker:
    """A process that answers lines of JSON with lines of JSON."""

    def __init__(self, module: str, cores: frozenset[int]) -> None:
        with on(cores):
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                cwd=_ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def ask(self, asked: Asked | dict[str, Any]) -> Any:
        """Its answer. Raises RuntimeError if it died of the question."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(asked) if isinstance(asked, Asked) else asked) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client died, asked for {asked}")
        return json.loads(line)


@contextlib.contextmanager
def bare_server(pace_ms: float = 0) -> Iterator[tuple[str, psutil.Process]]:
    """A bare grpc.aio server, with so long between two tokens: its address and its process."""
    with (
        on(SERVERS),
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gateway.bare", str(pace_ms)],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdin is not None
        yield process.stdout.readline().strip(), psutil.Process(process.pid)
        process.stdin.close()


@contextlib.contextmanager
def gateway(
    folder: Path, postgres: LocalPostgres, ollama_url: str, base: Path, *, parallel: int, context_tokens: int
) -> Iterator[tuple[LiveServer, str]]:
    """The server with everything on, before this Ollama; and a token for it."""
    dsn = postgres.dsn(folder.name)
    migrate(dsn)
    server = LiveServer(
        folder,
        engine="ollama",
        ollama_url=ollama_url,
        database_url=dsn,
        base_gguf=base,
        parallel=parallel,
        context_tokens=context_tokens,
        log_level="WARNING",
    )
    with on(SERVERS):
        server.start()
    try:
        yield server, server.token("infer", name="benchmark", limits=UNREACHED)
    finally:
        server.stop()


@contextlib.asynccontextmanager
async def ollama(
    binary: str, folder: Path, base: Path, *, parallel: int, context_tokens: int
) -> AsyncIterator[str]:
    """A real Ollama that has the model, twice; its URL."""
    with on(OTHERS):
        process = await OllamaProcess(binary, folder, parallel=parallel).__aenter__()
    try:
        sha256 = await asyncio.to_thread(lambda: hashlib.sha256(base.read_bytes()).hexdigest())
        async with OllamaEngine(process.url, context_tokens=context_tokens, parallel=parallel) as engine:
            await engine.install(MODEL, base, sha256)
        async with httpx.AsyncClient(base_url=process.url, trust_env=False) as client:
            copied = await client.post("/api/copy", json={"source": MODEL, "destination": COPY})
            copied.raise_for_status()
        yield process.url
    finally:
        await process.__aexit__()
