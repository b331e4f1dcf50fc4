"""Tracking beside the registry: MLflow's own pages, and Weights & Biases where a setting asks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.coverage_files import untraced
from tests.integration import night_by_hand
from training import register, wandb_run
from training.__main__ import app


def test_mlflow_is_served_on_this_host_alone_and_the_address_is_in_no_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []
    monkeypatch.setattr("training.tracking_cli.os.execve", lambda *words: ran.extend(words))
    uri = "postgresql://user:secret@db/mlflow"
    done = CliRunner().invoke(app, ["mlflow", "--port", "5001", "--mlflow-uri", uri])
    assert done.exit_code == 0 and "http://127.0.0.1:5001" in done.stdout
    program, words, environment = ran
    assert program == sys.executable and words[1:4] == ["-m", "mlflow", "server"]
    assert words[words.index("--host") + 1] == "127.0.0.1" and "secret" not in str(words)
    assert environment["MLFLOW_BACKEND_STORE_URI"] == "postgresql+psycopg://user:secret@db/mlflow"
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert environment["DO_NOT_TRACK"] == environment["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_without_wandb_the_cycle_is_registered_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = night_by_hand.make(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RuntimeError, match="not installed"):
        wandb_run.log(directory, tmp_path / "wandb", "offline")
    monkeypatch.setattr(register, "run", lambda *_: {"model_version": "m:1", "version": "1"})
    monkeypatch.setattr("training.__main__._serving", lambda _: "")
    words = ["register", "--cycle", str(directory), "--state-dir", str(tmp_path), "--mlflow-uri", "sqlite://"]
    done = CliRunner().invoke(app, [*words, "--wandb", "offline"])
    assert done.exit_code == 0 and "Not written for Weights & Biases" in done.stderr


@pytest.mark.soak
def test_a_cycle_is_written_for_wandb_without_a_network(tmp_path: Path) -> None:
    directory = night_by_hand.make(tmp_path)
    place = wandb_run.log(directory, tmp_path / "wandb", "offline")
    assert place.is_relative_to(tmp_path / "wandb") and place.name.startswith("offline-run-")
    assert [path.suffix for path in place.glob("*.wandb")] == [".wandb"]


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_mlflows_pages_show_the_registry(tmp_path: Path) -> None:
    uri = register.database("", "", tmp_path)
    register.run(night_by_hand.make(tmp_path / "cycles", until="gate"), uri, "gemma-3-270m")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "training", "mlflow", "--port", str(port), "--state-dir", str(tmp_path)]
    server = subprocess.Popen(command, env=untraced(), start_new_session=True)
    try:
        page = f"http://127.0.0.1:{port}/api/2.0/mlflow/registered-models/search"
        until = time.monotonic() + 900
        while True:
            try:
                with urllib.request.urlopen(page, timeout=10) as answer:
                    found = json.loads(answer.read())
                break
            except OSError:
                assert time.monotonic() < until and server.poll() is None
                time.sleep(0.5)
        assert found["registered_models"][0]["name"] == "gemma-3-270m"
    finally:
        os.killpg(server.pid, 15)
        server.wait(60)
