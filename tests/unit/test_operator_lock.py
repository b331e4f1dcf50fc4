"""Two operators at once: the second is told who the first is; the lock goes with the run that has it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.ansible_modules import agentloop_lock, agentloop_lock_action

HOLDER = str(agentloop_lock_action.HOLDER)
ADA = {"who": "ada", "at": "laptop1", "playbook": "deploy.yml"}
SECONDS = 20.0


@contextmanager
def run_of_ansible() -> Iterator[subprocess.Popen[bytes]]:
    """Stands for ansible-playbook, which a test may kill."""
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            yield process
        finally:
            process.kill()


def take(folder: Path, run: int, who: dict[str, str], *, name: str = "mine", password: str = "") -> None:
    """As the action plugin does for a run of `who`, without SSH."""
    command = [sys.executable, HOLDER, "hold", str(folder / "lock"), json.dumps(who)]
    agentloop_lock_action.take(folder / name, run, command, password, "gateway1")


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_free(folder: Path) -> bool:
    with (folder / "lock").open() as file, contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def test_the_second_operator_is_told_who_is_at_work_since_when_and_how_to_break_it(tmp_path: Path) -> None:
    with run_of_ansible() as first:
        take(tmp_path, first.pid, ADA)
        pid = json.loads((tmp_path / "lock").read_text())["pid"]
        with pytest.raises(agentloop_lock_action.LockError) as refused:
            take(tmp_path, os.getpid(), {"who": "bob", "at": "laptop2", "playbook": "site.yml"}, name="bobs")
        assert str(refused.value).startswith("ada at laptop1 is at work on these hosts since 20")
        assert "(deploy.yml). Wait for the end of that run." in str(refused.value)
        assert f"break its lock, on gateway1: sudo kill {pid}." in str(refused.value)


def test_a_lock_goes_with_a_killed_run_and_the_same_run_has_it_but_once(tmp_path: Path) -> None:
    with run_of_ansible() as first:
        take(tmp_path, first.pid, ADA, password="secret")
        take(tmp_path, first.pid, ADA)
        assert not is_free(tmp_path)
        first.kill()
        first.wait()
        until(lambda: is_free(tmp_path))


def test_a_run_whose_lock_was_broken_changes_nothing_more(tmp_path: Path) -> None:
    with run_of_ansible() as first:
        take(tmp_path, first.pid, ADA)
        os.kill(json.loads((tmp_path / "lock").read_text())["pid"], 15)

        def told() -> bool:
            try:
                take(tmp_path, first.pid, ADA)
            except agentloop_lock_action.LockError as error:
                return "was broken, or the connection to it was lost" in str(error)
            return False

        until(told)


def test_a_host_that_cannot_lock_says_why(tmp_path: Path) -> None:
    with pytest.raises(agentloop_lock_action.LockError, match=r"on gateway1 could not be taken: .*password"):
        agentloop_lock_action.take(
            tmp_path / "mine",
            os.getpid(),
            ["sh", "-c", "echo sudo: a password is required >&2"],
            "",
            "gateway1",
        )


@pytest.mark.parametrize("text", [b"", b"\0", b"[]", b'{"who": '])
def test_a_record_that_is_not_whole_names_nobody(text: bytes) -> None:
    assert agentloop_lock._record(text) == {}
    assert "this very moment; try again" in agentloop_lock_action.taken({}, "gateway1")


class Ssh:
    """An SSH connection as the action plugin sees it."""

    transport = "ssh"

    def __init__(self, *, password: str = "", become: str = "sudo", sudo_password: str = "") -> None:
        self.options = {"password": password, "host": "198.18.0.1", "ssh_executable": "ssh"}
        self.become = SimpleNamespace(name=become, get_option=lambda name: sudo_password)

    def get_option(self, name: str) -> str:
        return self.options[name]

    def _build_command(self, binary: str, subsystem: str, *words: str) -> list[bytes]:
        return [word.encode() for word in (binary, "-o", "User=ada", *words)]


def test_the_lock_is_reached_over_ssh_as_the_inventory_says() -> None:
    connection = Ssh()
    words = [*agentloop_lock_action.sudo(connection, ""), "python3", "-c", "a 'b'"]
    reached = agentloop_lock_action.reach(connection, words)
    assert reached == ["ssh", "-o", "User=ada", "198.18.0.1", """sudo -n python3 -c 'a '"'"'b'"'"''"""]
    with_password = Ssh(sudo_password="secret")
    assert agentloop_lock_action.sudo_password(with_password) == "secret"
    assert agentloop_lock_action.sudo(with_password, "secret") == ["sudo", "-S", "-p", ""]


def test_what_the_lock_cannot_do_is_said() -> None:
    with pytest.raises(agentloop_lock_action.LockError, match="by sudo only, and not by doas"):
        agentloop_lock_action.sudo(Ssh(become="doas"), "")
    with pytest.raises(agentloop_lock_action.LockError, match="SSH with keys"):
        agentloop_lock_action.reach(Ssh(password="secret"), [])


def action(folder: Path, monkeypatch: pytest.MonkeyPatch, *, check: bool = False) -> Any:
    """The action plugin of a task on this machine."""
    monkeypatch.setattr(agentloop_lock_action.constants, "DEFAULT_LOCAL_TMP", str(folder))
    connection = SimpleNamespace(transport="local", become=None, _shell=SimpleNamespace(tmpdir=None))
    task = SimpleNamespace(
        args={"path": str(folder / "lock")}, delegate_to=None, check_mode=check, async_val=0, action="lock"
    )
    return agentloop_lock_action.ActionModule(task, connection, None, None, None, None)


def test_a_task_takes_the_lock_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = action(tmp_path, monkeypatch).run(task_vars={"inventory_hostname": "gateway1"})
    assert done["changed"] is False
    assert set(json.loads((tmp_path / "lock").read_text())) == {"who", "at", "playbook", "pid", "since"}
    # Another run, which has files of its own.
    (tmp_path / "other").mkdir()
    other = action(tmp_path / "other", monkeypatch)
    other._task.args["path"] = str(tmp_path / "lock")
    with pytest.raises(agentloop_lock_action.AnsibleActionFail, match="is at work on these hosts since"):
        other.run(task_vars={"inventory_hostname": "gateway1"})


def test_check_mode_takes_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = action(tmp_path, monkeypatch, check=True).run()
    assert done["changed"] is False
    assert not (tmp_path / "lock").exists()
