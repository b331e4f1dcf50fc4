"""The client is a wheel of its own, light, and complete: it works where nothing else is installed."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from zipfile import ZipFile

import pytest

from agentloop.v1 import inference_pb2
from tests.integration.conftest_client import ScriptedService, running
from tests.live_server import ROOT

DIRECT = {
    *("googleapis-common-protos", "grpcio", "grpcio-health-checking", "grpcio-status"),
    *("protobuf", "rich", "typer"),
}
BEHIND = {
    *("annotated-doc", "markdown-it-py", "mdurl", "pygments", "shellingham", "typing-extensions"),
    *("annotated-types", "pydantic", "pydantic-core", "typing-inspection"),  # Typer's
}
"""What the direct ones bring; but for the last, all of it for a terminal."""
MAX_BYTES = 60_000_000


def run(*command: str | Path, **environment: str) -> str:
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("AGENTLOOP", "PYTHON"))
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The wheel, and an environment with it and what it needs, from uv's cache alone."""
    folder = tmp_path_factory.mktemp("wheel")
    uv = run("scripts/uv.sh").strip()
    run(uv, "build", "--quiet", "--offline", "--wheel", "--package", "agentloop", "--out-dir", folder)
    (wheel,) = folder.glob("*.whl")
    place = folder / "environment"
    needed = ("sync", "--quiet", "--frozen", "--offline", "--package", "agentloop", "--no-install-workspace")
    run(uv, *needed, UV_PROJECT_ENVIRONMENT=str(place))
    run(uv, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", place, wheel)
    return {"wheel": wheel, "uv": Path(uv), "environment": place, "bin": place / "bin"}


def test_the_wheel_holds_the_package_its_types_and_its_licence(installed: Mapping[str, Path]) -> None:
    with ZipFile(installed["wheel"]) as wheel:
        names = set(wheel.namelist())
        metadata = next(name for name in names if name.endswith("METADATA"))
        needed = [
            line.removeprefix("Requires-Dist: ").partition(">")[0]
            for line in wheel.read(metadata).decode().splitlines()
            if line.startswith("Requires-Dist: ")
        ]
    assert names > {"agentloop/py.typed", "agentloop/LICENSE", "agentloop/v1/inference_pb2.pyi"}
    assert all(name.startswith("agentloop") for name in names)
    assert set(needed) == DIRECT


def test_nothing_heavy_comes_with_it(installed: Mapping[str, Path]) -> None:
    listed = run(installed["uv"], "pip", "list", "--format", "json", "--python", installed["environment"])
    assert {each["name"] for each in json.loads(listed)} == {"agentloop", *DIRECT, *BEHIND}
    run(installed["uv"], "pip", "check", "--quiet", "--python", installed["environment"])
    assert sum(each.stat().st_size for each in installed["environment"].rglob("*.*")) < MAX_BYTES


def test_a_program_that_imports_it_needs_no_terminal(installed: Mapping[str, Path]) -> None:
    program = (
        "import sys; from agentloop import AsyncClient, Client, errors;"
        " print(sorted({'typer', 'rich', 'pydantic', 'agentloop.v1.inference_pb2'} & set(sys.modules)))"
    )
    assert run(installed["bin"] / "python", "-c", program).strip() == "['agentloop.v1.inference_pb2']"


def test_its_command_line_asks_a_server(installed: Mapping[str, Path]) -> None:
    command = installed["bin"] / "agent-loop"
    assert "infer" in run(command, "--help")
    assert run(command, "--version").strip() == "0.1.0"
    with running(ScriptedService()) as service:
        answer = run(command, "--server", service.address, "infer", "hello", AGENTLOOP_TOKEN="al_x")
        (asked,) = service.asked
    assert answer == "ok\n"
    assert isinstance(asked, inference_pb2.ChatRequest)
