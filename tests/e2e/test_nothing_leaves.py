"""Nothing leaves the machine, and nothing tries to: seen from a sink at the only way out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HOME = Path(__file__).resolve().parents[2]
TRIED_TO_LEAVE = 97

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
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Run(ended.returncode, ended.stdout, json.loads(report.read_text()))


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
    before = set(Path("/run/netns").iterdir())
    assert offline(tmp_path, *python("raise SystemExit(7)")).code == 7
    assert set(Path("/run/netns").iterdir()) == before
