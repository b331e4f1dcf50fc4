"""What is wrong in the rows of a snapshot, as counts: expectations judge these, and never see any text.

0 is good. `counted` is the one function that both engines call, on batches of rows: in this process, in
others beside it, or on the hosts of a Spark cluster.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from grpc_server.domain.types import FinishReason, Status
from validation.content import CONTENT, read, wrong
from validation.draw import DRAWN, Draw

_COLUMNS = (
    "malformed_id",
    "repeated_id",
    "unknown_status",
    "unknown_finish_reason",
    "disordered_times",
    "impossible_timings",
    "failed",
)
FEATURES = (*_COLUMNS, *CONTENT)

READ = (
    "inference_id",
    "status",
    "finish_reason",
    "started_at",
    "ended_at",
    "queue_ms",
    "ttft_ms",
    "total_ms",
    "input_tokens",
    "output_tokens",
    "request_json",
    "answer_json",
    "feedback_json",
)
"""The columns of a snapshot that are judged."""

SCHEMA = pa.schema([("inference_id", pa.string()), *((name, pa.int32()) for name in FEATURES), *DRAWN])
"""What `counted` returns of each row: its id, its features, and what was drawn of it."""

_ENDED = pa.array([status.value for status in Status if status is not Status.STARTED])
_FAILED = pa.array([Status.ERROR.value, Status.ABORTED.value])
_FINISH_REASONS = pa.array([reason.value for reason in FinishReason])
# As `str(UUID(value))` writes it.
_UUID = r"^[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\z"
# Start, first token and end are read from the clock one after the other.
_CLOCK_SLACK_MS = 1.0
_MOST = np.iinfo(np.int32).max


def counted(batch: pa.RecordBatch, rate: float = 0.0) -> pa.RecordBatch:
    """A batch of `SCHEMA` for a batch that has the columns `READ`.

    How often each thing is wrong in each row; `repeated_id` needs all rows and is 0 here. Of a share `rate`
    of the rows, drawn by their ids, it also says what drift is measured on; of the others that is null.
    """
    counts = {name: np.zeros(batch.num_rows, dtype=np.int64) for name in FEATURES}
    counts |= _of_columns(batch)
    draw = Draw(rate)
    texts = ("request_json", "answer_json", "feedback_json")
    rows = zip(
        *(batch.column(name).to_pylist() for name in ("inference_id", "status", *texts)),
        *(batch.column(name).to_pylist() for name in ("input_tokens", "output_tokens")),
        strict=True,
    )
    for at, (inference_id, status, request, answer, feedback, tokens_in, tokens_out) in enumerate(rows):
        found = read(request, answer, feedback)
        if found is None:
            counts["unreadable_json"][at] = 1
            draw.leave()
            continue
        for name, count in wrong(found, status, tokens_in, tokens_out).items():
            counts[name][at] = count
        draw.take(inference_id, status, found)
    arrays = [pa.array(np.minimum(counts[name], _MOST).astype(np.int32)) for name in FEATURES]
    return pa.RecordBatch.from_arrays([batch.column("inference_id"), *arrays, *draw.arrays()], schema=SCHEMA)


def _of_columns(batch: pa.RecordBatch) -> dict[str, Any]:
    """The features that need no JSON, each for all rows at once."""
    status, reason = batch.column("status"), batch.column("finish_reason")
    started, ended = batch.column("started_at"), batch.column("ended_at")
    # An inference that went well has ended for a known reason; any other may have none.
    unknown_reason = pc.and_(pc.is_valid(reason), pc.invert(pc.is_in(reason, _FINISH_REASONS)))
    missing_reason = pc.and_(pc.is_null(reason), pc.equal(status, Status.OK.value).fill_null(False))
    disordered = pc.less(ended, started).fill_null(True)
    well_formed = pc.match_substring_regex(batch.column("inference_id"), _UUID).fill_null(False)
    return {
        "malformed_id": _numbers(pc.invert(well_formed)),
        "unknown_status": _numbers(pc.invert(pc.is_in(status, _ENDED))),
        "unknown_finish_reason": _numbers(pc.or_(unknown_reason, missing_reason)),
        "disordered_times": _numbers(disordered),
        "impossible_timings": _impossible_timings(batch),
        "failed": _numbers(pc.is_in(status, _FAILED)),
    }


def _impossible_timings(batch: pa.RecordBatch) -> Any:
    """How many of queue, first token and total are below zero, missing, or later than what they precede."""
    queue, first, total = (
        batch.column(name).to_numpy(zero_copy_only=False) for name in ("queue_ms", "ttft_ms", "total_ms")
    )
    without = {name: _numbers(pc.is_null(batch.column(name))) == 1 for name in ("ttft_ms", "total_ms")}
    latest = np.where(without["total_ms"], np.inf, total + _CLOCK_SLACK_MS)
    # A missing value reads as NaN, of which every comparison is false.
    return (
        (~(total >= 0)).astype(np.int64)
        + ~((queue >= 0) & (queue <= latest))
        + ~(without["ttft_ms"] | ((first >= 0) & (first <= latest)))
    )


def _numbers(truths: Any) -> Any:
    """0 and 1 for false and true."""
    return truths.to_numpy(zero_copy_only=False).astype(np.int64)
