"""The registry between the nights: its pages (`mlflow`), and the mark on what serves (`mark`)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from training.cli_session import AsJson, DatabaseUrl, MlflowUri, StateDir, explained, say

app = typer.Typer()


@app.command()
def mlflow(
    port: Annotated[int, typer.Option(min=1, max=65535, help="On 127.0.0.1 only.")] = 5000,
    mlflow_uri: MlflowUri = "",
    database_url: DatabaseUrl = "",
    state_dir: StateDir = Path("var"),
) -> None:
    """Serve MLflow's pages on this host alone, on the registry that the nights write; `make mlflow`."""
    from training import register

    with explained():
        uri = register.database(mlflow_uri, database_url, state_dir)
    typer.echo(f"http://127.0.0.1:{port} (Ctrl-C ends it)")
    # The address may hold a password: it travels in the environment, which `ps` does not show.
    environment = {**os.environ, **register.QUIET, "MLFLOW_BACKEND_STORE_URI": uri}
    # Its jobs judge answers by models, which nothing here asks for: processes less.
    environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    words = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    os.execve(sys.executable, [sys.executable, *words, "--no-serve-artifacts"], environment)  # noqa: S606


@app.command()
def mark(
    serving: Annotated[str, typer.Argument(help="The model version that the route leads to now.")],
    or_none: Annotated[
        bool,
        typer.Option("--or-none", help="Where the registry does not have it, no version keeps the mark."),
    ] = False,
    mlflow_uri: MlflowUri = "",
    database_url: DatabaseUrl = "",
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Put the champion's mark on what serves; rollouts and rollbacks call this."""
    from training import register

    with explained():
        uri = register.database(mlflow_uri, database_url, state_dir)
        moved = register.mark(uri, serving, or_none=or_none)
    say({"moved": moved}, as_json, f"champion: {'moved' if moved else 'was there already'}.")
