"""`python -m validation freeze|check --cycle DIR`. Exit: 0 done, 1 failed, 2 usage, 99 nothing to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_JUDGES = ("great-expectations", "jsonschema", "jsonschema-rs", "pandas", "py3langid")
NOTHING_TO_DO = 99
"""Airflow skips what follows a command that exits with it."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)
_console = Console(stderr=True)

Cycle = Annotated[
    Path, typer.Option("--cycle", help="The cycle's folder, named by its id: YYYYMMDDTHHMMSSZ.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the record as JSON.")]


class Engine(StrEnum):
    """What counts and judges the rows of a snapshot."""

    PANDAS = "pandas"
    SPARK = "spark"


@app.callback()
def main() -> None:
    """Freeze the log into a snapshot, and check it with Great Expectations."""


@app.command()
def freeze(
    cycle: Cycle,
    database_url: Annotated[
        str,
        typer.Option(
            envvar="AGENTLOOP_DATABASE_URL",
            help="The log's database. Empty: the one that the server keeps in its state folder.",
            show_default=False,
        ),
    ] = "",
    state_dir: Annotated[
        Path, typer.Option(envvar="AGENTLOOP_STATE_DIR", help="The server's state folder.")
    ] = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Freeze what was stored since the last verdict into snapshot/. A finished snapshot stays as it is."""
    from validation import note
    from validation.freeze import FreezeError, local_database
    from validation.freeze import freeze as frozen_log

    cycle = cycle.absolute()
    try:
        with note.step(cycle, "freeze", ["psycopg", "pyarrow"]), _progress("freezing") as on_progress:
            frozen = frozen_log(cycle, database_url or local_database(state_dir), on_progress)
    except note.NothingToDoError as error:
        _end(f"Nothing to learn: {error}", NOTHING_TO_DO)
    except (FreezeError, note.StepRunningError) as error:
        _end(str(error), 1)
    record = frozen.record
    _print(
        record,
        as_json,
        f"{'Froze' if frozen.new else 'Already frozen:'} {record['rows']} inferences with"
        f" {record['feedback_rows']} feedbacks (transactions {record['watermark_from']} to"
        f" {record['watermark_to']}) in {cycle / 'snapshot'}",
    )


@app.command()
def check(
    cycle: Cycle,
    suite: Annotated[
        Path | None,
        typer.Option(help="Other expectations than validation/suite.yaml.", exists=True, dir_okay=False),
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(
            envvar="AGENTLOOP_VALIDATION_ENGINE",
            help="What counts and judges the rows: this machine (pandas), or Spark for what it cannot hold.",
        ),
    ] = Engine.PANDAS,
    as_json: AsJson = False,
) -> None:
    """Judge the snapshot: quarantine bad rows, refuse a bad snapshot (exit 1). A finished result stays."""
    from validation import note
    from validation.check import check as checked_snapshot
    from validation.snapshot import SnapshotError
    from validation.suite import SUITE

    cycle = cycle.absolute()
    if not cycle.is_dir():
        _end(f"there is no cycle in {cycle}; run `python -m validation freeze` first", 1)
    try:
        with (
            note.step(cycle, "validate", _JUDGES),
            _progress("checking") as on_progress,
        ):
            record = checked_snapshot(cycle, suite or SUITE, on_progress, engine.value).record
            if not record["success"]:
                raise _RefusedError(record)
    except _RefusedError as refused:
        if as_json:
            _print(refused.record, as_json, "")
        _end(f"the snapshot is refused, nothing is learned from it: {refused}", 1)
    except (SnapshotError, note.StepRunningError, ValueError) as error:
        _end(str(error), 1)
    _print(
        record,
        as_json,
        f"{record['accepted']} of {record['rows']} rows accepted, {record['quarantined_rows']} quarantined;"
        f" data docs in {cycle / 'validation' / 'data_docs' / 'index.html'}",
    )


class _RefusedError(Exception):
    """A snapshot that was judged, and is bad."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        super().__init__(record["reason"])
        self.record = record


@contextmanager
def _progress(doing: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of rows on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_console, transient=True) as progress:
        task = progress.add_task(doing, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _print(record: Mapping[str, Any], as_json: bool, sentence: str) -> None:
    typer.echo(json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) if as_json else sentence)


def _end(message: str, code: int) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    app(prog_name="python -m validation")
