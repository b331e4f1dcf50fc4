"""Asks a server through `agent-loop`, the command line that operators use too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

# `agent-loop`'s exit codes that mean something to a rollout (see `agent-loop --help`).
CONFLICT = 3
UNAVAILABLE = 5

CONNECTION: Mapping[str, Mapping[str, Any]] = {
    "server": {"type": "str", "default": ""},
    "token_file": {"type": "path"},
    "command": {"type": "path", "default": "agent-loop"},
}


class Runner(Protocol):
    """The part of AnsibleModule that is used here."""

    params: dict[str, Any]

    def run_command(self, args: Sequence[str]) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        ...


class CommandFailedError(Exception):
    """`agent-loop` failed: its exit code and what it said."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def agent_loop(runner: Runner, *arguments: str) -> dict[str, Any]:
    """The JSON object that `agent-loop <arguments> --json` prints.

    The token is read by the command from its file, or from AGENTLOOP_TOKEN, and so never is an argument.

    Raises:
        CommandFailedError: the command failed, or printed something else.
    """
    options = [f"--server={runner.params['server']}"] if runner.params["server"] else []
    if runner.params["token_file"]:
        options.append(f"--token-file={runner.params['token_file']}")
    command = [runner.params["command"], *options, *arguments, "--json"]
    code, out, err = runner.run_command(command)
    if code != 0:
        raise CommandFailedError(code, _message(err) or f"{Path(command[0]).name} ended with {code}")
    try:
        answer = json.loads(out)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise CommandFailedError(
            1, f"`{' '.join(['agent-loop', *arguments])}` printed no JSON object: {out[:200]!r}"
        )
    return answer


def _message(err: str) -> str:
    """What the command's error, a line of JSON, says; else its text."""
    for line in reversed(err.strip().splitlines()):
        try:
            error = json.loads(line)["error"]
            return f"{error['status']}: {error['message']}"
        except (ValueError, KeyError, TypeError):
            continue
    return err.strip()
