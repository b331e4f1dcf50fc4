"""`python -m benchmarks [NAME …]`: run benchmarks, keep their lines, render docs/benchmarks.md."""

from __future__ import annotations

import importlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.line import Line

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "benchmarks.md"
NAMES = tuple(sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py")))
MADE_BY = {"learn": "make learn && make bench-learn", "year": "make soak-year"}
"""Benchmarks that run only when they are named, as they take an hour or more, and what runs them."""


def _run(name: str) -> list[Line]:
    """Run one benchmark: a module `bench_<name>` whose `run()` yields lines."""
    lines: Iterable[Line] = importlib.import_module(f"benchmarks.bench_{name}").run()
    return list(lines)


def _store(name: str, lines: list[Line]) -> None:
    """Append one run: its date, commit and processor, then its lines."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    about = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {len(_processors())} cores, {_processors()[0]}",
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps({"run": about, "lines": [line.as_dict() for line in lines]}) + "\n")


def _processors() -> list[str]:
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return names or ["unknown processor"]


def _number(value: object) -> str:
    return "-" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)


def render() -> str:
    """docs/benchmarks.md: how each benchmark measures (its docstring), and its last result."""
    parts = [
        "# Benchmarks\n",
        "Made by `make bench`; `make bench-NAME` runs one. Machines are noisy: read the ratios, each taken",
        "against its peer in the same run. Every run is kept in `benchmarks/results/`.\n",
    ]
    for name in NAMES:
        module = importlib.import_module(f"benchmarks.bench_{name}")
        parts += [f"## {name}\n", (module.__doc__ or "").strip() + "\n"]
        path = RESULTS / f"{name}.jsonl"
        if not path.exists():
            parts.append("Not run yet.\n")
            continue
        last = json.loads(path.read_text().splitlines()[-1])
        about = last["run"]
        parts.append(
            f"`{MADE_BY.get(name, f'make bench-{name}')}`, {about['date']} UTC, commit {about['commit']},"
            f" {about['machine']}:\n"
        )
        parts += [
            "| metric | value | unit | peer | peer's value | goal | holds |",
            "|---|---:|---|---|---:|---|---|",
        ]
        for line in last["lines"]:
            holds = {True: "yes", False: "**no**", None: ""}[line["holds"]]
            cells = (
                line["metric"],
                _number(line["value"]),
                line["unit"],
                line["peer"],
                _number(line["peer_value"]),
                line["goal"],
            )
            parts.append("| " + " | ".join((*cells, holds)) + " |")
        parts.append("")
    notes = HERE / "notes.md"
    if notes.exists():
        parts.append(notes.read_text())
    return "\n".join(parts)


def main(
    names: Annotated[
        list[str] | None,
        typer.Argument(help=f"Which: {', '.join(NAMES)}. When none is named, all but {', '.join(MADE_BY)}."),
    ] = None,
    page_only: Annotated[bool, typer.Option("--page", help="Only render docs/benchmarks.md.")] = False,
) -> None:
    """Run benchmarks one after the other; print their lines as JSON; exit 1 if a goal is missed."""
    chosen = names or [name for name in NAMES if name not in MADE_BY]
    if unknown := [name for name in chosen if name not in NAMES]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(NAMES)}")
    missed = False
    for name in [] if page_only else chosen:
        print(f"benchmark {name} …", file=sys.stderr)
        lines = _run(name)
        _store(name, lines)
        for line in lines:
            print(json.dumps(line.as_dict()))
            missed = missed or line.holds is False
    PAGE.write_text(render())
    raise typer.Exit(1 if missed else 0)


if __name__ == "__main__":
    typer.run(main)
