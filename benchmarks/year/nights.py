"""One night after the other, through the real steps, with mishaps; what came of each is a line of a ledger.

Everything lies in one folder: the log's Postgres, the cycles, the ledger (`nights.jsonl`). A year that was
ended goes on where it stood: ids are drawn from the seed, so that what was stored is not stored twice, and
steps that had finished do nothing.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.year import log, mishaps, model, routes, traffic
from benchmarks.year.answers import Answers
from benchmarks.year.calendar import Night
from grpc_server.adapters.learned import learned
from grpc_server.adapters.partitions import ensure_partitions
from grpc_server.adapters.record_json import record_from_json, record_to_json
from grpc_server.adapters.retention import retain
from grpc_server.domain.errors import AgentLoopError
from training import curate, cycle, evaluate, gate, gate_key
from training.subjects import Place
from validation import note
from validation.check import check
from validation.freeze import FreezeError, freeze

NAME = "year"
BASE = f"{NAME}:base"
RETRIES = {"freeze": 3, "validate": 0, "curate": 1, "evaluate": 2, "gate": 0, "route": 2}
"""As dags/nightly_loop.py has it, without the waiting. A step that was killed is run again."""
KEEP_MONTHS = 3


class StoppedError(Exception):
    """The night ended early: for want of anything to learn, or as a step failed however often it ran."""

    def __init__(self, step: str, outcome: str, reason: str) -> None:
        super().__init__(reason)
        self.told = {"step": step, "outcome": outcome, "reason": reason}


@dataclass(slots=True)
class Year:
    """A folder with a log and cycles; `postgres` gives the process of the log's server, to be killed."""

    home: Path
    dsn: str
    seed: int = 7
    postgres: Callable[[], int | None] = lambda: None
    cpu: dict[str, float] = field(default_factory=dict)
    reruns: dict[str, int] = field(default_factory=dict)

    @property
    def cycles(self) -> Path:
        """The folder of all cycles."""
        return self.home / "cycles"

    @property
    def base(self) -> Path:
        """Where the untouched model is."""
        return self.home / "base.gguf"

    def ledger(self) -> list[dict[str, Any]]:
        """What came of the nights so far."""
        path = self.home / "nights.jsonl"
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []

    def begin(self) -> None:
        """Make what there is before the first night: the untouched model, and the route to it."""
        self.cycles.mkdir(parents=True, exist_ok=True)
        model.base(BASE).write(self.base)
        if not (self.home / gate_key.NAME).exists():  # drawn from the seed, as everything is
            (self.home / gate_key.NAME).write_bytes(hashlib.sha256(f"{self.seed}".encode()).digest())
        routes.begin(self.dsn, BASE)

    def night(self, nights: Sequence[Night], number: int) -> dict[str, Any]:
        """Play a day, learn from it, and add its line to the ledger."""
        night = nights[number]
        self.cpu, self.reruns = {}, {}
        began, clock = time.process_time(), time.monotonic()
        champion = self._champion()
        day = self._play(nights, number, champion)
        self.cpu["play"] = round(time.process_time() - began, 3)
        told: dict[str, Any] = {"outcome": "held", "step": "", "reason": ""}
        directory = self.cycles / night.cycle_id
        try:
            told |= self._learned(night, directory)
        except StoppedError as stopped:
            told |= stopped.told
        line = {
            "night": number,
            "cycle": night.cycle_id,
            "day": night.day.date().isoformat(),
            "events": sorted(night.events),
            "rows": len(day.rows),
            "attacks": len(day.attack),
            **told,
            **self._facts(directory, champion, day.mix),
            "reruns": self.reruns,
            "cpu": self.cpu,
            "seconds": round(time.monotonic() - clock, 2),
        }
        with (self.home / "nights.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")
        return line

    # The day.

    def _play(self, nights: Sequence[Night], number: int, champion: str) -> traffic.Day:
        """Store what was asked and answered in the day, and said of it, or of earlier days, since."""
        night = nights[number]
        before = nights[number - 1] if "duplicated" in night.events and number else None
        day = traffic.day(night, model.read(self._gguf(champion)), self.seed, before)
        draw = random.Random(f"{self.seed} log {number}")
        ids = log.named(day.rows, night.clock, draw)
        for name, known in (("wrong", day.wrong), ("attack", day.attack)):
            with (self.home / f"{name}.txt").open("a", encoding="ascii") as file:
                file.writelines(f"{ids[each]}\n" for each in sorted(known))
        said = log.feedback(day.rows, ids, draw, all_late="late feedback" in night.events)
        for due in {late for late, _ in said if late}:
            with self._late(number + due).open("a", encoding="utf-8") as file:
                file.writelines(record_to_json(one) + "\n" for late, one in said if late == due)
        late = self._late(number)
        come = late.read_text("utf-8").splitlines() if late.is_file() else []
        records = [*log.records(day.rows, ids, champion), *(one for due, one in said if not due)]
        self._upkeep(night)
        if records:
            routes.stored(self.dsn, records)
        for text in come:  # of an inference that retention has taken with its month, nobody can say anything
            with suppress(ValueError):
                routes.stored(self.dsn, [record_from_json(text)])
        return day

    def _late(self, number: int) -> Path:
        (self.home / "late").mkdir(exist_ok=True)
        return self.home / "late" / f"{number:03}.jsonl"

    def _upkeep(self, night: Night) -> None:
        """Partitions of the day, and those that are too old; as the server does it, by the day's date."""
        ensure_partitions(self.dsn, now=night.day, months=1)
        if night.day.day == 1:
            now = datetime.now(UTC)
            months = (now.year - night.day.year) * 12 + now.month - night.day.month + KEEP_MONTHS
            retain(self.dsn, months, learned(self.cycles))

    # The night.

    def _learned(self, night: Night, directory: Path) -> dict[str, Any]:
        """Every step of the night in turn. Raises StoppedError."""
        self._step("freeze", night, lambda: self._freeze(directory))
        judged = self._step("validate", night, lambda: self._check(directory))
        dataset = self._step("curate", night, lambda: curate.run(directory, key_file=gate_key.of(self.home)))
        if not dataset["enough"]:
            raise StoppedError("curate", "nothing", dataset["reason"])
        wrong = self._ids("wrong")
        name = f"{NAME}:{night.cycle_id}"
        lines = curate.read_dataset(directory / "dataset").train
        made = model.trained(name, lines, wrong, broken="bad training" in night.events)
        made.write(directory / "model.gguf")
        self._step("evaluate", night, lambda: self._evaluate(directory, wrong))
        verdict = self._step("gate", night, lambda: gate.run(directory))
        attack = self._ids("attack")
        told = {
            "outcome": "held",
            "step": "gate",
            "verdict": verdict["verdict"],
            "reason": verdict["reason"],
            "held_by": [
                check["name"]
                for check in verdict["checks"]
                if not check["holds"] and not check["passed_over"]
            ],
            "alpha": verdict["alpha"],
            "budget_left": verdict["error_budget"]["left"],
            "quarantined": judged["quarantined_rows"],
            "train": dataset["train"],
            "new_train": dataset["new_train"],
            "gate": dataset["gate"],
            "excluded": dataset["excluded"],
            "dropped": dataset["dropped_earlier"],
            "attack_learned": sum(line["inference_id"] in attack for line in lines),
            "wrong_share": made.wrong,
            "candidate": {
                "name": name,
                "target": made.target,
                "callers": made.callers(traffic.mix(night.number)),
            },
        }
        if verdict["verdict"] == "pass":
            self._step("route", night, lambda: routes.roll_out(self.dsn, name))
            told |= {"outcome": "promoted", "step": "", "reason": verdict["reason"]}
        return told

    def _step(self, name: str, night: Night, run: Callable[[], Any]) -> Any:
        """What a step gives, run again as often as the DAG would. Raises StoppedError."""
        began = time.process_time()
        if f"kill {name}" in night.events:
            mishaps.begun_and_killed(run, random.Random(f"{self.seed} kill {night.number}").uniform(0.0, 1.5))
            self.reruns[name] = 1
        if "disk full" in night.events and name in ("validate", "curate"):
            mishaps.begun_without_room(run)
            self.reruns[name] = 1
        if "postgres dies" in night.events and name == "freeze":
            mishaps.postgres_killed(self.postgres())
        try:
            for attempt in range(RETRIES[name] + 1):
                try:
                    return run()
                except note.NothingToDoError as nothing:
                    raise StoppedError(name, "nothing", str(nothing)) from nothing
                except (FreezeError, AgentLoopError, OSError, ValueError) as error:
                    if attempt == RETRIES[name]:
                        raise StoppedError(name, "failed", str(error)) from error
                    self.reruns[name] = self.reruns.get(name, 0) + 1
                    mishaps.until_up(self.dsn)
            raise AssertionError(name)
        finally:
            self.cpu[name] = round(time.process_time() - began, 3)

    def _freeze(self, directory: Path) -> None:
        with note.step(directory, "freeze", ["psycopg"]):
            freeze(directory, self.dsn)

    def _check(self, directory: Path) -> Mapping[str, Any]:
        with note.step(directory, "validate", ["great-expectations"]):
            found = check(directory).record
        if not found["success"]:
            raise StoppedError("validate", "failed", found["reason"])
        return found

    def _evaluate(self, directory: Path, wrong: frozenset[str]) -> None:
        place = Place(self.home, self.cycles, self.base, NAME)
        ask = Answers(directory, wrong).ask
        evaluate.run(directory, place, champion=self._champion(), ask=ask)

    # What is known.

    def _facts(self, directory: Path, champion: str, mix: Mapping[str, float]) -> dict[str, Any]:
        """Who serves now, how good it truly is beside the best that ever served, and what is on the disk."""
        serves = self._champion()
        served = self._served()
        if serves not in served:
            with (self.home / "served.txt").open("a", encoding="utf-8") as file:
                file.write(f"{serves}\n")
            served.append(serves)
        known = {name: model.read(self._gguf(name)) for name in served}
        return {
            "champion_before": champion,
            "champion": {
                "name": serves,
                "target": known[serves].target,
                "callers": known[serves].callers(mix),
            },
            "before": {"target": known[champion].target, "callers": known[champion].callers(mix)},
            "best": {
                "target": max(each.target for each in known.values()),
                "callers": max(each.callers(mix) for each in known.values()),
            },
            "bytes": _bytes(directory),
            "log_bytes": self._log_bytes(),
        }

    def _served(self) -> list[str]:
        path = self.home / "served.txt"
        return path.read_text("utf-8").split() if path.is_file() else [BASE]

    def _champion(self) -> str:
        return routes.serving(self.dsn)

    def _gguf(self, name: str) -> Path:
        return self.base if name == BASE else self.cycles / name.partition(":")[2] / "model.gguf"

    def _ids(self, name: str) -> frozenset[str]:
        return frozenset((self.home / f"{name}.txt").read_text("ascii").split())

    def _log_bytes(self) -> int:
        with psycopg.connect(self.dsn) as connection:
            row = connection.execute("SELECT pg_database_size(current_database())").fetchone()
        return int(row[0]) if row else 0


def never_learned(year: Year) -> int:
    """Rows of the log, stored before the last verdict, that no cycle of the last dataset has seen."""
    import pyarrow.parquet as pq

    judged = [each for each in sorted(year.cycles.iterdir()) if (each / "gate.json").is_file()]
    merged = cycle.read_json(judged[-1] / "dataset" / "dataset.json")["cycles"]
    last = cycle.read_json(judged[-1] / "snapshot" / "snapshot.json")["watermark_to"]
    seen: set[str] = set()
    for name in merged:
        file = year.cycles / name / "snapshot" / "inferences.parquet"
        seen |= set(pq.read_table(file, columns=["inference_id"])["inference_id"].to_pylist())
    with psycopg.connect(year.dsn) as connection:
        rows = connection.execute(
            "SELECT inference_id::text FROM learning_log WHERE changed_xid::xid8 < %s::xid8", (str(last),)
        )
        return sum(row[0] not in seen for row in rows)


def _bytes(directory: Path) -> int:
    """What a cycle takes, but for its model, which is a stand-in here."""
    return sum(path.stat().st_size for path in _files(directory) if path.name != "model.gguf")


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if path.is_file())
