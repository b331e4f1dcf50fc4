"""`agent-loop route`: where an alias leads."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from agentloop.cli_session import JsonOption, print_json, session
from agentloop.errors import NotFound
from agentloop.types import Route, Target, TargetRole

app = typer.Typer(no_args_is_help=True, help="Show and change where an alias leads.")

AliasOption = Annotated[str, typer.Option(help="The name that callers use.")]


@app.command("get")
def get_route(context: typer.Context, alias: AliasOption = "default", as_json: JsonOption = False) -> None:
    """Show the route in force."""
    with session(context).client(as_json=as_json) as client:
        route = client.get_route(alias)
    _show(route, as_json)


@app.command("set")
def set_route(
    context: typer.Context,
    target: Annotated[
        list[str],
        typer.Option(help="`<model version>=<stable|canary|shadow>:<percent>`; repeat it for each target."),
    ],
    alias: AliasOption = "default",
    revision: Annotated[
        int | None,
        typer.Option(min=0, help="The revision that this replaces (0: a new alias); the one read just now."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Replace the route if its revision is still the one given; the same targets again change nothing."""
    targets = tuple(parse_target(text) for text in target)
    with session(context).client(as_json=as_json) as client:
        try:
            now = client.get_route(alias)
        except NotFound:
            now = Route(alias, 0, ())
        changed = set(now.targets) != set(targets)
        if changed:
            now = client.set_route(alias, targets, now.revision if revision is None else revision)
    _show(now, as_json, changed=changed)


def parse_target(text: str) -> Target:
    """The target that `<model version>=<role>:<percent>` names. Raises BadParameter."""
    model_version, _, rest = text.rpartition("=")
    role, _, weight = rest.partition(":")
    roles: tuple[TargetRole, ...] = get_args(TargetRole)
    known = next((each for each in roles if each == role), None)
    if not model_version or known is None or not (weight.isascii() and weight.isdigit()) or int(weight) > 100:
        raise typer.BadParameter(
            f"{text!r} is not <model version>=<{'|'.join(roles)}>:<0 to 100>", param_hint="--target"
        )
    return Target(model_version, known, int(weight))


def _show(route: Route, as_json: bool, **more: Any) -> None:
    if as_json:
        print_json(asdict(route) | more)
        return
    table = Table("model version", "role", "percent", title=f"{route.alias}, revision {route.revision}")
    for target in route.targets:
        table.add_row(target.model_version, target.role, str(target.weight))
    Console().print(table)
