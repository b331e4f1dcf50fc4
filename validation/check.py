"""Judge a snapshot with Great Expectations: bad rows are quarantined, a bad snapshot is refused.

What is expected is data (`suite.yaml`); what is judged are counts per row (`features.py`) and how far their
distributions moved (`drift.py`), so that neither result.json nor the data docs can hold a word of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow.parquet as pq

from validation import drift, snapshot
from validation.counting import LISTED_IF_REFUSED, Counted, count
from validation.files import discard_unfinished, new_folder, read_json, sha256, write_json
from validation.note import Progress, silent
from validation.suite import GROUPS, SUITE, Limit, Suite, read_suite

if TYPE_CHECKING:
    import pandas as pd

    from validation.expectations import Asset

RESULT = "result.json"
DOCS = "data_docs"

Engine = Literal["pandas", "spark"]
Counting = Callable[[Path, Suite, Progress], Counted]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One expectation's result; `observed` is numbers, and column names where the schema is judged."""

    group: str
    name: str
    says: str
    blocking: bool
    success: bool
    observed: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Checked:
    """The result as written to result.json, and whether this call made it (or found it finished)."""

    record: Mapping[str, Any]
    new: bool


def check(
    cycle: Path, suite_path: Path = SUITE, on_progress: Progress = silent, engine: Engine = "pandas"
) -> Checked:
    """Judge `cycle/snapshot`; write `cycle/validation`: result.json, profile.json and the data docs.

    A result that was made of the same snapshot, suite and earlier nights is returned as it is. `engine` is
    what counts and judges the rows: this machine's processes, or Spark; what is found is the same.

    Raises:
        SnapshotError: if the snapshot is missing, half-written, or not the one that was frozen; if counting
        was
            ended from outside.
        ValueError: if the suite has a mistake.
    """
    folder, target = cycle / "snapshot", cycle / "validation"
    record = snapshot.verified(folder)
    suite = read_suite(suite_path)
    earlier = drift.references(cycle, suite.reference.nights)
    inputs = {
        "files": {f"snapshot/{name}": digest for name, digest in record["files"].items()}
        | {f"snapshot/{snapshot.RECORD}": sha256(folder / snapshot.RECORD)}
        | drift.digests(earlier),
        "options": {"suite": sha256(suite_path)},
    }
    finished = _finished(target, inputs)
    if finished is not None:
        return Checked(finished, new=False)
    discard_unfinished(target)
    with new_folder(target) as building, _counting(engine) as counting:
        result, profile = _judged(cycle, suite, earlier, building / DOCS, counting, on_progress)
        result |= {"inputs": inputs, "engine": engine}
        if result["success"]:  # the nights to come are compared with it
            write_json(building / drift.PROFILE, drift.to_plain(profile))
        write_json(building / RESULT, result)
    return Checked(result, new=True)


@contextmanager
def _counting(engine: Engine) -> Iterator[Counting]:
    """What counts the rows; their frame is there until the block ends."""
    if engine == "pandas":
        yield count
        return
    from validation.spark import counting

    with counting() as by_spark:
        yield by_spark


def _judged(
    cycle: Path, suite: Suite, earlier: Sequence[Path], docs: Path, counting: Counting, on_progress: Progress
) -> tuple[dict[str, Any], drift.Profile]:
    """The result, and what was drawn of the good rows."""
    folder = cycle / "snapshot"
    labels = _labels(folder)
    # Great Expectations takes seconds to import; meanwhile other processes count. A finished result needs
    # none of it.
    with ThreadPoolExecutor(1) as beside:
        beside.submit(import_module, "validation.expectations")
        as_expected = list(labels.columns) == list(suite.columns.names)
        counted = counting(folder, suite, on_progress) if as_expected else None
    from validation.expectations import Asset, judge

    assets = [Asset("schema", labels, (_schema_limit(suite),))]
    profile, moved = drift.NOTHING, list[drift.Moved]()
    if counted is not None:
        profile = drift.profile_of(counted.drawn)
        moved = drift.moved(profile, drift.merged(earlier), suite.drifts, suite.reference)
        assets += [*_groups(suite, counted), *_drifts(moved)]
    outcomes = _with_rows(judge(assets, cycle.name, docs), moved)
    broken = [outcome for outcome in outcomes if outcome.blocking and not outcome.success]
    listed = iter(()) if counted is None else counted.quarantined
    result = {
        "success": not broken,
        "reason": " ".join(map(_sentence, broken)),
        "rows": snapshot.row_count(folder),
        "accepted": 0 if counted is None else counted.rows - counted.bad,
        "quarantined_rows": 0 if counted is None else counted.bad,
        "quarantined": list(islice(listed, LISTED_IF_REFUSED) if broken else listed),
        "expectations": [asdict(outcome) for outcome in outcomes],
        "reference": [path.parents[1].name for path in earlier],
    }
    return result, profile


def _groups(suite: Suite, counted: Counted) -> list[Asset]:
    """What is judged of the rows, a page of the data docs for each group."""
    from validation.expectations import Asset

    assets = [
        Asset(
            group,
            counted.frame,
            tuple(each for each in suite.snapshot if each.group == group),
            tuple(each for each in suite.rows if each.group == group),
        )
        for group in GROUPS
    ]
    return [asset for asset in assets if asset.limits or asset.rules]


def _drifts(moved: Sequence[drift.Moved]) -> list[Asset]:
    """What is judged of the distributions: one line, a column for each measure."""
    import pandas as pd

    from validation.expectations import Asset

    judged = [each for each in moved if not each.not_judged]
    limits = tuple(
        Limit(
            group=each.drift.group,
            name=each.drift.name,
            expectation="ExpectColumnMaxToBeBetween",
            options={"column": each.drift.name, "max_value": each.limit},
            says=each.drift.says,
            reason=each.drift.reason,
            blocks=each.drift.blocks,
        )
        for each in judged
    )
    frame = pd.DataFrame({each.drift.name: [each.value] for each in judged})
    return [Asset("distribution", frame, limits)] if judged else []


def _with_rows(outcomes: Sequence[Outcome], moved: Sequence[drift.Moved]) -> list[Outcome]:
    """The outcomes; those of drift with their limit and rows, and with those that could not be judged."""
    judged = {each.drift.name: each for each in moved if not each.not_judged}
    told = []
    for outcome in outcomes:
        found = judged.get(outcome.name)
        if found is not None:
            numbers = {"limit": found.limit, "rows": found.rows, "reference_rows": found.reference_rows}
            outcome = replace(outcome, observed={**outcome.observed, **numbers})
        told.append(outcome)
    for each in moved:
        if each.not_judged:
            wanted = each.drift
            observed = {"not_judged": each.not_judged}
            told.append(Outcome(wanted.group, wanted.name, wanted.says, wanted.blocks, True, observed))
    return told


def _finished(target: Path, inputs: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The result that was made of `inputs`, if there is one, with its docs."""
    if not (target / RESULT).is_file() or not (target / DOCS / "index.html").is_file():
        return None
    try:
        found = read_json(target / RESULT)
    except ValueError:
        return None
    return found if found.get("inputs") == inputs else None


def _labels(folder: Path) -> pd.DataFrame:
    """No rows; one column for each of the snapshot's, named "name: type"."""
    import pandas as pd

    return pd.DataFrame(
        columns=[f"{field.name}: {field.type}" for field in pq.read_schema(folder / snapshot.ROWS)]
    )


def _schema_limit(suite: Suite) -> Limit:
    return Limit(
        group="contract",
        name="schema",
        expectation="ExpectTableColumnsToMatchOrderedList",
        options={"column_list": list(suite.columns.names)},
        says=suite.columns.says,
        reason=suite.columns.reason,
    )


def _sentence(broken: Outcome) -> str:
    numbers = ", ".join(f"{key} {value}" for key, value in broken.observed.items())
    return f"{broken.name} does not hold ({broken.says}): {numbers}."
