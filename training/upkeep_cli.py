"""`python -m training room` and `retain`: what keeps the nights' disks from filling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from training.cli_session import (
    AsJson,
    BaseGguf,
    Cycle,
    Recipe,
    Server,
    StateDir,
    Token,
    TokenFile,
    base_of,
    end,
    explained,
    say,
)
from training.plan_cli import size

app = typer.Typer()


@app.command()
def room(
    cycle: Cycle,
    reserve: Annotated[
        str,
        typer.Option(
            envvar="AGENTLOOP_DISK_RESERVE", help="What must stay free on each disk, like 1GiB or 500MB."
        ),
    ] = "1GiB",
    run_type: Annotated[
        str, typer.Option(envvar="AGENTLOOP_RUN_TYPE", help="As Airflow says: scheduled, manual, backfill.")
    ] = "manual",
    config: Recipe = None,
    state_dir: StateDir = Path("var"),
    base_gguf: BaseGguf = None,
    as_json: AsJson = False,
) -> None:
    """See whether a night may begin: room on its disks, no other night at work. Exit code 1: it may not.

    A backfilled night that is older than the last verdict has nothing to learn: exit code 99.
    """
    from training import room as step
    from training.cycle import NOTHING_TO_DO
    from training.recipe import DEFAULT

    if run_type == "backfill" and (later := step.judged_later(cycle)):
        end(
            f"Nothing to learn: the later cycle {later} has a verdict, and learned what there was then.",
            NOTHING_TO_DO,
        )
    with explained():
        base = base_of(base_gguf, state_dir)
        found = step.run(cycle, base, state_dir, size(reserve), config or DEFAULT)
    lines = [
        f"{' and '.join(disk['folders'])}: {disk['free_bytes'] / 1e9:.1f} GB free,"
        f" {disk['wanted_bytes'] / 1e9:.1f} wanted"
        for disk in found["disks"]
    ]
    say(found, as_json, "\n".join(lines))


@app.command()
def models(
    file: Annotated[
        Path, typer.Option("--models", envvar="AGENTLOOP_NIGHT_MODELS", help="The list, a YAML file.")
    ] = Path("training/configs/night-models.yaml"),
    cycles: Annotated[
        Path, typer.Option(envvar="AGENTLOOP_CYCLES_DIR", help="The folder of all cycles.")
    ] = Path("cycles"),
) -> None:
    """Print the models of a night as one line of JSON: model, alias, recipe, base, cycles."""
    from training import models as step

    with explained():
        found = step.listed(step.read(file), cycles)
    typer.echo(json.dumps(found))


@app.command()
def retain(
    nights: Annotated[
        int,
        typer.Option(envvar="AGENTLOOP_RETAIN_NIGHTS", min=1, help="So many cycles, the newest, stay whole."),
    ] = 30,
    cycles: Annotated[
        Path, typer.Option(envvar="AGENTLOOP_CYCLES_DIR", help="The folder of all cycles.")
    ] = Path("cycles"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; tell what would go.")] = False,
    state_dir: StateDir = Path("var"),
    server: Server = None,
    token: Token = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Let go of old cycles' large files; never of what serves, was best, or lineage and erasure need.

    Needs the live server, which knows what serves, with a token of the scope models:write.
    """
    from agentloop.sync_client import Client
    from training import retain as step
    from training.subjects import Place, address

    place = Place(state_dir.absolute(), cycles.absolute(), base_of(None, state_dir), server=server)
    with explained(), Client(address(place), token, token_file=token_file) as client:
        found = step.run_all(place.cycles_dir, nights, client, dry_run=dry_run)
    say(found, as_json, step.told(found))
