"""What `make gpu-monitor` shows."""

import io
import json
import os
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from grpc_server import gpus_cli
from grpc_server.adapters.gpus import Gpus
from tests.unit.test_gpus import Nvml

app = gpus_cli.app
runner = CliRunner()


def shown(found: dict[str, Any]) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(gpus_cli.page(found))
    return console.export_text()


def test_each_gpu_is_shown_with_its_load_memory_temperature_and_processes() -> None:
    found = gpus_cli.look(Gpus(Nvml()), 0.8, lambda pid: f"program-{pid}")
    text = shown(found)
    assert "Card 0: 90% busy, 60 °C" in text and "Card 1: 90% busy, 61 °C" in text
    assert "program-7 (7)" in text
    assert [each["pid"] for each in found["gpus"][0]["processes"]] == [7, 1, 9]


def test_a_share_above_the_alert_and_heat_are_told() -> None:
    found = gpus_cli.look(Gpus(Nvml()), 0.0)
    assert any("Card 0" in each and "memory" in each for each in found["alerts"])
    assert "ALERT" in shown(found)
    hot = found | {"gpus": [found["gpus"][0] | {"temperature": 90}]}
    assert any("90 °C" in each for each in gpus_cli._alerts(hot, 1.0))
    assert gpus_cli._alerts(found | {"gpus": [found["gpus"][0] | {"temperature": None}]}, 1.0) == []


def test_without_a_gpu_it_says_so_and_shows_processor_and_memory() -> None:
    text = shown(gpus_cli.look(Gpus(Nvml(broken="nvmlInit")), 1.0))
    assert "There is no NVIDIA GPU here" in text
    assert "processor" in text and "GiB" in text


def test_a_process_that_is_gone_is_shown_without_its_name() -> None:
    assert gpus_cli._process_name(2**30) == "?"
    assert gpus_cli._process_name(os.getpid()) != "?"


def test_one_look_prints_json_and_ends_with_3_on_an_alert() -> None:
    calm = runner.invoke(app, ["--once", "--json", "--alert", "1", "--interval", "0.2"])
    assert calm.exit_code == 0, calm.output
    found = json.loads(calm.stdout)
    assert found["memory_total"] > found["memory_used"] > 0 and found["alerts"] == []
    alarmed = runner.invoke(app, ["--once", "--alert", "0", "--interval", "0.2"])
    assert alarmed.exit_code == 3 and "ALERT" in alarmed.stdout


def test_it_looks_again_and_again_until_it_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("grpc_server.gpus_cli.time.sleep", sleep)
    done = runner.invoke(app, ["--json", "--interval", "5"])
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == 3 and slept == [0.2, 5.0, 5.0, 5.0]


def test_on_a_terminal_the_screen_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("grpc_server.gpus_cli.time.sleep", sleep)
    monkeypatch.setattr(gpus_cli, "Console", lambda: Console(force_terminal=True, file=io.StringIO()))
    gpus_cli.gpu_monitor(interval=2, once=False, alert=1, as_json=False)
    assert looks == [0.2, 2, 2]
