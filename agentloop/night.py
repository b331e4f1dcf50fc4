"""What a night left behind: the files of a cycle, as far as they are there, and how each step ended.

Only files are read, whatever state they are in: a cycle may be at work, half-written, damaged, older than
this code, or erased in part. What cannot be read is named in `problems`, and counts as not there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

State = Literal["done", "skipped", "failed", "unfinished", "not_reached"]
Record = Mapping[str, Any]

# Each step with what it is called on the page, and the file that it leaves when it ends well.
STEPS = {
    "freeze": ("Freezing", "snapshot/snapshot.json"),
    "validate": ("Validation", "validation/result.json"),
    "curate": ("Curation", "dataset/dataset.json"),
    "finetune": ("Fine-tuning", "adapter/finetune.json"),
    "quantize": ("Quantization", "quantize.json"),
    "evaluate": ("Evaluation", "evaluation/summary.json"),
    "gate": ("Gate", "gate.json"),
    "register": ("Registration", "registry.json"),
    "roll_out": ("Rollout", "rollout.json"),
}
_OF_NEW_ROWS = ("freeze", "validate", "curate")  # a cycle that unlearns has none
MAX_RECORD_BYTES = 256 * 2**20
"""A record is at most so large; dataset.json, with the ids of 3 million rows that were not used, is half."""

_ID = re.compile(r"\d{8}T\d{6}Z")


def started_at(cycle_id: str) -> datetime:
    """The UTC start of the DAG run that a cycle id is.

    Raises:
        ValueError: if it is not of the form YYYYMMDDTHHMMSSZ, or no moment.
    """
    if not _ID.fullmatch(cycle_id):
        raise ValueError(f"cycle id is {cycle_id!r}; it must be like 20260131T020000Z")
    return datetime.strptime(cycle_id, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)


def cycles_in(folder: Path) -> list[Path]:
    """The cycles in a folder, oldest first; none where it is not there.

    Raises:
        OSError: if the folder cannot be read.
    """
    found = []
    for each in sorted(folder.iterdir()) if folder.is_dir() else ():
        with suppress(ValueError):
            started_at(each.name)
            found.append(each)
    return found


def every_cycle(folder: Path) -> list[Path]:
    """The cycles in a folder, and in each folder of a model's own in it, oldest first.

    Raises:
        OSError: if a folder cannot be read.
    """
    return sorted((one for each in folders_of_cycles(folder) for one in cycles_in(each)), key=_by_id)


def folders_of_cycles(folder: Path) -> list[Path]:
    """The folder itself, then those in it that have cycles, by name: further models' (`training.models`).

    Raises:
        OSError: if a folder cannot be read.
    """
    inside = sorted(folder.iterdir()) if folder.is_dir() else ()
    own = [each for each in inside if each.is_dir() and not _ID.fullmatch(each.name) and cycles_in(each)]
    return [folder, *own]


def _by_id(directory: Path) -> tuple[str, Path]:
    return directory.name, directory


def lines_of(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Number and object of each line of a JSON Lines file, one at a time; None where a line is no object.

    Raises:
        OSError: if the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            value = None
            with suppress(ValueError, RecursionError):
                value = json.loads(line)
            if isinstance(value, dict):
                yield number, value
            elif line.strip():
                yield number, None


@dataclass(frozen=True, slots=True)
class Step:
    """How one step went. Times are UTC; None where the step left no note."""

    name: str
    title: str
    state: State
    reason: str = ""
    started_at: datetime | None = None
    seconds: float | None = None
    peak_memory_gb: float | None = None


class Night:
    """A cycle's records, each empty if it is not there; `problems` names the files that cannot be read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self.cycle_id = self.directory.name
        self.problems: list[str] = []
        self.snapshot = self._record("snapshot/snapshot.json")
        self.sets = self._record("snapshot/sets.json")  # of a warm-up, which has no snapshot of the log
        self.validation = self._record("validation/result.json")
        self.dataset = self._record("dataset/dataset.json")
        self.finetune = self._record("adapter/finetune.json")
        self.quantize = self._record("quantize.json")
        self.summary = self._record("evaluation/summary.json")
        self.gate = self._record("gate.json")
        self.registry = self._record("registry.json")
        self.rollout = self._record("rollout.json")
        self.demo = self._record("demo.json")
        self.unlearn = self._record("unlearn.json")
        self.notes = {name: self._record(f"steps/{name}.json") for name in STEPS}
        self.room = self._record("steps/room.json")  # whether the night might begin
        self.running = self._running()
        self.steps = self._steps()

    @cached_property
    def training(self) -> list[dict[str, Any]]:
        """The fine-tuning, step by step."""
        return self.lines("adapter/training.jsonl")

    @cached_property
    def erasures(self) -> list[dict[str, Any]]:
        """The tombstones of what was taken out of the cycle; they name nobody."""
        told = self._record("manifest.json").get("erasures")
        return [one for one in told if isinstance(one, dict)] if isinstance(told, list) else []

    @property
    def began(self) -> datetime:
        """When the DAG run started, UTC.

        Raises:
            ValueError: if the folder's name is no cycle id.
        """
        return started_at(self.cycle_id)

    @property
    def stopped(self) -> Step | None:
        """The step at which the night ended early; None if it went through, the gate's no included."""
        early = ("failed", "unfinished", "skipped")
        ended = next((step for step in self.steps if step.state in early), None)
        return None if ended is not None and ended.name == "roll_out" and ended.state == "skipped" else ended

    @property
    def seconds(self) -> float:
        """What all steps took together."""
        return sum(step.seconds or 0.0 for step in self.steps)

    @property
    def peak_memory_gb(self) -> float | None:
        """The most that any step had, in 10^9 bytes."""
        return max((step.peak_memory_gb for step in self.steps if step.peak_memory_gb), default=None)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The objects of a JSON Lines file, none if it is not there; a line that is no JSON is a problem."""
        path = self.directory / name
        if not path.is_file():
            return []
        found = []
        for number, value in lines_of(path):
            if value is None:
                self.problems.append(f"{name}, line {number}, is no JSON object")
            else:
                found.append(value)
        return found

    def _record(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        try:
            if not path.is_file():
                return {}
            if path.stat().st_size > MAX_RECORD_BYTES:
                raise ValueError(f"it has {path.stat().st_size:,} bytes, more than a record can have")
            value = json.loads(path.read_bytes())
            if not isinstance(value, dict):
                raise ValueError(f"it holds a JSON {type(value).__name__}, and must hold an object")
        except (OSError, ValueError, RecursionError) as error:
            self.problems.append(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}")
            return {}
        return value

    def _running(self) -> list[str]:
        """The steps that a process on this host is in now; by looking, so that no step meets our lock."""
        locks = {name: self.directory / "steps" / f".{name}.lock" for name in (*STEPS, "report")}
        held = _held()
        found = []
        for name, lock in locks.items():
            with suppress(OSError):
                status = lock.stat()
                if (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino) in held:
                    found.append(name)
        return found

    def _steps(self) -> list[Step]:
        steps: list[Step] = []
        over = False
        for name in STEPS:
            if self.unlearn and name in _OF_NEW_ROWS:
                continue
            step = self._step(name, over)
            over = over or step.state != "done"
            steps.append(step)
        return steps

    def _step(self, name: str, over: bool) -> Step:
        """How `name` went; `over` says whether an earlier step ended the night."""
        title, output = STEPS[name]
        note = self.notes[name]
        if name == "roll_out":
            return self._roll_out(title, over)
        if name == "freeze" and self.sets:
            title, output = "Imported sets", "snapshot/sets.json"
        state, reason = self._outcome(name, (self.directory / output).is_file(), over)
        began, seconds, memory = (note.get(key) for key in ("started_at", "seconds", "peak_memory_gb"))
        return Step(name, title, state, reason, moment(began), _number(seconds), _number(memory))

    def _outcome(self, name: str, finished: bool, over: bool) -> tuple[State, str]:
        note = self.notes[name]
        if name == next(iter(STEPS)) and not note:
            note = self.room if self.room.get("outcome") == "failed" else note
        if note.get("outcome") in ("failed", "skipped") and not over:
            return note["outcome"], str(note.get("reason", ""))
        if name == "curate" and finished and not self.dataset.get("enough", True):
            return "skipped", str(self.dataset.get("reason", ""))
        if finished:
            return "done", ""
        if over or (name == "freeze" and not any(self.notes.values())):
            return "not_reached", ""
        if name in self.running:
            return "unfinished", "it is at work now"
        if (self.directory / "steps" / f".{name}.lock").exists():
            return "unfinished", "it began and did not end: it was killed, or is still at work"
        return "unfinished", "it left nothing; its task's log says why"

    def _roll_out(self, title: str, over: bool) -> Step:
        name, record = "roll_out", self.rollout
        if record:
            # Not begun is an end that a person must look at; rolled back is one that nobody has to.
            state: State = "failed" if record.get("result") == "not_started" else "done"
            began, seconds = moment(record.get("started_at")), _number(record.get("seconds"))
            return Step(name, title, state, str(record.get("reason", "")), began, seconds)
        if over:
            return Step(name, title, "not_reached")
        if self.gate.get("verdict") != "pass":
            return Step(name, title, "skipped", f"the gate said {self.gate.get('verdict', 'nothing')}")
        if (self.directory / "rollout.partial.json").is_file():
            return Step(name, title, "unfinished", "it began and did not end: the route may hold a canary")
        return Step(name, title, "unfinished", "it has not begun, or its task's log says why not")


def moment(text: Any) -> datetime | None:
    """The moment that a record tells, None where it tells none; one without a zone is UTC."""
    with suppress(ValueError, TypeError):
        found = datetime.fromisoformat(text)
        return found if found.tzinfo else found.replace(tzinfo=UTC)
    return None


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _held() -> set[tuple[int, int, int]]:
    """Device (major, minor) and inode of every file that somebody holds a lock on; empty but on Linux."""
    found = set()
    with suppress(OSError):
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            for word in line.split():
                major, _, rest = word.partition(":")
                minor, _, inode = rest.partition(":")
                with suppress(ValueError):
                    found.add((int(major, 16), int(minor, 16), int(inode)))
    return found
