"""`agent-loop replay` and `unlearn`: run by the nights' program, which has what a light client lacks."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import typer

from agentloop.cli_session import FAILED

ALL_OPTIONS = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
"""Of a command whose options, and help, are those of the program that runs it."""


def replay(context: typer.Context) -> None:
    """Ask any model version a cycle's past requests, beside the answers then: `python -m training replay`."""
    hand_over("training", "replay", context.args)


def unlearn(context: typer.Context) -> None:
    """Erase, train again without those rows, judge, roll out, with evidence: `python -m training unlearn`."""
    hand_over("training", "unlearn", context.args)


def hand_over(module: str, command: str, arguments: list[str]) -> None:
    """Become `python -m <module> <command>`; ends the command where that is not installed."""
    if find_spec(module) is None:
        typer.echo(
            f"`{module}` is not installed here: run this in the service's checkout, where the nights run",
            err=True,
        )
        raise typer.Exit(FAILED)
    os.execv(sys.executable, [sys.executable, "-m", module, command, *arguments])  # noqa: S606
