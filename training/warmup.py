"""The first champion's training set, from public datasets, before there is any log.

The examples of imported sets (`training/datasets`) become rows in the columns of a snapshot, each a request
with a demonstration, its caller `dataset:<set>`; curation makes `dataset/` of them, with all that it keeps
out, as it does of the log. From there on the cycle is like any other: it trains the untouched base, and what
serves, at first that base, is the champion that it must beat. There is no snapshot.json, so the log's
watermark stays where it is.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from training import curate, cycle
from training.datasets.importing import EXAMPLES, RECORD
from training.examples import COLUMNS

SETS = "sets.json"
ROWS = "inferences.parquet"
MOST = 4000
"""Examples taken from all sets together: twice what curation keeps for training."""
LONGEST = 3600
"""Characters of a prompt and its completion; curation leaves longer ones out."""

_SHOWN_AT = "1970-01-01T00:00:00+00:00"  # before anything that a caller says

Line = Mapping[str, Any]


def run(directory: Path, sets: Sequence[Path], *, most: int = MOST) -> dict[str, Any]:
    """Write `<cycle>/snapshot/`, `validation/` and `dataset/`, unless they are there of the same sets.

    Args:
        directory: the cycle.
        sets: folders that `python -m training import` made.
        most: examples taken from all sets together: each gives as many as the others, as far as it has them;
            which ones is drawn by a hash, so that it is the same each time.

    Returns:
        What dataset.json holds, and under `sets` what was taken of which set.

    Raises:
        ValueError: if a folder is no imported set, two have one name, or the cycle is one of the log.
    """
    cycle.started_at(directory.resolve().name)
    if (directory / "snapshot" / "snapshot.json").is_file():
        raise ValueError(f"{directory} holds a snapshot of the log; a warm-up needs a cycle of its own")
    names = [_name(each) for each in sets]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"the sets are {', '.join(names) or 'none'}; name at least one, and each once")
    files = {name: folder / EXAMPLES for name, folder in zip(names, sets, strict=True)}
    inputs = cycle.inputs_of(files, {"most": most})
    record = directory / "snapshot" / SETS
    if not cycle.done(record, inputs, [directory / "validation" / "result.json"]):
        with cycle.step(directory, "freeze", packages=["pyarrow"], outputs=["snapshot", "validation"]):
            taken = sample(files, most)
            _write(directory, taken, {"sets": _counts(files, taken), "inputs": inputs})
    return curate.run(directory) | {"sets": cycle.read_json(record)["sets"]}


def sample(files: Mapping[str, Path], most: int) -> dict[str, list[Line]]:
    """At most `most` examples, by set; sets take turns, so that a small one is whole beside a large one.

    Memory holds no more than that many of each set.
    """
    drawn = {name: _drawn(path, most) for name, path in files.items()}
    taken: dict[str, list[Line]] = {name: [] for name in files}
    known: set[str] = set()
    while len(known) < most and any(drawn.values()):
        for name, waiting in drawn.items():
            line = waiting.pop() if waiting else None
            if line is not None and line["inference_id"] not in known and len(known) < most:
                known.add(line["inference_id"])
                taken[name].append(line)
    return taken


def _drawn(path: Path, most: int) -> list[Line]:
    """The examples of a set that are not too long, at most so many: of the lowest hashes, lowest last."""
    heap: list[tuple[int, str, Line]] = []
    held: set[str] = set()
    for line in _lines(path):
        if len(line["prompt"]) + len(line["completion"]) > LONGEST:
            continue
        inference_id = str(line["inference_id"])
        digest = hashlib.sha256(inference_id.encode()).digest()
        entry = (-int.from_bytes(digest[:8], "big"), inference_id, line)
        if inference_id in held or (len(heap) == most and entry[:2] < heap[0][:2]):
            continue
        held.add(inference_id)
        heapq.heappush(heap, entry)
        if len(heap) > most:
            held.remove(heapq.heappop(heap)[1])
    return [line for _, _, line in sorted(heap, key=lambda entry: entry[:2])]


def _lines(path: Path) -> Iterator[Line]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)
            except ValueError:
                raise ValueError(f"{path}, line {number}, is not JSON; import that set again") from None


def _counts(files: Mapping[str, Path], taken: Mapping[str, Sequence[Line]]) -> list[dict[str, Any]]:
    """Of each set: what it is made of, how much it has, and how much of it was taken."""
    counts = []
    for name, path in files.items():
        imported = cycle.read_json(path.with_name(RECORD))
        counts.append(
            {
                "name": name,
                "formats": imported["formats"],
                "examples": imported["examples"],
                "taken": len(taken[name]),
            }
        )
    return counts


def _name(folder: Path) -> str:
    if not (folder / EXAMPLES).is_file() or not (folder / RECORD).is_file():
        raise ValueError(f"{folder} is no imported set; make one with `python -m training import`")
    return folder.resolve().name


def _write(directory: Path, taken: Mapping[str, Sequence[Line]], record: Mapping[str, Any]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [_row(name, line) for name, lines in taken.items() for line in lines]
    rows.sort(key=lambda row: str(row["inference_id"]))
    cycle.write_json(directory / "validation" / "result.json", {"success": True, "quarantined": []})
    with cycle.new_directory(directory / "snapshot") as building:
        schema = pa.schema(
            [(name, pa.string()) for name in COLUMNS] + [(name, pa.int64()) for name in _COUNTS]
        )
        parquet.write_table(pa.Table.from_pylist(rows, schema=schema), building / ROWS)
        files = {ROWS: cycle.sha256(building / ROWS)}
        counts = {"rows": len(rows), "feedback_rows": len(rows)}
        cycle.write_json(building / SETS, {**record, **counts, "files": files})


_COUNTS = ("feedback_count", "demonstrations")


def _row(name: str, line: Line) -> dict[str, Any]:
    """A row as the log would have it, had a caller of that name asked, and shown the answer."""
    caller = f"dataset:{name}"
    feedback = {
        "id": line["inference_id"],
        "created_at": _SHOWN_AT,
        "caller": caller,
        "demonstration": line["demonstration"],
    }
    return {
        "inference_id": str(line["inference_id"]),
        "caller": caller,
        "session_id": str(line["session_id"]),
        "request_json": json.dumps(line["request"]),
        "answer_json": None,
        "status": None,
        "finish_reason": None,
        "feedback_json": json.dumps([feedback]),
        "feedback_count": 1,
        "demonstrations": 1,
    }
