"""The guard of `ollama serve`, with programs that only play it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from grpc_server.adapters import ollama_guard, ollama_process
from grpc_server.adapters.ollama_process import OllamaProcess
from grpc_server.domain.errors import EngineUnavailable


def program(folder: Path, script: str) -> Path:
    path = folder / "ollama & é"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


async def test_an_ollama_that_never_listens_is_given_up_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ollama_process, "_START_SECONDS", 6.0)
    log = tmp_path / "log"
    log.touch()
    binary = program(
        tmp_path,
        f'echo began > "{log}"; trap \'echo ended > "{log}"; exit\' TERM\nwhile :; do sleep 0.05; done',
    )
    with pytest.raises(EngineUnavailable, match="did not come up in 6 s"):
        async with OllamaProcess(binary, tmp_path):
            pass
    assert log.read_text() == "ended\n"


async def test_what_an_ollama_said_before_it_failed_is_told(tmp_path: Path) -> None:
    binary = program(tmp_path, "echo 'no room on disk' >&2; exit 3")
    with pytest.raises(EngineUnavailable, match="no room on disk"):
        async with OllamaProcess(binary, tmp_path):
            pass


async def test_a_dead_ollama_is_started_anew_where_it_was(tmp_path: Path) -> None:
    log = tmp_path / "log"
    binary = program(
        tmp_path,
        f'echo "$OLLAMA_HOST" >> "{log}"; echo "Listening on 127.0.0.1:4711 (version 0)" >&2; sleep 0.1',
    )
    async with OllamaProcess(binary, tmp_path) as process:
        assert process.url == "http://127.0.0.1:4711"
        for _ in range(200):
            if len(log.read_text().splitlines()) >= 3:
                break
            await asyncio.sleep(0.05)
    assert log.read_text().splitlines()[:3] == ["127.0.0.1:0", "127.0.0.1:4711", "127.0.0.1:4711"]


async def test_a_guard_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama_process, "_STOP_SECONDS", 0.0)
    binary = program(tmp_path, 'echo "Listening on 127.0.0.1:4711 (version 0)" >&2; exec sleep 60')
    process = OllamaProcess(binary, tmp_path)
    await process.__aenter__()
    [sleeping] = psutil.Process(process.pid).children()
    await process.__aexit__()
    await process.__aexit__()
    assert process.pid == 0
    sleeping.wait(5)  # it ends with its guard


def test_an_ollama_that_ignores_its_end_is_killed(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    ollama_guard.stop(process, patience=0.05)
    assert process.returncode == -9
    process.stdout.close()
