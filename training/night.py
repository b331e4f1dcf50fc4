"""What a night left behind: the files of a cycle, as far as they are there, and how each step ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from training import cycle

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
        self.training = self.lines("adapter/training.jsonl")
        self.quantize = self._record("quantize.json")
        self.summary = self._record("evaluation/summary.json")
        self.gate = self._record("gate.json")
        self.registry = self._record("registry.json")
        self.rollout = self._record("rollout.json")
        self.demo = self._record("demo.json")
        self.notes = {name: self._record(f"steps/{name}.json") for name in STEPS}
        self.steps = self._steps()

    @property
    def began(self) -> datetime:
        """When the DAG run started, UTC.

        Raises:
            ValueError: if the folder's name is no cycle id.
        """
        return cycle.started_at(self.cycle_id)

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
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                found.append(json.loads(line))
            except ValueError:
                self.problems.append(f"{name}, line {number}, is not JSON")
        return found

    def _record(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        if not path.is_file():
            return {}
        try:
            return cycle.read_json(path)
        except ValueError as error:
            self.problems.append(str(error).replace(f"{self.directory}/", ""))
            return {}

    def _steps(self) -> list[Step]:
        steps: list[Step] = []
        over = False
        for name in STEPS:
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
        started = note.get("started_at")
        return Step(
            name,
            title,
            state,
            reason,
            datetime.fromisoformat(started) if started else None,
            note.get("seconds"),
            note.get("peak_memory_gb"),
        )

    def _outcome(self, name: str, finished: bool, over: bool) -> tuple[State, str]:
        note = self.notes[name]
        if note.get("outcome") in ("failed", "skipped") and not over:
            return note["outcome"], note.get("reason", "")
        if name == "curate" and finished and not self.dataset.get("enough", True):
            return "skipped", self.dataset.get("reason", "")
        if finished:
            return "done", ""
        if over or (name == "freeze" and not any(self.notes.values())):
            return "not_reached", ""
        if (self.directory / "steps" / f".{name}.lock").exists():
            return "unfinished", "it began and did not end: it was killed, or is still at work"
        return "unfinished", "it left nothing; its task's log says why"

    def _roll_out(self, title: str, over: bool) -> Step:
        name, record = "roll_out", self.rollout
        if record:
            # Not begun is an end that a person must look at; rolled back is one that nobody has to.
            state: State = "failed" if record.get("result") == "not_started" else "done"
            started = record.get("started_at")
            at = datetime.fromisoformat(started) if started else None
            return Step(name, title, state, record.get("reason", ""), at, record.get("seconds"))
        if over:
            return Step(name, title, "not_reached")
        if self.gate.get("verdict") != "pass":
            return Step(name, title, "skipped", f"the gate said {self.gate.get('verdict', 'nothing')}")
        if (self.directory / "rollout.partial.json").is_file():
            return Step(name, title, "unfinished", "it began and did not end: the route may hold a canary")
        return Step(name, title, "unfinished", "it has not begun, or its task's log says why not")
