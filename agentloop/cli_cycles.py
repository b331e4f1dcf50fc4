"""`agent-loop cycles`: what the nights made, read from their files; no server is asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentloop import cycle_summary
from agentloop.cli_session import FAILED, NOT_FOUND, USAGE, JsonOption, print_json, printable
from agentloop.night import Night, cycles_in, started_at

app = typer.Typer(no_args_is_help=True, help="List, show and compare cycles. Reads files; needs no server.")

CyclesOption = Annotated[
    Path, typer.Option("--cycles", envvar="AGENTLOOP_CYCLES_DIR", help="The folder of all cycles.")
]
CycleArgument = Annotated[str, typer.Argument(help="A cycle's id, or its folder; `last`: the newest.")]


@app.command("list")
def list_cycles(
    cycles: CyclesOption = Path("cycles"),
    limit: Annotated[int, typer.Option(help="At most so many; 0: all.", min=0)] = 30,
    as_json: JsonOption = False,
) -> None:
    """List the cycles, the newest first: verdict, rollout, right answers, examples, time."""
    found = _folders(cycles)[::-1]
    shown = [cycle_summary.summary(Night(each)) for each in (found[:limit] if limit else found)]
    if as_json:
        print_json({"cycles": shown, "not_shown": len(found) - len(shown)})
        return
    table = Table("cycle", "verdict", "rollout", "champion", "candidate", "examples", "new", "time", "")
    table.columns[0].min_width = len("YYYYMMDDTHHMMSSZ")  # the id must be there to copy, however narrow
    for each in shown:
        _row(
            table,
            each["cycle_id"],
            each["verdict"],
            each["result"],
            _share(each["champion"]),
            _share(each["candidate"]),
            each["train"],
            each["new_train"],
            _time(each["seconds"]),
            _remark(each),
        )
    _print(table)
    if len(found) > len(shown):
        typer.echo(f"{len(found) - len(shown)} older ones: --limit 0 shows them")


@app.command()
def show(cycle: CycleArgument, cycles: CyclesOption = Path("cycles"), as_json: JsonOption = False) -> None:
    """Show a cycle: every step with its figures, and where what it made lies."""
    night = Night(directory(cycle, cycles))
    told = cycle_summary.summary(night) | {
        "folder": str(night.directory),
        "steps": cycle_summary.steps(night),
        "checks": cycle_summary.checks(night),
        "tombstones": night.erasures,
    }
    if as_json:
        print_json(told)
        return
    table = Table("step", "state", "time", "figures", title=f"{night.cycle_id}: {_remark(told) or 'done'}")
    for step in told["steps"]:
        figures = [f"{name} {_figure(value)}" for name, value in step["figures"].items()]
        where = [step["output"]] if step["output"] else []
        state = f"{step['state']}: {step['reason']}".removesuffix(": ").replace("_", " ")
        _row(table, step["title"], state, _time(step["seconds"]), "\n".join([*figures, *where]))
    _print(table)
    for name, outcome in told["checks"].items():
        typer.echo(_plain(f"gate: {name}: {outcome}"))
    for problem in night.problems:
        typer.echo(_plain(f"problem: {problem}"))


@app.command()
def diff(
    one: CycleArgument,
    other: CycleArgument,
    cycles: CyclesOption = Path("cycles"),
    as_json: JsonOption = False,
) -> None:
    """Compare two cycles: configuration, examples, figures, checks; what is the same is left out."""
    nights = [Night(directory(name, cycles)) for name in (one, other)]
    try:
        found = cycle_summary.difference(*nights)
    except OSError as error:
        _fail(f"a dataset cannot be read: {error}", FAILED)
    if as_json:
        print_json(found)
        return
    table = Table("", *(night.cycle_id for night in nights))
    for name, counts in found["dataset"].items():
        _row(table, f"dataset: {name}", *counts["count"])
        _row(table, "", f"{counts['removed']} only here", f"{counts['new']} only here")
    for part in ("config", "metrics", "checks"):
        for name, pair in found[part].items():
            _row(table, f"{part}: {name}", *map(_figure, pair))
    _print(table)
    for night in nights:
        for problem in night.problems:
            typer.echo(_plain(f"{night.cycle_id}: {problem}"))


def directory(name: str, cycles: Path) -> Path:
    """The folder of the cycle that was named; ends the command where there is none."""
    if name == "last":
        found = _folders(cycles)
        return found[-1] if found else _fail(f"there are no cycles in {cycles}: set AGENTLOOP_CYCLES_DIR")
    folder = Path(name) if "/" in name else cycles / name
    try:
        started_at(folder.resolve().name)
    except ValueError as error:
        _fail(str(error), USAGE)
    if not folder.is_dir():
        _fail(f"there is no cycle in {folder}: give --cycles, or set AGENTLOOP_CYCLES_DIR")
    return folder


def _folders(cycles: Path) -> list[Path]:
    if not cycles.is_dir():
        _fail(f"there is no folder {cycles}: give --cycles, or set AGENTLOOP_CYCLES_DIR")
    try:
        return cycles_in(cycles)
    except OSError as error:
        _fail(f"{cycles} cannot be read: {error.strerror}", FAILED)


def _fail(text: str, code: int = NOT_FOUND) -> NoReturn:
    typer.echo(_plain(text), err=True)
    raise typer.Exit(code)


def _remark(told: Mapping[str, Any]) -> str:
    """What a reader must know of a cycle that did not go through, or not only through."""
    remarks = []
    if told["running"]:
        remarks.append(f"at work: {', '.join(told['running'])}")
    elif told["stopped_at"]:
        remarks.append(f"ended at {told['stopped_at']}: {told['stopped_because']}".removesuffix(": "))
    if told["erasures"]:
        remarks.append(f"erased in part: {told['erasures']}")
    if told["problems"]:
        remarks.append(f"{len(told['problems'])} problems: {told['problems'][0]}")
    return "; ".join(remarks)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _time(seconds: float | None) -> str:
    if not seconds:
        return ""
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def _row(table: Table, *cells: Any) -> None:
    table.add_row(*(Text(_plain("" if cell is None else str(cell))) for cell in cells))


def _print(table: Table) -> None:
    Console().print(table)


def _plain(text: str) -> str:
    return printable(text, to_terminal=True)
