"""`agent-loop models`: which model versions are installed."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from agentloop.cli_session import USAGE, JsonOption, print_json, session

app = typer.Typer(no_args_is_help=True, help="Install, list and remove model versions.")


@app.command("list")
def list_models(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the installed model versions."""
    with session(context).client(as_json=as_json) as client:
        models = client.list_models()
    if as_json:
        print_json({"models": [asdict(model) for model in models]})
        return
    table = Table("model version", "MB", "loaded", "sha256")
    for model in models:
        table.add_row(
            model.name, f"{model.size_bytes / 1e6:.0f}", "yes" if model.loaded else "no", model.sha256[:12]
        )
    Console().print(table)


@app.command()
def install(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="`<model>:<cycle id>`.")],
    path: Annotated[Path, typer.Argument(help="The GGUF, on the server's host.")],
    sha256: Annotated[
        str, typer.Option(help="Expected SHA-256; computed from the file if it is readable here.")
    ] = "",
    timeout: Annotated[float, typer.Option(help="Seconds.", min=1)] = 1800,
    as_json: JsonOption = False,
) -> None:
    """Install a GGUF as a model version; the same name and bytes again change nothing."""
    if not sha256:
        if not path.is_file():
            typer.echo(f"{path} is not a file here: give its --sha256", err=True)
            raise typer.Exit(USAGE)
        sha256 = _sha256(path)
    absolute = path if path.is_absolute() else path.resolve()
    with session(context).client(as_json=as_json) as client:
        model, changed = client.install_model(name, absolute, sha256.lower(), timeout_s=timeout)
    if as_json:
        print_json({"changed": changed, "model": asdict(model)})
    else:
        typer.echo(f"{model.name} {'installed' if changed else 'was installed already'}")


@app.command()
def remove(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="`<model>:<cycle id>`.")],
    as_json: JsonOption = False,
) -> None:
    """Delete a model version that no route names."""
    with session(context).client(as_json=as_json) as client:
        changed = client.remove_model(name)
    if as_json:
        print_json({"changed": changed, "name": name})
    else:
        typer.echo(f"{name} {'removed' if changed else 'was not installed'}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
