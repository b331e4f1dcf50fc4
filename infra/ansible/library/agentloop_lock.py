"""Ansible module: one operator at a time. Its action plugin runs this file, here and where the lock is.

`hold PATH RECORD`, on the host of the lock: takes it, or tells who has it, in one line of JSON; then keeps it
until standard input ends. `watch PID COMMAND…`, beside Ansible: runs that over SSH for as long as the process
PID lives. So the lock goes when a run ends, however it ends. Standard library only.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone

DOCUMENTATION = r"""
---
module: agentloop_lock
short_description: Be the only one who changes these hosts
description:
  - Takes a lock on the host that it is delegated to, and keeps it until this run of Ansible ends, however
    it ends.
  - Where another run has it, the task fails, and says who that is, since when, and how to break it.
  - Played again by the same run it sees that the lock is still there, and fails if somebody broke it.
  - It needs SSH with keys (or a local connection), and python3 there.
version_added: "0.1.0"
options:
  path:
    description: The lock's file.
    type: path
    default: /run/lock/agentloop-operator
attributes:
  check_mode:
    support: full
    description: Takes no lock.
  diff_mode:
    support: none
author:
  - agent-loop-service contributors
"""

EXAMPLES = r"""
- name: Be the only one at work
  agentloop_lock:
  delegate_to: gateway1
  run_once: true
"""

GRACE_SECONDS = 5.0
"""What the command that holds gets to end in, once it is told to."""


def hold(path: str, record: dict[str, str]) -> int:
    """Take the lock and keep it until standard input ends; 0, or 1 if somebody else has it.

    Prints `{"held": true}`, or `{"taken": record}` of who has it: record, with `pid` and `since`.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(json.dumps({"taken": _record(os.pread(file, 65536, 0))}), flush=True)
        return 1
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")  # noqa: UP017 - whatever Python there is
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps({**record, "pid": os.getpid(), "since": since}).encode(), 0)
    print(json.dumps({"held": True}), flush=True)
    while os.read(0, 4096):
        pass
    return 0


def _record(text: bytes) -> dict[str, object]:
    with suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    return {}  # it has the lock since this moment, and has not said who it is


def watch(pid: int, command: Sequence[str]) -> int:
    """Run the command while the process `pid` lives, then end it; the command's exit code.

    The first line of standard input (a password, or empty) is passed on; the command's input stays open.
    """
    told = sys.stdin.buffer.readline()
    holder = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert holder.stdin is not None  # noqa: S101 - for mypy: it was asked for
    with suppress(BrokenPipeError):
        if told.strip():
            holder.stdin.write(told)
            holder.stdin.flush()
    ends = select.poll()
    for each in (pid, holder.pid):
        with suppress(ProcessLookupError):
            ends.register(os.pidfd_open(each), select.POLLIN)
            continue
        holder.terminate()  # it ended before we looked
    ends.poll()
    with suppress(BrokenPipeError):
        holder.stdin.close()
    try:
        return holder.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        holder.kill()
        return holder.wait()


def begin(arguments: Sequence[str]) -> int:
    """What the command line says; the exit code."""
    what, first, *rest = arguments
    return hold(first, json.loads(rest[0])) if what == "hold" else watch(int(first), rest)


if __name__ == "__main__":
    sys.exit(begin(sys.argv[1:]))
