"""Engines leave nothing behind, whatever ends first, and tell nobody what they were asked."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from grpc_server.adapters.embedded import EmbeddedEngine
from grpc_server.adapters.ollama import OllamaEngine
from grpc_server.adapters.ollama_process import OllamaProcess
from grpc_server.domain.errors import EngineFailed, EngineUnavailable
from grpc_server.domain.ports import Generation
from grpc_server.domain.types import Sampling
from tests.coverage_files import untraced
from tests.integration.conftest_engine import (
    BASE_SHA256,
    ROOT,
    answer,
    base_gguf,
    ollama_binary,
    processes_below,
    write_tiny_gguf,
)

BASE = "gemma-3-270m:base"
ASKED = Generation(BASE, "a, b, c,", Sampling(temperature=0.0, max_tokens=2))

EMBEDDED = """
import asyncio, pathlib, sys
from grpc_server.adapters.embedded import EmbeddedEngine
async def main():
    engine = EmbeddedEngine(pathlib.Path(sys.argv[1]), context_tokens=256, parallel=1)
    await engine.install("gemma-3-270m:base", pathlib.Path(sys.argv[2]), sys.argv[3])
    await engine.load("gemma-3-270m:base")
    print("ready", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""

OLLAMA = """
import asyncio, pathlib, sys
from grpc_server.adapters.ollama import OllamaEngine
from grpc_server.adapters.ollama_process import OllamaProcess
async def main():
    process = await OllamaProcess(sys.argv[4], pathlib.Path(sys.argv[1]), parallel=1).__aenter__()
    engine = OllamaEngine(process.url, context_tokens=256, parallel=1)
    await engine.install("gemma-3-270m:base", pathlib.Path(sys.argv[2]), sys.argv[3])
    await engine.load("gemma-3-270m:base")
    print("ready", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of the embedded engine, with the base model installed."""
    folder = tmp_path_factory.mktemp("é & versions")

    async def install() -> None:
        async with EmbeddedEngine(folder) as engine:
            assert await engine.install(BASE, base_gguf(), BASE_SHA256)

    asyncio.run(install())
    yield folder
    shutil.rmtree(folder)


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize(
    ("script", "program"),
    [(EMBEDDED, "embedded_child"), (OLLAMA, "llama-server")],
    ids=["embedded", "ollama"],
)
def test_nothing_outlives_a_server_that_is_killed(
    script: str, program: str, tmp_path: Path, versions: Path
) -> None:
    binary = [ollama_binary()] if script is OLLAMA else []
    folder = tmp_path / "é & m" if script is OLLAMA else versions
    command = [sys.executable, "-c", script, str(folder), str(base_gguf()), BASE_SHA256, *binary]
    with subprocess.Popen(command, cwd=ROOT, env=untraced(), stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        left = processes_below(server.pid)
        assert any(program in " ".join(process.cmdline()) for process in left)
        server.send_signal(signal.SIGKILL)
    assert until(lambda: not any(map(lives, left))), left


def test_an_engine_runs_at_the_priority_of_who_started_it(versions: Path) -> None:
    """The kernel's autogroups follow sessions: a child in one of its own would run as if nobody were nice."""
    command = [sys.executable, "-c", EMBEDDED, str(versions), str(base_gguf()), BASE_SHA256]
    with subprocess.Popen(
        ["nice", "-n", "7", *command],
        cwd=ROOT,
        env=untraced(),
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as server:
        assert server.stdout is not None
        server.stdout.readline()
        [child] = processes_below(server.pid, "embedded_child")
        assert os.getsid(child.pid) == os.getsid(server.pid)
        assert os.getpgid(child.pid) != os.getpgid(server.pid), "Ctrl-C would reach it"
        assert child.nice() == psutil.Process(server.pid).nice()
        server.kill()


def lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


async def test_closing_the_embedded_engine_ends_its_children(versions: Path) -> None:
    before = {process.pid for process in processes_below(os.getpid(), "embedded_child")}
    async with EmbeddedEngine(versions, context_tokens=256, parallel=1) as engine:
        await engine.load(BASE)
        children = [p for p in processes_below(os.getpid(), "embedded_child") if p.pid not in before]
        assert len(children) == 1
    assert not any(map(lives, children))
    with pytest.raises(EngineUnavailable, match="closed"):
        await answer(engine, ASKED)
    with pytest.raises(EngineUnavailable, match="closed"):
        await engine.check()


async def test_the_embedded_engine_is_deaf_to_those_without_its_key_and_knows_no_other_secret(
    versions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {process.pid for process in processes_below(os.getpid(), "embedded_child")}
    monkeypatch.setenv("AGENTLOOP_DATABASE_URL", "postgresql://u:hunter2@host/db")
    async with EmbeddedEngine(versions, context_tokens=256, parallel=1) as engine:
        await engine.load(BASE)
        [child] = [p for p in processes_below(os.getpid(), "embedded_child") if p.pid not in before]
        [listening] = [c for c in child.net_connections() if c.status == psutil.CONN_LISTEN]
        assert listening.laddr.ip == "127.0.0.1"
        url = f"http://127.0.0.1:{listening.laddr.port}"
        async with httpx.AsyncClient(trust_env=False) as client:
            asked = await client.post(f"{url}/completion", json={"prompt": "x", "n_predict": 1})
            assert asked.status_code == 401
        assert "hunter2" not in " ".join(child.environ().values())
        assert child.cmdline()[1:] == ["-m", "grpc_server.adapters.embedded_child"]


async def test_a_gguf_that_cannot_run_is_said_to_be_damaged_and_another_still_runs(
    tmp_path: Path, versions: Path
) -> None:
    damaged = tmp_path / "damaged.gguf"
    sha256 = write_tiny_gguf(damaged)
    async with EmbeddedEngine(versions, context_tokens=256, parallel=1) as engine:
        await engine.install("tiny:1", damaged, sha256)
        for _ in range(2):
            with pytest.raises(EngineFailed, match=r"tiny:1.*damaged"):
                await engine.load("tiny:1")
        await engine.check()
        assert (await answer(engine, ASKED))[0]


async def test_an_ollama_that_is_not_installed_says_what_to_do(tmp_path: Path) -> None:
    for binary in (tmp_path / "nowhere", "/bin/false"):
        with pytest.raises(EngineUnavailable, match="make ollama"):
            async with OllamaProcess(binary, tmp_path):
                pass


async def test_ollama_leaves_nothing_behind_and_listens_on_loopback_only(tmp_path: Path) -> None:
    async with OllamaProcess(ollama_binary(), tmp_path / "modèles", parallel=1) as process:
        async with OllamaEngine(process.url) as engine:
            await engine.check()
        serving = processes_below(process.pid)
        addresses = [
            c.laddr.ip for p in serving for c in p.net_connections() if c.status == psutil.CONN_LISTEN
        ]
        assert addresses == ["127.0.0.1"]
        outside = [c for p in serving for c in p.net_connections() if c.raddr and c.raddr.ip != "127.0.0.1"]
        assert outside == []
    assert not any(map(lives, serving))
    assert process.pid == 0
    async with OllamaEngine(process.url) as engine:
        with pytest.raises(EngineUnavailable):
            await engine.check()
