"""Judge a snapshot with Great Expectations: bad rows are quarantined, a bad snapshot is refused.

What is expected is data (`suite.yaml`); what is judged are counts per row (`features.py`), so that neither
result.json nor the data docs can hold a word of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import yaml

from validation import snapshot
from validation.features import FEATURES, features
from validation.files import discard_unfinished, new_folder, read_json, sha256, write_json
from validation.note import Progress, silent

if TYPE_CHECKING:
    import pandas as pd

SUITE = Path(__file__).with_name("suite.yaml")
RESULT = "result.json"
DOCS = "data_docs"


@dataclass(frozen=True, slots=True)
class Rule:
    """What every row must be like: `feature` is 0. `counts`: whether breaking it is a fault of the log."""

    rule: str
    feature: str
    says: str
    counts: bool = True


@dataclass(frozen=True, slots=True)
class Limit:
    """What the snapshot as a whole must be like: an expectation of Great Expectations, and its options."""

    name: str
    expectation: str
    options: Mapping[str, Any]
    says: str


@dataclass(frozen=True, slots=True)
class Suite:
    """Everything that is expected of a snapshot."""

    schema: tuple[str, ...]
    rows: tuple[Rule, ...]
    snapshot: tuple[Limit, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One expectation's result; `observed` is numbers, and column names where the schema is judged."""

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


def read_suite(path: Path = SUITE) -> Suite:
    """The suite in a YAML file.

    Raises:
        ValueError: if an entry has a field that is not known, lacks one, or judges no known feature.
    """
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        suite = Suite(
            schema=tuple(data["schema"]),
            rows=tuple(Rule(**each) for each in data["rows"]),
            snapshot=tuple(Limit(**each) for each in data["snapshot"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no suite: {error}") from error
    for each in suite.rows:
        if each.feature not in FEATURES:
            raise ValueError(f"{path}: {each.rule} judges {each.feature!r}; known are {', '.join(FEATURES)}")
    return suite


def check(cycle: Path, suite_path: Path = SUITE, on_progress: Progress = silent) -> Checked:
    """Judge `cycle/snapshot`; write `cycle/validation`: result.json and the data docs.

    A result that was made of the same snapshot and suite is returned as it is.

    Raises:
        SnapshotError: if the snapshot is missing, half-written, or not the one that was frozen.
    """
    folder, target = cycle / "snapshot", cycle / "validation"
    record = snapshot.verified(folder)
    inputs = {
        "files": {f"snapshot/{name}": digest for name, digest in record["files"].items()}
        | {f"snapshot/{snapshot.RECORD}": sha256(folder / snapshot.RECORD)},
        "options": {"suite": sha256(suite_path)},
    }
    finished = _finished(target, inputs)
    if finished is not None:
        return Checked(finished, new=False)
    suite = read_suite(suite_path)

    # Imported here: it takes seconds, and a finished result needs none of it.
    from validation.expectations import Asset, judge

    labels = _labels(folder)
    assets = [Asset("schema", labels, (_schema_limit(suite),))]
    frame = None
    if list(labels.columns) == list(suite.schema):
        frame = feature_frame(folder, suite, on_progress)
        assets.append(Asset("rows", frame, suite.snapshot, suite.rows))
    discard_unfinished(target)
    with new_folder(target) as building:
        outcomes = judge(assets, cycle.name, building / DOCS)
        broken = [outcome for outcome in outcomes if outcome.blocking and not outcome.success]
        result = {
            "success": not broken,
            "reason": " ".join(map(_sentence, broken)),
            "rows": _row_count(folder),
            "accepted": 0 if frame is None else int((~frame["bad"]).sum()),
            "quarantined_rows": 0 if frame is None else int(frame["bad"].sum()),
            "quarantined": [] if frame is None else quarantined(frame, suite.rows),
            "expectations": [asdict(outcome) for outcome in outcomes],
            "inputs": inputs,
        }
        write_json(building / RESULT, result)
    return Checked(result, new=True)


def feature_frame(folder: Path, suite: Suite, on_progress: Progress) -> pd.DataFrame:
    """One line a row: id, features, `quarantined` (0 or 1: breaks a rule that counts), `bad` (breaks any)."""
    import pandas as pd

    total, ids = _row_count(folder), []
    counts: dict[str, list[int]] = {name: [] for name in FEATURES}
    on_progress(0, total)
    for batch in snapshot.rows(folder):
        for row in batch:
            ids.append(str(row["inference_id"]))
            for name, count in features(row).items():
                counts[name].append(count)
        on_progress(len(ids), total)
    frame = pd.DataFrame({"inference_id": ids, **counts}).astype(dict.fromkeys(FEATURES, "int64"))
    # An id that two rows have names neither: both are in quarantine.
    frame["repeated_id"] = frame["inference_id"].duplicated(keep=False).astype("int64")
    frame["quarantined"] = (frame[[each.feature for each in suite.rows if each.counts]] > 0).any(axis=1)
    frame["quarantined"] = frame["quarantined"].astype("int64")
    frame["bad"] = (frame[[each.feature for each in suite.rows]] > 0).any(axis=1)
    return frame


def quarantined(frame: pd.DataFrame, rules: Sequence[Rule]) -> list[dict[str, str]]:
    """Each bad row with each rule that it breaks; the detail is a count, never a word of what it says."""
    return [
        {"inference_id": row.inference_id, "rule": each.rule, "detail": f"{each.feature}: {count}"}
        for row in frame[frame["bad"]].itertuples()
        for each in rules
        if (count := getattr(row, each.feature)) > 0
    ]


def _finished(target: Path, inputs: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The result that was made of `inputs`, if there is one, with its docs."""
    if not (target / RESULT).is_file() or not (target / DOCS / "index.html").is_file():
        return None
    try:
        found = read_json(target / RESULT)
    except ValueError:
        return None
    return found if found.get("inputs") == inputs else None


def _row_count(folder: Path) -> int:
    return int(pq.read_metadata(folder / snapshot.ROWS).num_rows)


def _labels(folder: Path) -> pd.DataFrame:
    """No rows; one column for each of the snapshot's, named "name: type"."""
    import pandas as pd

    return pd.DataFrame(
        columns=[f"{field.name}: {field.type}" for field in pq.read_schema(folder / snapshot.ROWS)]
    )


def _schema_limit(suite: Suite) -> Limit:
    return Limit(
        name="schema",
        expectation="ExpectTableColumnsToMatchOrderedList",
        options={"column_list": list(suite.schema)},
        says="the columns, their types and their order are those that are known",
    )


def _sentence(broken: Outcome) -> str:
    numbers = ", ".join(f"{key} {value}" for key, value in broken.observed.items())
    return f"{broken.name} does not hold ({broken.says}): {numbers}."
