"""What the module agentloop_lock does on the machine where Ansible runs."""

from __future__ import annotations

import fcntl
import getpass
import json
import multiprocessing
import os
import select
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ansible import constants, context
from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

HOLDER = Path(__file__).resolve().parents[2] / "library/agentloop_lock.py"
ANSWER_SECONDS = 60.0
"""A host that has not answered after so long has a network or a sudo that hangs."""


class LockError(Exception):
    """There is no lock; the text says why, and what to do."""


class ActionModule(ActionBase):  # type: ignore[misc]  # Ansible has no types
    """Takes the lock for this run, or sees that it has it."""

    TRANSFERS_FILES = False
    _supports_check_mode = True

    def run(self, tmp: None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """The task's result."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, asked = self.validate_argument_spec(
            {"path": {"type": "path", "default": "/run/lock/agentloop-operator"}}
        )
        if self._task.check_mode:
            return {**result, "changed": False, "msg": "check mode takes no lock"}
        host = (task_vars or {}).get("inventory_hostname", "")
        host = self._task.delegate_to or host
        parent = multiprocessing.parent_process()
        try:
            password = sudo_password(self._connection)
            words = [*sudo(self._connection, password), "python3", "-c", HOLDER.read_text(), "hold"]
            take(
                # Of this run alone, and gone with it.
                Path(constants.DEFAULT_LOCAL_TMP) / f"agentloop-lock-{host}",
                os.getpid() if parent is None else parent.pid or os.getpid(),
                reach(self._connection, [*words, asked["path"], json.dumps(who())]),
                password,
                host,
            )
        except LockError as error:
            raise AnsibleActionFail(str(error)) from None
        return {**result, "changed": False}


def who() -> dict[str, str]:
    """Who asks, where, and with which playbook."""
    playbooks = [Path(name).name for name in context.CLIARGS.get("args") or ()]
    user = os.environ.get("SUDO_USER") or getpass.getuser()
    return {"who": user, "at": socket.gethostname(), "playbook": ", ".join(playbooks)}


def sudo_password(connection: Any) -> str:
    """That of sudo on the lock's host, if it wants one."""
    return str(connection.become.get_option("become_pass") or "") if connection.become else ""


def sudo(connection: Any, password: str) -> list[str]:
    """The words that make a command root's, as the inventory says.

    Raises:
        LockError: another way than sudo is wanted.
    """
    if connection.become is None:
        return []
    if not connection.become.name.endswith("sudo"):
        raise LockError(f"the lock can become root by sudo only, and not by {connection.become.name}")
    return ["sudo", "-S", "-p", ""] if password else ["sudo", "-n"]


def reach(connection: Any, words: Sequence[str]) -> list[str]:
    """The command that runs `words` on the lock's host.

    Raises:
        LockError: the connection is neither SSH with keys nor local.
    """
    if connection.transport == "local":
        return list(words)
    if connection.transport != "ssh" or connection.get_option("password"):
        raise LockError("the lock needs a connection by SSH with keys, without a password")
    connection.host = connection.get_option("host")
    command = connection._build_command(
        connection.get_option("ssh_executable"), "ssh", connection.host, shlex.join(words)
    )
    return [os.fsdecode(word) for word in command]


def take(mine: Path, run: int, command: Sequence[str], password: str, host: str) -> None:
    """Have the lock for as long as the process `run` lives; nothing, if this run has it already.

    Args:
        mine: a file of this run; whoever holds the lock for it has this file locked.
        run: the process whose end ends the lock.
        command: runs `hold` on the lock's host.
        password: of sudo there, if it wants one.
        host: its name, for messages.

    Raises:
        LockError: somebody else has it; somebody broke ours; the host does not do as it should.
    """
    file = os.open(mine, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if os.fstat(file).st_size:
            raise LockError(
                f"the lock of this run, on {host}, was broken, or the connection to it was lost; another"
                " operator may be at work. Nothing more is changed: see who is, and play this again"
            )
        _hold(file, run, command, password, host)
        os.write(file, b"held")
    finally:
        os.close(file)


def _hold(file: int, run: int, command: Sequence[str], password: str, host: str) -> None:
    """Start the watcher, which has `file` locked while it lives, and hear what it says."""
    watcher = subprocess.Popen(
        [sys.executable, str(HOLDER), "watch", str(run), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[file],
        start_new_session=True,
    )
    assert watcher.stdin and watcher.stdout and watcher.stderr  # noqa: S101 - for mypy: they were asked for
    watcher.stdin.write(password.encode() + b"\n")
    watcher.stdin.close()
    said = watcher.stdout.readline() if select.select([watcher.stdout], [], [], ANSWER_SECONDS)[0] else b""
    try:
        answer: dict[str, Any] = json.loads(said)
    except ValueError:
        watcher.terminate()
        # SSH's shared connection goes on in the background with this pipe open: its end never comes.
        os.set_blocking(watcher.stderr.fileno(), False)
        told = " ".join((watcher.stderr.read() or b"").decode(errors="replace").split())
        raise LockError(
            f"the lock on {host} could not be taken: {told or f'no answer within {ANSWER_SECONDS:g} s'}"
        ) from None
    if "held" not in answer:
        raise LockError(taken(answer["taken"], host))


def taken(by: dict[str, Any], host: str) -> str:
    """What an operator reads when somebody else has the lock."""
    if not by:
        return "somebody else has begun to work on these hosts this very moment; try again"
    return (
        f"{by.get('who')} at {by.get('at')} is at work on these hosts since {by.get('since')}"
        f" ({by.get('playbook')}). Wait for the end of that run. If it hangs, break its lock, on {host}:"
        f" sudo kill {by.get('pid')}. That run stops before its next batch of hosts"
    )
