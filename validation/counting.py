"""Counts what is wrong in every row of a snapshot, on one machine; many rows in a process a core."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from validation import snapshot
from validation.draw import DRAWN
from validation.features import FEATURES, READ, SCHEMA, counted
from validation.note import Progress
from validation.suite import Rule, Suite

# Fewer rows are counted before a second process has started (0.6 s).
_ROWS_ALONE = 20_000
_ROWS_A_TASK = 4_000
# A process takes 250 MB; beyond that many, reading the file is what takes the time.
_MOST_PROCESSES = 8
# A snapshot that is refused teaches nothing: its bad rows are listed to be looked at, not to be left out.
LISTED_IF_REFUSED = 10_000


@dataclass(frozen=True, slots=True)
class Counted:
    """What an engine has found in the rows of a snapshot.

    `frame` is what Great Expectations judges, a pandas or Spark one: a line a row, with its features and the
    columns of `marks`. `drawn` has the columns `draw.DRAWN` of the good rows that were drawn.
    """

    frame: Any
    rows: int
    bad: int
    drawn: pa.Table
    quarantined: Iterator[dict[str, str]]


def count(folder: Path, suite: Suite, on_progress: Progress) -> Counted:
    """Count the rows of a snapshot.

    Raises:
        SnapshotError: if a process that counts was ended from outside.
    """
    rows = snapshot.row_count(folder)
    table = pa.Table.from_batches(_batches(folder, rows, suite.reference.drawn_rows, on_progress), SCHEMA)
    features = {name: table.column(name).to_numpy() for name in FEATURES}
    features["repeated_id"] = _repeated(table.column("inference_id"))
    marked = {name: _breaks(features, rules, rows) for name, rules in marks(suite).items()}
    import pandas as pd

    bad = np.flatnonzero(marked["bad"])
    return Counted(
        frame=pd.DataFrame(features | marked, copy=False),
        rows=rows,
        bad=len(bad),
        drawn=table.select([name for name, _ in DRAWN]).filter(
            pc.and_(table.column("drawn").fill_null(False), pa.array(marked["bad"] == 0))
        ),
        quarantined=_listed(table.column("inference_id"), features, bad, suite.rows),
    )


def marks(suite: Suite) -> dict[str, list[Rule]]:
    """The columns that a frame has beside the features: each is 1 where a row breaks one of these rules."""
    return {
        "quarantined": [rule for rule in suite.rows if rule.counts],
        "unsafe": [rule for rule in suite.rows if rule.group == "safety"],
        "bad": list(suite.rows),
    }


def broken(features: Any, rules: Sequence[Rule], inference_id: str | None) -> Iterator[dict[str, str]]:
    """Each rule that a row breaks; the detail is a count, never a word of what it says."""
    for rule in rules:
        if (found := int(features[rule.feature])) > 0:
            yield {
                "inference_id": str(inference_id),
                "rule": rule.rule,
                "detail": f"{rule.feature}: {found}",
            }


def drawn_share(rows: int, drawn_rows: int) -> float:
    """Which share of so many rows gives about `drawn_rows`."""
    return min(1.0, drawn_rows / max(rows, 1))


def _batches(folder: Path, rows: int, drawn_rows: int, on_progress: Progress) -> Iterator[pa.RecordBatch]:
    rate = drawn_share(rows, drawn_rows)
    done = 0
    on_progress(0, rows)
    for batch in _alone(folder, rate) if rows <= _ROWS_ALONE else _beside(folder, rate):
        done += batch.num_rows
        on_progress(done, rows)
        yield batch


def _alone(folder: Path, rate: float) -> Iterator[pa.RecordBatch]:
    return (counted(batch, rate) for batch in snapshot.batches(folder, READ))


def _beside(folder: Path, rate: float) -> Iterator[pa.RecordBatch]:
    """Counted by a process a core, in the order of the file."""
    tasks = _tasks(folder)
    processes = min(len(os.sched_getaffinity(0)), _MOST_PROCESSES, len(tasks))
    # Not forked: Arrow's threads may hold a lock at that moment.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_end_with_parent) as pool:
        futures = [pool.submit(_count_groups, folder, groups, rate) for groups in tasks]
        try:
            while futures:
                yield from futures.pop(0).result()
        except BrokenProcessPool as error:
            raise snapshot.SnapshotError(
                "a process that counted rows was ended from outside, perhaps because memory ran out;"
                " nothing was kept. Make room, then run `check` again"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _tasks(folder: Path) -> list[list[int]]:
    """The row groups of a snapshot, in runs of some thousand rows."""
    metadata = pq.read_metadata(folder / snapshot.ROWS)
    ends = accumulate(metadata.row_group(at).num_rows for at in range(metadata.num_row_groups))
    tasks: dict[int, list[int]] = {}
    for at, end in enumerate(ends):
        tasks.setdefault((end - 1) // _ROWS_A_TASK, []).append(at)
    return list(tasks.values())


def _count_groups(folder: Path, groups: list[int], rate: float) -> list[pa.RecordBatch]:
    return [counted(batch, rate) for batch in snapshot.batches(folder, READ, groups)]


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: it would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _repeated(ids: pa.ChunkedArray) -> Any:
    """1 for each id that another row has too: an id that two rows have names neither."""
    counts = pc.value_counts(ids)
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    return pc.is_in(ids, repeated).to_numpy().astype(np.int32)


def _breaks(features: dict[str, Any], rules: Sequence[Rule], rows: int) -> Any:
    found = np.zeros(rows, dtype=bool)
    for rule in rules:
        found |= features[rule.feature] > 0
    return found.astype(np.int32)


def _listed(
    ids: pa.ChunkedArray, features: dict[str, Any], bad: Any, rules: Sequence[Rule]
) -> Iterator[dict[str, str]]:
    names = ids.take(pa.array(bad)).to_pylist()
    for at, name in zip(bad, names, strict=True):
        yield from broken({rule.feature: features[rule.feature][at] for rule in rules}, rules, name)
