"""Import a public dataset: files in a published format become `<datasets>/<name>/`, whole or not at all.

    examples.jsonl   one line an example, the keys of train.jsonl and of gate.jsonl together: `prompt` and
                     `completion` as rendered now, `request` and `demonstration` as they were said
    tasks.jsonl      requests without an answer, where the format has such
    dataset.json     what was read, and why what is missing is missing

A file that is not in its format is refused with line, field and what was expected. What is in the format, but
of no use here (too many calls in a turn, hostile text, a held-out question), is left out, counted by reason.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from training import bfcl, cycle
from training.datasets.formats import FORMATS, beside, recognised
from training.datasets.lines import Line, line_of
from training.datasets.reading import BadFileError, Records
from training.datasets.shown import Format, Record
from training.examples import read_barred
from training.watching import Progress, unwatched

RECORD = "dataset.json"
EXAMPLES, TASKS = "examples.jsonl", "tasks.jsonl"
SUFFIXES = (".json", ".jsonl", ".parquet", ".html")
REASONS = (
    "no_demonstration",
    "invalid_request",
    "invalid_demonstration",
    "several_calls",
    "foreign_types",
    "gave_up",
    "failed_trajectory",
    "failed_action",
    "unknown_action",
    "hostile",
    "barred",
)
"""Why something that was read is not used. The first that applies is the one counted."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = 1  # of what is written: another one is imported anew


class SetExistsError(ValueError):
    """There is a set of that name, of other files."""


@dataclass(slots=True)
class _Found:
    """What an import has come across so far."""

    records: int = 0
    examples: int = 0
    tasks: int = 0
    held_out: int = 0
    formats: set[str] = field(default_factory=set)
    excluded: Counter[str] = field(default_factory=Counter)
    hostile: Counter[str] = field(default_factory=Counter)

    def take(self, line: Line) -> None:
        """Count a line of the set."""
        self.examples += "demonstration" in line
        self.tasks += "demonstration" not in line

    def leave_out(self, why: str) -> None:
        """Count what is not in the set, by its reason, and, of hostile text, by the rule."""
        reason, _, rule = why.partition(": ")
        self.excluded[reason] += 1
        if rule:
            self.hostile[rule] += 1


def run(
    paths: Sequence[Path],
    datasets: Path,
    *,
    name: str = "",
    format_name: str = "",
    instead: bool = False,
    dry_run: bool = False,
    progress: Progress = unwatched,
) -> dict[str, Any]:
    """Write `<datasets>/<name>/`, unless it is there of the same files; return what its dataset.json holds.

    Args:
        paths: files, or folders of which every JSON, JSON Lines and Parquet file is taken.
        datasets: the folder of all sets.
        name: what the set is called; as the first path is, if not given.
        format_name: one of FORMATS; found out by the first record of each file, if not given.
        instead: whether it may take the place of a set of that name, of other files.
        dry_run: read and check everything, and write nothing.
        progress: told how many of how many bytes were read.

    Raises:
        BadFileError: naming file, line and field, and what was expected; nothing is imported.
        SetExistsError: if there is another set of that name.
        ValueError: if the name or format is none, or nothing that could be learned is in the files.
    """
    files = _files(paths)
    name = name or _named_after(paths[0])
    if not _NAME.fullmatch(name) or name == "steps":
        raise ValueError(f"name is {name!r}; it must be 1 to 64 of a-z, 0-9, '.', '_', '-', and not `steps`")
    if format_name and format_name not in FORMATS:
        raise ValueError(f"format is {format_name!r}; it must be one of {', '.join(FORMATS)}")
    reading = _Reading(name, files, FORMATS.get(format_name), progress)
    if dry_run:
        found = _Found()
        for _ in reading.lines(found):
            pass
        return _told(name, found, {})
    output = datasets / name
    inputs = reading.inputs()
    if cycle.done(output / RECORD, inputs, [output / EXAMPLES]):
        return cycle.read_json(output / RECORD)
    with cycle.step(datasets, name, outputs=[name]):
        if output.exists() and not instead:
            raise SetExistsError(
                f"{output} is there, of other files; choose another --name, or --replace that one"
            )
        with cycle.new_directory(output) as building:
            found = _write(building, reading)
            cycle.write_json(building / RECORD, _told(name, found, inputs))
    return cycle.read_json(output / RECORD)


def _files(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        inside = sorted(each for each in path.rglob("*") if each.suffix in SUFFIXES) if path.is_dir() else []
        if path.is_dir() and not inside:
            raise BadFileError(f"{path} has no file that ends in {', '.join(SUFFIXES)}")
        if not path.exists():
            raise BadFileError(f"there is no file {path}")
        found += inside or [path]
    return found


def _named_after(path: Path) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", path.absolute().stem.lower()).strip("-._")[:64]


def _write(folder: Path, reading: _Reading) -> _Found:
    found = _Found()
    with ExitStack() as stack:
        files: dict[str, IO[str]] = {}
        for name in (EXAMPLES, TASKS):
            files[name] = stack.enter_context((folder / name).open("w", encoding="utf-8"))
        for line in reading.lines(found):
            file = files[EXAMPLES if "demonstration" in line else TASKS]
            file.write(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n")
    if not found.tasks:
        (folder / TASKS).unlink()
    if not found.examples + found.tasks:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(found.excluded.items()))
        raise ValueError(
            f"nothing in {found.records} records could be learned ({reasons or 'all of them held out'});"
            " nothing was imported"
        )
    return found


def _told(name: str, found: _Found, inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "formats": sorted(found.formats),
        "records": found.records,
        "examples": found.examples,
        "tasks": found.tasks,
        "held_out": found.held_out,
        "excluded": {reason: found.excluded.get(reason, 0) for reason in REASONS},
        "hostile": dict(sorted(found.hostile.items())),
        "inputs": inputs,
    }


class _Reading:
    """The files on their way into a set; `progress` hears of every byte twice: hashed, and read."""

    def __init__(self, name: str, files: Sequence[Path], given: Format | None, progress: Progress) -> None:
        self._name = name
        self._files = files
        self._given = given
        self._progress = progress
        self._done = 0
        self._total = sum(path.stat().st_size for path in files)
        self._barred = read_barred()

    def inputs(self) -> dict[str, Any]:
        """What the set is made of, in the form of `cycle.inputs_of`."""
        self._total *= 2
        hashed = {}
        for number, path in enumerate(self._files):
            hashed[f"{number} {path.name}"] = self._sha256(path)
            for other in beside(path):
                hashed[f"{number} {other.name} beside it"] = cycle.sha256(other)
        options = {"format": self._given.name if self._given else "", "version": _VERSION}
        return {"files": {**hashed, "barred": cycle.sha256(bfcl.BARRED_FILE)}, "options": options}

    def lines(self, found: _Found) -> Iterator[Line]:
        """Every line of the set, in the order of the files; counted in `found`."""
        for path in self._files:
            records = Records(path, self._read)
            kind, read = self._given, None
            for line, record in records:
                found.records += 1
                if kind is None or read is None:
                    kind = kind or _recognised(path, line, record)
                    read = kind.opened(path)
                    found.formats.add(kind.name)
                try:
                    shown = list(read(record))
                except ValidationError as error:
                    raise BadFileError(
                        f"{path}, line {line}: {_first(error)} (the format {kind.name}: {kind.page})"
                    ) from None
                for each in shown:
                    session = f"record {found.records}"
                    made = each if isinstance(each, str) else line_of(each, self._name, session, self._barred)
                    if isinstance(made, str):
                        found.leave_out(made)
                    else:
                        found.take(made)
                        yield made
            found.held_out += records.held_out

    def _sha256(self, path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
                self._read(len(piece))
        return digest.hexdigest()

    def _read(self, count: int) -> None:
        self._done += count
        self._progress(self._done, self._total)


def _recognised(path: Path, line: int, record: Record) -> Format:
    found = recognised(record)
    if found is None:
        keys = ", ".join(ascii(key)[:40] for key in list(record)[:8])
        raise BadFileError(
            f"{path}, line {line}: no known format has such a record (keys: {keys}); name one with --format:"
            f" {', '.join(FORMATS)}"
        )
    return found


def _first(error: ValidationError) -> str:
    """The first field that is wrong, and what was expected; never what stands there, but a short name."""
    wrong = error.errors(include_url=False, include_context=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in wrong["loc"])
    given = wrong["input"]
    named = wrong["type"] == "literal_error" and isinstance(given, str) and len(given) <= 40
    said = f", but is {given!a}" if named else ""
    return f"{place.lstrip('.') or 'the record'}: {wrong['msg'].removeprefix('Value error, ')}{said}"
