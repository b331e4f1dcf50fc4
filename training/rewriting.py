"""Changes what is in finished cycles, for erasure and retention: while no step runs, each file whole."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from training import cycle

SNAPSHOT = Path("snapshot", "inferences.parquet")
BATCH_ROWS = 1000
_RECORDS = ("snapshot.json", "sets.json")  # of the log, and of a warm-up

Row = dict[str, Any]


@contextmanager
def held(directories: Iterable[Path]) -> Iterator[None]:
    """No step of these cycles runs, or begins, while the block does.

    Raises:
        StepRunningError: if one runs now.
    """
    with ExitStack() as stack:
        for directory in directories:
            steps = directory / "steps"
            for path in sorted(steps.glob(".*.lock")) if steps.is_dir() else ():
                _hold(stack.enter_context(path.open("w")), f"{path.stem[1:]} of {directory.name}")
        yield


def _hold(lock: IO[str], what: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise cycle.StepRunningError(f"{what} is running now; try again when it is done") from None


def rewrite_snapshot(directory: Path, change: Callable[[Row], Row | None]) -> int:
    """Write the cycle's snapshot anew, each row as `change` makes it, none where that is None.

    Its record comes before it. Returns how many rows went.
    """
    import pyarrow as pa
    from pyarrow import parquet

    path = directory / SNAPSHOT
    record = next(each for name in _RECORDS if (each := path.with_name(name)).is_file())
    rows = feedback = before = 0
    with cycle.new_file(path) as building:
        with (
            parquet.ParquetFile(path) as file,
            parquet.ParquetWriter(building, file.schema_arrow, compression="zstd") as writer,
        ):
            before = file.metadata.num_rows
            for batch in file.iter_batches(BATCH_ROWS):
                kept = [row for each in batch.to_pylist() if (row := change(each)) is not None]
                writer.write_batch(pa.RecordBatch.from_pylist(kept, schema=file.schema_arrow))
                rows += len(kept)
                feedback += sum(max(row["feedback_count"], 0) for row in kept)
        told = cycle.read_json(record)
        files = {**told["files"], SNAPSHOT.name: cycle.sha256(building)}
        cycle.write_json(record, {**told, "rows": rows, "feedback_rows": feedback, "files": files})
    return int(before - rows)
