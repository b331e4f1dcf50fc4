"""Two operators at once, with real runs of Ansible whose hosts are this machine (`make soak`)."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.estate import ANSIBLE

pytestmark = pytest.mark.soak

SECONDS = 120.0
PLAYBOOK = """
- name: Hosts in batches
  hosts: all
  gather_facts: false
  serial: 1
  tasks:
    - name: Be the only one at work
      agentloop_lock: {{path: {lock}}}
      delegate_to: one
      run_once: true
    - name: Work
      ansible.builtin.wait_for: {{path: {go}, timeout: 100}}
"""


class Estate:
    """Two hosts that are this machine, and a playbook that works on each until it may go on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.go = folder, folder / "go"
        text = PLAYBOOK.format(lock=folder / "lock", go=self.go)
        (folder / "deploy.yml").write_text(text)
        local = f"ansible_connection=local ansible_python_interpreter={sys.executable}"
        (folder / "hosts").write_text(f"one {local}\ntwo {local}\n")

    @contextmanager
    def run(self) -> Iterator[subprocess.Popen[str]]:
        """Ansible, while the block runs."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("ANSIBLE_")}
        process = subprocess.Popen(
            [sys.executable, "-m", "ansible", "playbook", "deploy.yml", "--inventory", "hosts"],
            cwd=self.folder,
            env=kept
            | {
                "ANSIBLE_CONFIG": str(ANSIBLE / "ansible.cfg"),
                "ANSIBLE_HOME": str(self.folder / "ansible"),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=SECONDS)

    def said(self, process: subprocess.Popen[str]) -> str:
        """What it says until its end."""
        out, _ = process.communicate(timeout=SECONDS)
        return " ".join(out.split())

    def at_work(self, process: subprocess.Popen[str]) -> None:
        """Return when it has the lock, and works."""
        assert process.stdout is not None
        assert any("TASK [Work]" in line for line in process.stdout)


def test_the_second_is_told_and_a_broken_lock_stops_the_first_before_its_next_host(tmp_path: Path) -> None:
    estate = Estate(tmp_path)
    with estate.run() as first:
        estate.at_work(first)
        with estate.run() as second:
            said = estate.said(second)
            assert second.returncode == 2
        told = re.search(
            r"at work on these hosts since \S+ \(deploy\.yml\).* on one: sudo kill (\d+)\.", said
        )
        assert told is not None, said
        os.kill(int(told[1]), signal.SIGTERM)
        estate.go.touch()
        said = estate.said(first)
        assert first.returncode == 2
        assert "was broken, or the connection to it was lost" in said
        assert re.search(r"one : ok=2 .* two : ok=0 ", said), said


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    estate = Estate(tmp_path)
    with estate.run() as killed:
        estate.at_work(killed)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    estate.go.touch()
    until = time.monotonic() + SECONDS
    while True:
        with estate.run() as again:
            said = estate.said(again)
        if again.returncode == 0:
            break
        assert "at work on these hosts" in said
        assert time.monotonic() < until
