"""The images, built for real and run as they will be: read-only, confined, without network (`make soak`).

It needs podman or docker.
"""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agentloop import Client, Sampling
from scripts import images, sbom
from scripts.containers import Containers
from scripts.release import make
from tests.hosts import ROOT

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def program() -> Containers:
    return Containers.found()


@pytest.fixture(scope="module")
def release() -> tuple[str, Path]:
    return make(ROOT, ROOT / "var/releases")


def built(release: tuple[str, Path], *targets: str) -> dict[str, str]:
    return {each: found["name"] for each, found in images.build(targets, release[1], release[0]).items()}


@contextmanager
def run_of(program: Containers, image: str, *options: str) -> Iterator[str]:
    """A container that runs, by name; what it wrote is gone with it."""
    name = f"agentloop-test-{secrets.token_hex(4)}"
    confined = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "all", "--security-opt", "no-new-privileges")
    program.output("run", "--detach", "--name", name, "--network", "host", *confined, *options, image)
    try:
        yield name
    finally:
        program.output("rm", "--force", "--volumes", name)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def until_healthy(program: Containers, name: str, seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while subprocess.run(program.command("healthcheck", "run", name), capture_output=True).returncode:
        if time.monotonic() > until:
            raise AssertionError(program.output("logs", name))
        time.sleep(1)


def test_the_server_serves_from_a_read_only_root_as_nobody_in_particular(
    program: Containers, release: tuple[str, Path], base_gguf: Path, tmp_path: Path
) -> None:
    made = built(release, "server", "postgres")
    (tmp_path / "password").write_text("a password's own & odd characters")
    port, grpc, http = free_port(), free_port(), free_port()
    with run_of(
        program,
        made["postgres"],
        *("--env", f"PGPORT={port}", "--env", "POSTGRES_PASSWORD_FILE=/run/password"),
        *("--volume", f"{tmp_path}/password:/run/password:ro", "--volume", "/srv/postgres"),
    ) as database:
        until_healthy(program, database)
        url = (
            f"postgresql://agentloop:a%20password's%20own%20%26%20odd%20characters@127.0.0.1:{port}/agentloop"
        )
        settings = {
            "DATABASE_URL": url,
            "GRPC_ADDRESS": f"127.0.0.1:{grpc}",
            "HTTP_ADDRESS": f"127.0.0.1:{http}",
            "SERVER": f"127.0.0.1:{grpc}",
            "BASE_GGUF": "/srv/agentloop/base.gguf",
        }
        with run_of(
            program,
            made["server"],
            *(word for name, value in settings.items() for word in ("--env", f"AGENTLOOP_{name}={value}")),
            *("--volume", f"{base_gguf}:/srv/agentloop/base.gguf:ro", "--volume", "/srv/agentloop/var"),
        ) as server:
            until_healthy(program, server)
            token = program.output(
                *("exec", server, "python", "-m", "grpc_server", "tokens", "create"),
                *("--name", "image", "--scopes", "infer"),
            ).strip()
            with Client(f"127.0.0.1:{grpc}", token=token) as client:
                assert client.ask("Say hello.", sampling=Sampling(max_tokens=8)).completed.output_tokens > 0
            assert program.output("exec", server, "id", "--user").strip() == "10001"
            program.output("stop", "--time", "30", server)
            assert json.loads(program.output("inspect", server))[0]["State"]["ExitCode"] == 0
    bill = json.loads(sbom.of_image(program, made["server"]))
    purls = {each["purl"].split("@")[0] for each in bill["components"]}
    assert {"pkg:pypi/agentloop", "pkg:pypi/grpcio", "pkg:deb/debian/libc6"} <= purls
    assert not purls & {"pkg:pypi/torch", "pkg:pypi/uv", "pkg:pypi/pip"}
