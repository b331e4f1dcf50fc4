"""`python -m grpc_server log`: what becomes of the log, straight in the database."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from grpc_server.adapters.learned import learned
from grpc_server.adapters.retention import Retained, retain
from grpc_server.store_cli import database, operator, told
from grpc_server.upkeep import forget_dead_letters

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Change nothing; tell what would go.")]


@app.callback()
def main() -> None:
    """The log's upkeep."""


@app.command("retain")
def retain_months(
    months: Annotated[int, typer.Option(min=1, max=1200, help="Months to keep before this one.")],
    force: Annotated[
        bool, typer.Option("--force", help="Drop also what no night has learned. It is gone for good.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Drop the months that are older, with their feedback and dead letters. What no night learned stays."""
    with told(), database() as (settings, dsn):
        retained = retain(
            dsn,
            months,
            None if force else learned(settings.cycles_dir),
            force=force,
            dry_run=dry_run,
            actor=operator(),
        )
        letters = forget_dead_letters(settings.spool_dir, months, dry_run=dry_run)
    if as_json:
        typer.echo(
            json.dumps({**retained.plain(), "spooled_dead_letters": letters}, indent=2, sort_keys=True)
        )
    else:
        _print(retained, letters)


def _print(retained: Retained, letters: int) -> None:
    verb = "would go" if retained.dry_run else "went"
    about = "" if retained.dry_run else "about "
    for one in retained.months:
        size = f"{about}{one.rows} rows, {one.bytes / 1e6:.1f} MB"
        typer.echo(
            f"{one.name}: {verb}, {size}" if not one.reason else f"{one.name}: stays, {size}: {one.reason}"
        )
    typer.echo(
        f"{verb} of before {retained.before:%Y-%m}: {retained.unpartitioned} inferences outside of these"
        f" months, {retained.feedback} feedback, {retained.dead_letters + letters} dead letters"
    )
