"""`python -m grpc_server`: serve, show the configuration, migrate, keep a Postgres, make tokens."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from pydantic import SecretStr, ValidationError

from grpc_server.settings import Settings, explain
from grpc_server.settings_sources import PREFIX, origins

FAILED = 1
USAGE = 2

app = typer.Typer(
    help="The server of the loop, and what its operators need.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.command()
def serve(
    migrate: Annotated[
        bool, typer.Option("--migrate", help="Bring the database up to date first; a local one always is.")
    ] = False,
) -> None:
    """Answer until SIGTERM or SIGINT; a second signal cuts the shutdown short."""
    from grpc_server import bootstrap
    from grpc_server.domain.errors import AgentLoopError
    from grpc_server.json_logs import log_to

    settings = read_settings()
    log_to(level=settings.log_level)
    try:
        asyncio.run(bootstrap.serve(settings, migrate=migrate))
    except (AgentLoopError, OSError, RuntimeError) as error:
        fail(str(error))
    except asyncio.CancelledError:
        fail("stopped by force; records that were not stored yet wait in the spool")


@app.command()
def config(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print every setting: its value, where that came from, and what it is for. Secrets are masked."""
    settings = read_settings()
    found = origins(settings)
    rows = {
        name: {
            "value": _shown(getattr(settings, name)),
            "origin": found[name],
            "variable": PREFIX + name.upper(),
            "description": field.description or "",
        }
        for name, field in Settings.model_fields.items()
    }
    if as_json:
        typer.echo(json.dumps(rows, indent=2, sort_keys=True))
        return
    widths = [
        max(len(str(row[column])) for row in rows.values()) for column in ("variable", "value", "origin")
    ]
    for row in rows.values():
        cells = zip((row["variable"], row["value"], row["origin"]), widths, strict=True)
        typer.echo(
            "  ".join([*(str(cell).ljust(width) for cell, width in cells), str(row["description"])]).rstrip()
        )


@app.command()
def migrate() -> None:
    """Bring the database's tables up to date."""
    from grpc_server import bootstrap
    from grpc_server.domain.errors import AgentLoopError

    settings = read_settings()
    try:
        typer.echo(bootstrap.migrate(settings))
    except (AgentLoopError, OSError, RuntimeError) as error:
        fail(str(error))


@app.command()
def postgres(
    data_dir: Annotated[
        Path | None, typer.Option(help="Where its files are; default: <state_dir>/postgres.")
    ] = None,
) -> None:
    """Keep a local Postgres until SIGTERM or SIGINT; its DSN is the first line printed."""
    from grpc_server.adapters.local_postgres import LocalPostgresError, keep

    try:
        keep(data_dir or read_settings().state_dir / "postgres")
    except (LocalPostgresError, OSError) as error:
        fail(str(error))


def read_settings() -> Settings:
    """The settings, or one line on each that is wrong, and exit code 2."""
    try:
        return Settings()
    except ValidationError as error:
        fail(explain(error), USAGE)
    except ValueError as error:
        fail(str(error), USAGE)


def fail(text: str, code: int = FAILED) -> NoReturn:
    """Say why, and end with `code`."""
    typer.echo(f"error: {text}", err=True)
    raise typer.Exit(code)


def _shown(value: object) -> object:
    if isinstance(value, SecretStr):
        return "********" if value.get_secret_value() else ""
    return str(value) if isinstance(value, Path) else value


def main() -> None:
    """Run the command line; what works in the database is read last, as it brings the driver."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what matters of it is in our own log
    from grpc_server.erase_cli import erase
    from grpc_server.events_cli import app as events
    from grpc_server.gpus_cli import gpu_monitor
    from grpc_server.log_cli import app as log
    from grpc_server.tokens_cli import app as tokens

    app.add_typer(tokens, name="tokens", help="API tokens, straight in the database.")
    app.command()(erase)
    app.add_typer(events, name="events", help="Who changed what, straight from the database.")
    app.add_typer(log, name="log", help="The log's upkeep, straight in the database.")
    app.command()(gpu_monitor)
    app()


if __name__ == "__main__":
    main()
