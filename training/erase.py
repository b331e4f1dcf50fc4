"""Takes what a caller, a session or one inference said out of every cycle: snapshots, datasets, pages.

`python -m grpc_server erase` runs it, after the rows of the log. In each cycle the tombstone comes first
(`erasures` of manifest.json: what goes, with the ids of examples, which lead nowhere any more, when, by whom;
nothing of who it was), then datasets and evaluations, then, when no cycle's are left, the snapshots, which
tell whose an example was: so the next attempt finishes one that was killed. Weights are not changed: the
tombstones name the model versions that learned from what is gone. The next night trains the untouched base
without it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agentloop.lineage import learned_by
from agentloop.night import every_cycle
from training import balance, card, cycle
from training.rewriting import BATCH_ROWS, SNAPSHOT, held, rewrite_snapshot

_DATASET = ("dataset/train.jsonl", "dataset/gate.jsonl")
_LINES = (*_DATASET, "regressions.jsonl")

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose words go: one of the three is set."""

    caller: str = ""
    session: str = ""
    inference: str = ""

    def __post_init__(self) -> None:
        if sum(map(bool, (self.caller, self.session, self.inference))) != 1:
            raise ValueError("name one of a caller, a session and an inference, no more and no less")

    @property
    def kind(self) -> str:
        """Which of the three."""
        return "caller" if self.caller else "session" if self.session else "inference"

    def row(self, row: Line) -> bool:
        """Whether a row of a snapshot, or a line of a dataset as far as it says so itself, is theirs."""
        column = "inference_id" if self.inference else "caller" if self.caller else "session_id"
        return bool(row.get(column) == (self.inference or self.caller or self.session))

    def feedback(self, said: Line) -> bool:
        """Whether feedback is theirs."""
        return bool(self.caller and said.get("caller") == self.caller)


@dataclass(frozen=True, slots=True)
class Erasure:
    """One erasure: its id is that of the log's, `at` when it was asked for, `by` whoever asked."""

    id: str
    subject: Subject
    by: str
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def run(cycles: Path, erasure: Erasure, ids: Iterable[str] = (), *, dry_run: bool = False) -> dict[str, Any]:
    """Erase in every cycle of `cycles`, of all models; return what went, or would go, cycle by cycle.

    `ids` are inferences of which the log knows that they teach what must go.

    Raises:
        StepRunningError: if a step of a cycle runs now; nothing of that cycle was changed.
    """
    found = every_cycle(cycles)
    hit = _taught(found, erasure.subject, ids)
    plans = [plan for each in found if (plan := _plan(each, erasure, hit))["counts"]]
    if not dry_run:
        with held(Path(plan["path"]) for plan in plans):
            for plan in plans:
                _bury(Path(plan["path"]), erasure, plan)
            for plan in plans:
                _rewrite_lines(Path(plan["path"]), hit)
            for plan in plans:
                _rewrite_snapshot(Path(plan["path"]), erasure.subject)
    finished = [each for each in found if _is_buried(each, erasure.id)]
    if not dry_run:
        for each in finished:
            _retell(each)
    told = [_tombstone(each, erasure.id) for each in finished] if not dry_run else plans
    return {
        "cycles": [{key: one[key] for key in ("cycle_id", "counts", "learned_by")} for one in told],
        "learned_by": sorted({one["learned_by"] for one in told if one["learned_by"]}),
    }


# What there is of it.


def _taught(found: Iterable[Path], subject: Subject, ids: Iterable[str]) -> frozenset[str]:
    """The inferences in datasets that go; those of a snapshot that no dataset has are of no account here."""
    found = list(found)
    lines = [line for each in found for name in _LINES for line in _read(each / name)]
    known = {str(line["inference_id"]) for line in lines}
    hit = {str(one["inference_id"]) for one in lines if subject.row(one)}
    hit |= known.intersection(ids)
    for each in found:
        for row in _rows(each):
            if row["inference_id"] in known and (subject.row(row) or _their_feedback(row, subject)):
                hit.add(row["inference_id"])
    return frozenset(hit)


def _plan(directory: Path, erasure: Erasure, hit: frozenset[str]) -> dict[str, Any]:
    ids = {
        Path(name).stem: [one for line in _read(directory / name) if (one := line["inference_id"]) in hit]
        for name in _LINES
    }
    counts: Counter[str] = Counter({part: len(gone) for part, gone in ids.items()})
    counts["evaluated"] = sum(
        line["item_id"] in hit for path in _evaluations(directory) for line in _read(path)
    )
    for row in _rows(directory):
        if erasure.subject.row(row):
            counts["snapshot"] += 1
        else:
            counts["feedback"] += _their_feedback(row, erasure.subject)
    return {
        "path": str(directory),
        "cycle_id": directory.name,
        "counts": {name: count for name, count in sorted(counts.items()) if count},
        "ids": ids,
        "learned_by": learned_by(directory) if counts["train"] else "",
    }


def _their_feedback(row: Line, subject: Subject) -> int:
    """How much of a row's feedback is theirs; 0 where its JSON has another form than the log's."""
    if not subject.caller or (row["feedback_json"] or "[]") == "[]":
        return 0
    try:
        return sum(subject.feedback(one) for one in json.loads(row["feedback_json"]))
    except (ValueError, TypeError, AttributeError):
        return 0


def _evaluations(directory: Path) -> list[Path]:
    return sorted((directory / "evaluation").glob("*.jsonl"))


def _rows(directory: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet

    if not (directory / SNAPSHOT).is_file():
        return
    with parquet.ParquetFile(directory / SNAPSHOT) as file:
        columns = ["inference_id", "caller", "session_id", "feedback_json"]
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            yield from batch.to_pylist()


def _read(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


# The tombstone.


def _bury(directory: Path, erasure: Erasure, plan: Mapping[str, Any]) -> None:
    """Say in manifest.json what goes, before it does; what an attempt before this one has said stays."""
    path = directory / cycle.MANIFEST
    manifest: dict[str, Any] = cycle.read_json(path) if path.is_file() else {"cycle_id": directory.name}
    before = _tombstone(directory, erasure.id)
    counts = Counter(before.get("counts", {})) | Counter(plan["counts"])  # the greater of the two
    tombstone = {
        "id": erasure.id,
        "kind": erasure.subject.kind,
        "at": before.get("at", erasure.at),
        "by": before.get("by", erasure.by),
        "cycle_id": directory.name,
        "counts": dict(sorted(counts.items())),
        "ids": {
            part: sorted({*gone, *before.get("ids", {}).get(part, ())}) for part, gone in plan["ids"].items()
        },
        "learned_by": before.get("learned_by") or plan["learned_by"],
    }
    others = [one for one in manifest.get("erasures", ()) if one["id"] != erasure.id]
    cycle.write_json(path, {**manifest, "erasures": [*others, tombstone]})


def _tombstone(directory: Path, erasure_id: str) -> dict[str, Any]:
    manifest = directory / cycle.MANIFEST
    erasures = cycle.read_json(manifest).get("erasures", ()) if manifest.is_file() else ()
    found: dict[str, Any] = next((one for one in erasures if one["id"] == erasure_id), {})
    return found


def _is_buried(directory: Path, erasure_id: str) -> bool:
    return bool(_tombstone(directory, erasure_id))


def _retell(directory: Path) -> None:
    """The page anew, which quotes examples, and the manifest, which has every file's sha256."""
    from training import report

    if (directory / report.PAGE).is_file():
        report.run(directory)
    cycle.write_manifest(directory)


# Each file appears whole. A record comes before its file: where a kill parts them, the file still has what
# the next attempt looks for, and both are written again.


def _rewrite_lines(directory: Path, hit: frozenset[str]) -> None:
    record = directory / "dataset" / "dataset.json"
    if record.is_file():
        kept = {
            Path(name).stem: sum(line["inference_id"] not in hit for line in _read(directory / name))
            for name in _DATASET
        }
        told = {**cycle.read_json(record), **kept}
        if "shares" in told:  # they name callers; so does the card
            train = [line for line in _read(directory / _LINES[0]) if line["inference_id"] not in hit]
            told["shares"] = balance.shares(train)
        cycle.write_json(record, told)
        if "shares" in told:
            card.write(directory / "dataset")
    for name in _LINES:
        _without(directory / name, lambda line: line["inference_id"] in hit)
    for path in _evaluations(directory):
        _without(path, lambda line: line["item_id"] in hit)


def _without(path: Path, gone: Callable[[Line], bool]) -> None:
    if not any(map(gone, _read(path))):
        return
    with (
        path.open(encoding="utf-8") as lines,
        cycle.new_file(path) as building,
        building.open("w", encoding="utf-8") as new,
    ):
        new.writelines(line for line in lines if not gone(json.loads(line)))


def _rewrite_snapshot(directory: Path, subject: Subject) -> None:
    if any(subject.row(row) or _their_feedback(row, subject) for row in _rows(directory)):
        rewrite_snapshot(directory, lambda row: None if subject.row(row) else _without_feedback(row, subject))


def _without_feedback(row: dict[str, Any], subject: Subject) -> dict[str, Any]:
    if not _their_feedback(row, subject):
        return row
    kept = [one for one in json.loads(row["feedback_json"]) if not subject.feedback(one)]
    return {
        **row,
        "feedback_json": json.dumps(kept, ensure_ascii=False),
        "feedback_count": len(kept),
        "demonstrations": sum(one["demonstration"] is not None for one in kept),
    }


def told(record: Mapping[str, Any], *, dry_run: bool) -> str:
    """The record in words."""
    verb = "would go" if dry_run else "went"
    lines = [
        f"{one['cycle_id']}: {verb}: {', '.join(f'{count} {name}' for name, count in one['counts'].items())}"
        for one in record["cycles"]
    ]
    learned = ", ".join(record["learned_by"])
    return "\n".join([*lines, f"learned by: {learned}" if learned else "no model has learned from it"])
