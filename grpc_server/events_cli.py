"""`python -m grpc_server events`: who changed what, straight from the database."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from grpc_server.domain.types import Event
from grpc_server.store_cli import USAGE, fail, with_store
from grpc_server.tokens_cli import Json, duration

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


@app.callback()
def main() -> None:
    """Who changed what."""


@app.command("list")
def list_events(
    kind: Annotated[
        str, typer.Option(help="Only these: token_created, token_revoked, model_install, denied, …")
    ] = "",
    since: Annotated[str, typer.Option(help="Only those of the last 24h, 7d, 30m …")] = "",
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many, the latest.")] = 100,
    as_json: Json = False,
) -> None:
    """Show administrative acts, and attempts at them that were denied; the latest last."""
    try:
        after = datetime.now(UTC) - duration(since) if since else None
    except (ValueError, OverflowError) as error:
        fail(str(error), USAGE)
    events = with_store(lambda store: store.events(kind, after, limit))
    if as_json:
        typer.echo(json.dumps([_plain(event) for event in events], indent=2, sort_keys=True))
        return
    table = Table()
    for title in ("at (UTC)", "what", "by", "of", "detail"):
        table.add_column(title)
    for event in events:
        detail = " ".join(f"{name}={_short(value)}" for name, value in event.detail.items())
        table.add_row(f"{event.at:%Y-%m-%d %H:%M:%S}", event.kind, event.actor, event.subject, detail)
    Console().print(table, markup=False)


def _short(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _plain(event: Event) -> dict[str, object]:
    return {
        "at": event.at.isoformat(),
        "kind": event.kind,
        "actor": event.actor,
        "subject": event.subject,
        "detail": event.detail,
    }
