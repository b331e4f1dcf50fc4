#!/usr/bin/env python3
"""When the backups of Postgres ended, as a text file for Prometheus' node exporter.

    python3 backup_age.py /var/lib/prometheus/node-exporter/agentloop_backup.prom

Run it by a timer on the host that has the backups' repository, as the user of pgBackRest. It asks
`pgbackrest --output=json info` (https://pgbackrest.org/command.html#command-info). Where that fails, the file
stays as it was: the backup that it tells of grows old, and the alert AgentloopBackupOld fires.

Standard library only: it runs with whatever Python the host has (3.9 or later). Exit: 0 done, 1 failed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

INFO = "pgbackrest --output=json info"
NAME = "agentloop_backup_ended_timestamp_seconds"
SECONDS = 60.0


def figures(info: Any) -> str:
    """Prometheus' text for what `pgbackrest info` tells: for each stanza and type, the newest good backup.

    Raises:
        ValueError: if it is not what pgBackRest tells.
    """
    newest: dict[tuple[str, str], float] = {}
    try:
        for stanza in info:
            for backup in stanza["backup"]:
                if not backup.get("error"):  # else it has pages whose checksum was wrong
                    key = (str(stanza["name"]), str(backup["type"]))
                    newest[key] = max(newest.get(key, 0.0), float(backup["timestamp"]["stop"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"not what pgbackrest info tells ({type(error).__name__}: {error}): is it pgBackRest 2?"
        ) from error
    lines = [f"# HELP {NAME} When the newest good backup of a type ended.", f"# TYPE {NAME} gauge"]
    lines += [
        f'{NAME}{{stanza="{_escaped(stanza)}",type="{_escaped(kind)}"}} {ended:.0f}'
        for (stanza, kind), ended in sorted(newest.items())
    ]
    return "\n".join(lines) + "\n"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def ask(command: str) -> Any:
    """What the command prints, read as JSON.

    Raises:
        ValueError: if it fails, or does not answer within SECONDS, or prints no JSON.
    """
    try:
        done = subprocess.run(
            shlex.split(command), capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"`{command}` did not answer: {error}") from error
    if done.returncode != 0:
        raise ValueError(f"`{command}` failed with {done.returncode}: {done.stderr.strip()}")
    try:
        return json.loads(done.stdout)
    except ValueError as error:
        raise ValueError(f"`{command}` printed no JSON: {error}") from error


def write(path: Path, text: str) -> None:
    """Write a file that the exporter never sees half-written."""
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
    ) as building:
        try:
            building.write(text)
            building.flush()
            Path(building.name).chmod(0o644)
            Path(building.name).replace(path)
        finally:
            with suppress(FileNotFoundError):
                Path(building.name).unlink()


def main(arguments: list[str] | None = None) -> int:
    """Ask and write; the exit code."""
    parser = argparse.ArgumentParser(description="Write when the backups of Postgres ended, for Prometheus.")
    parser.add_argument("file", type=Path, help="the text file, in the node exporter's textfile directory")
    parser.add_argument("--info", default=INFO, help=f"the command that is asked (default: {INFO})")
    asked = parser.parse_args(arguments)
    try:
        write(asked.file, figures(ask(asked.info)))
    except (OSError, ValueError) as error:
        print(f"{asked.file} was not written: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
