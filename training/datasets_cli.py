"""`python -m training import`, `warmup`: public datasets, and the cycle that learns from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from training.cli_session import AsJson, Cycle, end, explained, progress, say


def add_to(app: typer.Typer) -> None:
    """Give `app` these commands."""
    app.command("import")(import_)
    app.command()(warmup)


def import_(
    files: Annotated[
        list[Path], typer.Argument(help="Files, or folders of them: JSON, JSON Lines, Parquet.")
    ],
    name: Annotated[str, typer.Option(help="What the set is called. [default: as the first file]")] = "",
    format_name: Annotated[
        str,
        typer.Option(
            "--format",
            help="toolbench, agentinstruct, sharegpt, openai, bfcl, browsergym, webarena or webarena-traces."
            " [default: found out by the first record]",
        ),
    ] = "",
    to: Annotated[Path, typer.Option(help="The folder of all sets.")] = Path("var/datasets"),
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the place of a set of that name, of other files.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read and check everything; write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring a public dataset into the form that is learned from: all of it, or nothing."""
    from training.datasets import importing

    with explained(), progress("reading") as on_progress:
        found = importing.run(
            files,
            to,
            name=name,
            format_name=format_name,
            instead=replace,
            dry_run=dry_run,
            progress=on_progress,
        )
    excluded = ", ".join(f"{count} {reason}" for reason, count in found["excluded"].items() if count)
    say(
        found,
        as_json,
        f"{found['name']} ({', '.join(found['formats'])}): {found['examples']} examples and {found['tasks']}"
        f" tasks of {found['records']} records, {found['held_out']} held out;"
        f" excluded: {excluded or 'none'}.{' Nothing was written.' if dry_run else ''}",
    )


def warmup(
    cycle: Cycle,
    sets: Annotated[
        list[Path],
        typer.Option("--from", envvar="AGENTLOOP_WARMUP_FROM", help="An imported set; may be repeated."),
    ],
    most: Annotated[int, typer.Option(min=1, help="Examples taken from all sets together.")] = 4000,
    as_json: AsJson = False,
) -> None:
    """Make dataset/ of imported sets rather than of the log: for the first champion."""
    from training import warmup as step
    from training.cycle import NOTHING_TO_DO

    with explained():
        found = step.run(cycle, sets, most=most)
    taken = ", ".join(f"{each['taken']} of {each['examples']} of {each['name']}" for each in found["sets"])
    say(found, as_json, f"{found['train']} training examples, {found['gate']} gate items, from {taken}.")
    if not found["enough"]:
        end(f"Nothing to learn: {found['reason']}.", NOTHING_TO_DO)
