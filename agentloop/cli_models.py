"""`agent-loop models`: which model versions are installed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from agentloop.cli_session import USAGE, JsonOption, print_json, printable, session
from agentloop.types import InstallProgress, ModelVersion

app = typer.Typer(no_args_is_help=True, help="Install, load, show, unload and remove model versions.")


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
def show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="`<model>:<cycle id>`.")],
    as_json: JsonOption = False,
) -> None:
    """Show a model version: parameters, quantization, context, where it comes from, who leads to it."""
    with session(context).client(as_json=as_json) as client:
        details = client.get_model(name)
    if as_json:
        print_json(asdict(details))
        return
    model = details.model
    rows = {
        "sha256": model.sha256,
        "size": f"{model.size_bytes / 1e6:.0f} MB",
        "loaded": "yes" if model.loaded else "no",
        "architecture": details.architecture,
        "parameters": f"{details.parameters / 1e6:,.0f} million",
        "quantization": details.quantization,
        "context": f"{details.context_tokens} tokens",
        "made by cycle": details.cycle_id or "none: an untouched base",
        "trained from": details.base or "-",
        "aliases": ", ".join(details.aliases) or "none",
    }
    table = Table("model version", printable(model.name, to_terminal=True))
    for what, value in rows.items():
        table.add_row(what, Text(printable(value, to_terminal=True)))
    Console().print(table)


@app.command()
def load(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="`<model>:<cycle id>`.")],
    timeout: Annotated[float, typer.Option(help="Seconds.", min=1)] = 1800,
    as_json: JsonOption = False,
) -> None:
    """Bring an installed model version into the engine's memory."""
    with session(context).client(as_json=as_json) as client:
        model, changed = client.load_model(name, timeout_s=timeout)
    _report(model, changed, "loaded", "was loaded already", as_json=as_json)


@app.command()
def unload(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="`<model>:<cycle id>`.")],
    force: Annotated[bool, typer.Option(help="Although a route leads to it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Free a model version's memory; it stays installed."""
    with session(context).client(as_json=as_json) as client:
        model, changed = client.unload_model(name, force=force)
    _report(model, changed, "unloaded", "was not loaded", as_json=as_json)


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
    with session(context).client(as_json=as_json) as client, _bar(hidden=as_json) as tell:
        model, changed = client.install_model(
            name, absolute, sha256.lower(), on_progress=tell, timeout_s=timeout
        )
    _report(model, changed, "installed", "was installed already", as_json=as_json)


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


def _report(model: ModelVersion, changed: bool, done: str, before: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"changed": changed, "model": asdict(model)})
    else:
        typer.echo(f"{model.name} {done if changed else before}")


@contextmanager
def _bar(*, hidden: bool) -> Iterator[Callable[[InstallProgress], None]]:
    """A bar on stderr, where that is a terminal; it is told how far the installation is."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=hidden or not console.is_terminal) as bars:
        bar = bars.add_task("waiting", total=None)

        def tell(progress: InstallProgress) -> None:
            where = f", host {progress.host} of {progress.hosts}" if progress.hosts > 1 else ""
            bars.update(
                bar,
                description=f"{progress.phase}{where}",
                completed=progress.done_bytes,
                total=progress.total_bytes or None,
            )

        yield tell


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
