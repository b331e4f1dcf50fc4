"""`make airflow` in pieces: what it sets, keeps and refuses, and that it leaves nothing behind."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from scripts import scheduler
from scripts.night import NightError

PYTHON = (sys.executable, "-S", "-c")  # without site-packages: nothing in it traces the process


def test_secrets_are_drawn_once_and_for_this_user_alone(tmp_path: Path) -> None:
    first, again = (scheduler.environment_of(tmp_path, 1234) for _ in range(2))
    assert first == again and len(first["AIRFLOW__API_AUTH__JWT_SECRET"]) >= 64
    assert scheduler.password(tmp_path) == json.loads((tmp_path / "passwords.json").read_text())["admin"]
    assert {each.stat().st_mode & 0o777 for each in tmp_path.glob("*.json")} == {0o600}
    assert scheduler.environment_of(tmp_path / "other", 1234)["AIRFLOW__API__SECRET_KEY"] not in str(first)


def test_every_part_listens_on_loopback_alone(tmp_path: Path) -> None:
    settings = scheduler.environment_of(tmp_path, 1234)
    assert settings["AIRFLOW__API__HOST"] == "127.0.0.1"
    assert settings["AIRFLOW__CORE__EXECUTION_API_SERVER_URL"] == "http://127.0.0.1:1234/execution/"
    parts = scheduler.commands(1234)
    assert set(parts) == {"api-server", "scheduler", "dag-processor"}
    assert "--skip-serve-logs" in parts["scheduler"]


def test_a_port_that_is_taken_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert scheduler.free_port(0) > 0
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        options = ["--port", str(port), "--state-dir", str(tmp_path)]
        done = CliRunner().invoke(scheduler.app, options, env={"AGENTLOOP_TOKEN": "al_x"})
    assert done.exit_code == 1 and f"port {port} cannot be had" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_part_that_ends_is_named_with_its_last_words_and_takes_the_others_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = ("prepare", [*PYTHON, ""])
    parts = {"scheduler": [*PYTHON, "print('no database')"], "api-server": [*PYTHON, "input()"]}
    started: list[subprocess.Popen[bytes]] = []
    real = scheduler._start

    def start(name: str, _: list[str], environment: dict[str, str], folder: Path) -> subprocess.Popen[bytes]:
        command = dict([prepared, *parts.items()])[name]
        if name == "api-server":
            command = [*PYTHON, "import time; time.sleep(600)"]
        process = real(name, command, environment, folder)
        started.append(process)
        return process

    monkeypatch.setattr(scheduler, "_start", start)
    monkeypatch.setattr(scheduler, "commands", lambda _: parts)
    with (
        pytest.raises(NightError, match="scheduler ended with 0: no database"),
        scheduler.told_to_end() as told,
        scheduler.components(1, {}, tmp_path) as running,
    ):
        scheduler.watch(running, told, tmp_path)
    assert not [each for each in started if psutil.pid_exists(each.pid) and each.poll() is None]
    prepared = ("prepare", [*PYTHON, "print('no rights'); raise SystemExit(3)"])
    with (
        pytest.raises(NightError, match="could not be prepared: no rights"),
        scheduler.components(1, {}, tmp_path),
    ):
        pass
