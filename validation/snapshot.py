"""What a snapshot is: the files of a cycle's `snapshot/` folder, their columns, and how they are read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from validation.files import read_json, sha256

ROWS = "inferences.parquet"
RECORD = "snapshot.json"

_TIME = pa.timestamp("us", tz="UTC")
LOG_COLUMNS: Mapping[str, pa.DataType] = {
    "inference_id": pa.string(),
    "changed_xid": pa.string(),
    "caller": pa.string(),
    "key_id": pa.string(),
    "alias": pa.string(),
    "model_version": pa.string(),
    "target_role": pa.string(),
    "session_id": pa.string(),
    "request_json": pa.string(),
    "answer_json": pa.string(),
    "status": pa.string(),
    "finish_reason": pa.string(),
    "error": pa.string(),
    "input_tokens": pa.int64(),
    "output_tokens": pa.int64(),
    "queue_ms": pa.float64(),
    "ttft_ms": pa.float64(),
    "total_ms": pa.float64(),
    "started_at": _TIME,
    "ended_at": _TIME,
    "feedback_json": pa.string(),
}
"""The columns of the view `learning_log`, in its order; the three JSON ones as text."""

COUNT_COLUMNS = (
    "prompt_chars",
    "answer_chars",
    "messages",
    "tools",
    "tool_calls",
    "feedback_count",
    "demonstrations",
)
"""What `freeze` counts in each row; -1 where the row's JSON cannot be read."""

SCHEMA = pa.schema(
    [*((name, kind) for name, kind in LOG_COLUMNS.items()), *((name, pa.int64()) for name in COUNT_COLUMNS)]
)

_CYCLE_ID = re.compile(r"\d{8}T\d{6}Z")
# A row may have 1 MiB and more.
_BATCH_ROWS = 250


class SnapshotError(Exception):
    """A snapshot that is missing, unfinished or not what its record says; the text says what to do."""


def described(schema: pa.Schema) -> list[dict[str, str]]:
    """A schema as JSON: `[{"name", "type"}]`, in order."""
    return [{"name": field.name, "type": str(field.type)} for field in schema]


def is_cycle_id(name: str) -> bool:
    """Whether `name` is a cycle's id: the UTC start of its DAG run, YYYYMMDDTHHMMSSZ."""
    return _CYCLE_ID.fullmatch(name) is not None


def row_count(folder: Path) -> int:
    """How many rows a snapshot has."""
    return int(pq.read_metadata(folder / ROWS).num_rows)


def batches(
    folder: Path, columns: Sequence[str], groups: Sequence[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """Some columns of a snapshot, all or some of its row groups, a few hundred rows at a time."""
    with pq.ParquetFile(folder / ROWS) as file:
        yield from file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=list(columns))


def verified(folder: Path) -> dict[str, Any]:
    """A snapshot's record, once every file's sha256 was compared with it.

    Raises:
        SnapshotError: if there is none, it is half-written, or a file is not the one that was frozen.
    """
    if not folder.is_dir():
        raise SnapshotError(f"there is no snapshot in {folder}; run `python -m validation freeze` first")
    if not (folder / RECORD).is_file():
        raise SnapshotError(f"{folder} is half-written (it has no {RECORD}); run `freeze` again")
    try:
        record = read_json(folder / RECORD)
    except ValueError as error:
        raise SnapshotError(f"{error}; remove {folder} and run `freeze` again") from error
    files = record.get("files")
    if not isinstance(files, dict) or ROWS not in files:
        raise SnapshotError(f"{folder / RECORD} does not name {ROWS}; remove {folder} and run `freeze` again")
    for name, frozen in sorted(files.items()):
        if not (folder / name).is_file():
            raise SnapshotError(f"{folder / name} is missing; remove {folder} and run `freeze` again")
        found = sha256(folder / name)
        if found != frozen:
            raise SnapshotError(
                f"{folder / name} is not the file that was frozen (sha256 {found[:12]}…, not"
                f" {str(frozen)[:12]}…): it was changed or cut off since;"
                f" remove {folder} and run `freeze` again"
            )
    return record
