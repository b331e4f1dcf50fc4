"""Playbooks are tested on whole Debian hosts, of which nothing is left (`make soak`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosts import ROOT, hosts

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

KILLED = """
import os, signal, sys
from pathlib import Path
from tests.hosts import hosts
with hosts(Path(sys.argv[1]), ["left"]) as left:
    print(left["left"].namespace, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def processes_of(namespace: str) -> str:
    """Of a host, on this machine."""
    return subprocess.run(["pgrep", "-f", f"netns/{namespace}( |$)"], capture_output=True, text=True).stdout


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def test_hosts_run_systemd_reach_each_other_and_nobody_else_and_leave_nothing(tmp_path: Path) -> None:
    with hosts(tmp_path, ["one", "two"]) as there:
        one, two = there["one"], there["two"]
        assert one.run("systemctl is-system-running --wait", check=False).strip() == "running"
        assert one.run("hostname").strip() == "one"
        assert two.run("id --user --name").strip() == "root"
        assert "SSH-2.0" in one.run("timeout 5 bash -c 'head -1 </dev/tcp/two/22'")
        assert "default" not in one.run("ip route")
        one.run("apt-get install --yes --quiet haproxy && systemctl is-active haproxy")
        one.run("touch /etc/changed")
        one.lose()
        assert two.run("timeout 5 bash -c ': </dev/tcp/one/22' || echo lost").strip() == "lost"
        one.boot()
        one.wait()
        assert one.run("ls /etc/changed", check=False) == ""
        names = [host.namespace for host in there.values()]
        assert all(processes_of(name) for name in names)
    assert not any(processes_of(name) for name in names)
    assert not any(name in namespaces() for name in names)


def test_what_a_killed_run_left_goes_with_the_next(tmp_path: Path) -> None:
    (tmp_path / "killed").mkdir()
    (tmp_path / "next").mkdir()
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "killed"], cwd=ROOT, capture_output=True, text=True
    )
    name = killed.stdout.strip()
    assert processes_of(name), killed.stderr
    with hosts(tmp_path / "next", []):
        assert not processes_of(name)
        assert name not in namespaces()
