"""`python -m training with-gpu`: a command on the GPU that the server lends."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from training import lease
from training.cli_session import Server, Token, TokenFile, explained

if TYPE_CHECKING:
    from pathlib import Path

app = typer.Typer()


@app.command("with-gpu", context_settings={"ignore_unknown_options": True})
def with_gpu(
    command: Annotated[list[str], typer.Argument(help="After --: what to run.", metavar="COMMAND...")],
    server: Server = None,
    token: Token = None,
    token_file: TokenFile = None,
) -> None:
    """Run a command on the GPU that the server beside it lends (AGENTLOOP_GPU_HANDOVER there).

    Exit codes: the command's; 75 if serving took the GPU back: start it again, a training goes on. Needs a
    token of the scope models:write.
    """
    leased(command, server, token, token_file)


def wanted() -> bool:
    """Whether a training is to ask for the GPU: the setting says so, and it has not yet."""
    return os.environ.get("AGENTLOOP_GPU_HANDOVER", "off") not in ("", "off") and lease.ours() is None


def leased(
    command: Sequence[str],
    server: str | None = None,
    token: str | None = None,
    token_file: Path | None = None,
) -> NoReturn:
    """Run it under a lease, and end as it ends."""
    from agentloop import Client
    from training import with_gpu as held

    def say(text: str) -> None:
        typer.echo(text, err=True)

    with explained(), Client(server, token, token_file=token_file) as client:
        code = held.run(command, client, os.environ, say)
    sys.exit(code if code >= 0 else 128 - code)
