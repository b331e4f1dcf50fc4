"""Nothing leaves the machine, and nothing tries to: seen from a sink at the only way out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.coverage_files import untraced
from tests.integration.conftest_engine import ollama_binary
from tests.tiny_gguf import described_alike
from training.cycle import sha256

HOME = Path(__file__).resolve().parents[2]
SMALL = Path(__file__).parent / "small"
TRIED_TO_LEAVE = 97
QUESTIONS = 60  # of which over 32, the fewest that a night learns from, are for training

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making a network namespace needs root")


@dataclass(frozen=True)
class Run:
    """How a command ended, and what its namespace's sink counted."""

    code: int
    output: str
    report: dict[str, Any]


def offline(tmp_path: Path, *command: str, timeout: float = 60) -> Run:
    """Run a command where every way out leads to the sink."""
    report = tmp_path / "report.json"
    ended = subprocess.run(
        [HOME / "scripts" / "offline.sh", "-o", report, *command],
        cwd=HOME,
        env={name: value for name, value in untraced().items() if not name.startswith("GRPC_")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Run(ended.returncode, ended.stdout, json.loads(report.read_text()))


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def served_alone(model_version: str) -> dict[str, Any]:
    return {"model_version": model_version, "role": "stable", "weight": 100}


def python(code: str) -> tuple[str, str, str]:
    return sys.executable, "-c", code


def test_what_stays_on_this_host_is_not_counted(tmp_path: Path) -> None:
    run = offline(
        tmp_path,
        *python(
            "import socket\n"
            "server = socket.create_server(('127.0.0.1', 0))\n"
            "socket.create_connection(server.getsockname(), 5)\n"
            "socket.gethostbyname(socket.gethostname()), socket.getfqdn()\n"
        ),
    )
    assert (run.code, run.report["packets"]) == (0, 0), run.output


@pytest.mark.parametrize(
    ("attempt", "destination"),
    [
        ("socket.create_connection(('1.1.1.1', 443), 1)", "tcp 1.1.1.1:443"),
        ("socket.create_connection(('2606:4700::1111', 443), 1)", "tcp [2606:4700::1111]:443"),
        ("socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 4317))", "udp 8.8.8.8:4317"),
        ("socket.getaddrinfo('huggingface.co', 443)", "udp 198.18.0.1:53"),
    ],
)
def test_an_attempt_to_leave_trips_the_sink_even_if_its_error_is_swallowed(
    tmp_path: Path, attempt: str, destination: str
) -> None:
    run = offline(tmp_path, *python(f"import socket\ntry: {attempt}\nexcept OSError: pass"))
    assert run.code == TRIED_TO_LEAVE, run.output
    assert destination in run.report["destinations"]
    assert destination in run.output


def test_a_name_that_was_looked_up_is_named(tmp_path: Path) -> None:
    run = offline(
        tmp_path,
        *python("import socket\ntry: socket.gethostbyname('o1.ingest.sentry.io')\nexcept OSError: 0"),
    )
    assert set(run.report["questions"]) == {"o1.ingest.sentry.io"}


def test_a_command_that_fails_keeps_its_exit_code_and_leaves_no_namespace(tmp_path: Path) -> None:
    run = offline(tmp_path, "sh", "-c", "ip netns identify; exit 7")
    assert run.code == 7
    inside = run.output.strip()
    assert inside.startswith("offline-")
    made = {inside, inside.replace("offline", "sink")}
    assert not made & {path.name for path in Path("/run/netns").glob("*")}


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("engine", ["embedded", pytest.param("ollama", marks=pytest.mark.soak)])
def test_the_whole_loop_closes_and_nothing_of_it_tries_to_leave(
    tmp_path: Path, places: Callable[[str], Path], base_gguf: Path, engine: str
) -> None:
    """Serve, log, freeze, validate, curate, fine-tune, quantize, evaluate, gate, register, roll out."""
    place = places("the loop")
    environment = {
        "AGENTLOOP_ENGINE": engine,
        "AGENTLOOP_STATE_DIR": place / "var",
        "AGENTLOOP_CYCLES_DIR": place / "cycles",
        "AGENTLOOP_BASE_GGUF": base_gguf,
        "AGENTLOOP_THREADS": 1,  # see tests/conftest.py
        "AGENTLOOP_RECIPE": SMALL / "recipe.yaml",
        "AGENTLOOP_SUITES": SMALL / "suites.yaml",
        "AGENTLOOP_GATE_RULES": SMALL / "gate.yaml",
        "AGENTLOOP_CANARY_MIN_REQUESTS": 8,
        "AGENTLOOP_CANARY_POLL_INTERVAL": 0.5,
        "AGENTLOOP_CANARY_TIME_LIMIT": 600,  # on a busy machine, too
    }
    if engine == "ollama":
        environment["AGENTLOOP_OLLAMA_BIN"] = ollama_binary()
    else:  # the base in transformers' form is found, as on every night but the first; the soak makes it anew
        converted = HOME / "var" / "cache" / "hf"
        converted.mkdir(parents=True, exist_ok=True)
        (place / "var" / "cache").mkdir(parents=True)
        (place / "var" / "cache" / "hf").symlink_to(converted)
    settings = [f"{name}={value}" for name, value in environment.items()]
    demo = (sys.executable, "-m", "demo", "--requests", str(QUESTIONS), "--traffic-seconds", "0")
    run = offline(tmp_path, "env", *settings, *demo, timeout=2300)
    assert run.code == 0, run.output
    assert run.report["packets"] == 0, run.output

    (cycle_dir,) = (place / "cycles").iterdir()
    figures = read(cycle_dir / "demo.json")
    assert (figures["requests_failed"], figures["rollout_failed_requests"]) == (0, 0), run.output
    assert figures["requests"] >= QUESTIONS
    assert figures["rows_accepted"] == figures["rows_logged"] >= QUESTIONS
    assert figures["rows_quarantined"] == 0
    assert figures["examples_kept"] >= 32
    assert figures["loss_last"] < figures["loss_first"]
    assert 150 < figures["gguf_mb"] < 350
    described_alike(cycle_dir / "model.gguf", base_gguf)
    assert read(cycle_dir / "quantize.json")["sha256"] == sha256(cycle_dir / "model.gguf")
    assert not list(cycle_dir.glob(".quantize*"))
    for subject in ("base_constrained", "champion", "candidate"):
        low, high = figures[f"{subject}_accuracy_ci"]
        assert 0 <= low <= figures[f"{subject}_accuracy"] <= high <= 1
    assert figures["champion_accuracy"] == 0  # the untouched base, free to say what it likes
    assert figures["verdict"] == "pass", run.output
    assert read(cycle_dir / "rollout.json")["result"] == "promoted", run.output
    assert figures["route_before"] == [served_alone("gemma-3-270m:base")]
    assert figures["route_after"] == [served_alone(f"gemma-3-270m:{cycle_dir.name}")]
    assert b"<svg" in (cycle_dir / "report.html").read_bytes()
    assert (cycle_dir / "manifest.json").exists()
