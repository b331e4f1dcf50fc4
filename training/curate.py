"""What is learned from a snapshot: a training set and a gate set, and of every row not used the reason.

A row is used when a caller demonstrated the answer that it should have had (how the inference itself ended
does not matter), or accepted the one it got. Sessions are split by a keyed hash: a session is wholly for
training or wholly for the gate. The dataset of a cycle is the union with the dataset of the last cycle that
has a verdict; gate items accumulate, training examples have a cap, of which older nights keep a share. What
is poison, how much one caller may teach, and what each example weighs, is in configs/curation.yaml.

The snapshot is read twice: once to decide, when little is kept of each row, and once for the texts of what is
learned.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpc_server.domain.plain import message_to_plain, request_to_plain
from grpc_server.guard import hostile
from training import balance, bfcl, card, curation_rules, cycle, gate_key, poison, suites
from training.curation_record import REASONS, record
from training.curation_rules import Rules
from training.examples import COLUMNS, Barred, Example, example, read_barred
from training.learned import Dataset, Learned, learned
from training.lessons import Lesson, Line, fingerprint, lesson
from training.neighbours import question
from training.watching import Progress, unwatched


@dataclass(frozen=True, slots=True)
class Curated:
    """A dataset, what of it is new, and why every other row is not in it."""

    dataset: Dataset
    new_train: int
    new_gate: int
    found: Learned

    @property
    def excluded(self) -> Mapping[str, Sequence[str]]:
        """Inference ids by reason."""
        return self.found.excluded

    @property
    def dropped_earlier(self) -> Mapping[str, int]:
        """Examples of the earlier dataset that are not in this one."""
        return self.found.dropped


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a snapshot, the columns that curation needs; read anew at each pass."""

    snapshot: Path
    progress: Progress = unwatched

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from pyarrow import parquet

        with parquet.ParquetFile(self.snapshot) as file:
            done, total = 0, file.metadata.num_rows
            for batch in file.iter_batches(batch_size=1000, columns=list(COLUMNS)):
                yield from batch.to_pylist()
                done += batch.num_rows
                self.progress(done, total)


# The step.


def run(
    directory: Path,
    rules_file: Path = curation_rules.RULES,
    suites_file: Path = suites.CONFIG,
    progress: Progress = unwatched,
    key_file: Path | None = None,
) -> dict[str, Any]:
    """Write `<cycle>/dataset/`, unless it is there of the same inputs; return what dataset.json holds.

    Its `enough` says whether the new training examples are worth a training. `key_file` holds the secret by
    which sessions are drawn for the gate (`gate_key`); without one, as for imported sets, the draw is public.

    Raises:
        FileNotFoundError: if the snapshot, its validation, or a file of rules is missing.
        ValueError: if validation did not accept the snapshot, or the rules, or the key, are wrong.
    """
    rules = curation_rules.read_rules(rules_file)
    snapshot = directory / "snapshot" / "inferences.parquet"
    validation = directory / "validation" / "result.json"
    earlier = _earlier_dataset(directory)
    files = {
        "snapshot": snapshot,
        "validation": validation,
        "barred": bfcl.BARRED_FILE,
        "suites": suites_file,
        "hostile": hostile.RULES,
    }
    if key_file is not None:
        files["gate_key"] = key_file
    for name in ("train.jsonl", "gate.jsonl"):
        if earlier is not None:
            files[f"{earlier.parent.name}/{name}"] = earlier / name
    inputs = cycle.inputs_of(files, rules.model_dump(mode="json"))
    output = directory / "dataset"
    if not cycle.done(output / "dataset.json", inputs):
        judged = cycle.read_json(validation)
        if not judged.get("success"):
            raise ValueError(
                f"validation did not accept the snapshot: {judged.get('reason', 'no reason given')}"
            )
        with cycle.step(directory, "curate", packages=["rensa"], outputs=["dataset"]):
            quarantined = {str(each["inference_id"]) for each in judged.get("quarantined", ())}
            before = Dataset() if earlier is None else read_dataset(earlier)
            merged = [] if earlier is None else cycle.read_json(earlier / "dataset.json")["cycles"]
            asked = evaluated(suites_file)
            name = directory.resolve().name
            found = curate(
                Rows(snapshot, progress),
                quarantined,
                read_barred(),
                before,
                rules,
                night=name,
                asked=asked,
                key=b"" if key_file is None else gate_key.read(key_file),
            )
            told = record(found.dataset, found.found, rules, asked) | {
                "cycles": [*merged, name],
                "inputs": inputs,
            }
            with cycle.new_directory(output) as building:
                _write_lines(building / "train.jsonl", found.dataset.train)
                _write_lines(building / "gate.jsonl", found.dataset.gate)
                cycle.write_json(building / "dataset.json", told)
                card.write(building)
    return cycle.read_json(output / "dataset.json")


def evaluated(suites_file: Path) -> dict[str, list[str] | None]:
    """What each suite asks that is not made of the dataset itself; None where its items are not installed."""
    asked: dict[str, list[str] | None] = {}
    for suite in suites.read_config(suites_file).suites:
        if suite.source in ("dataset", "regressions"):
            continue
        try:
            items = suites.items(suite.model_copy(update={"cap": None}), Path(), 1)
        except bfcl.DataNotInstalledError:
            asked[suite.name] = None
        else:
            asked[suite.name] = [question(item.request) for item in items]
    return asked


def read_dataset(folder: Path) -> Dataset:
    """The lines of a dataset that is written."""
    return Dataset(*(tuple(_read_lines(folder / name)) for name in ("train.jsonl", "gate.jsonl")))


def _earlier_dataset(directory: Path) -> Path | None:
    """The dataset of the last cycle before this one that has a verdict and a dataset."""
    folders = [each / "dataset" for each in cycle.judged_before(directory)]
    return next((each for each in reversed(folders) if (each / "dataset.json").is_file()), None)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _write_lines(path: Path, lines: Iterable[Line]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines)


# Pure from here on.


def curate(
    rows: Iterable[Mapping[str, Any]],
    quarantined: AbstractSet[str],
    barred: Barred,
    earlier: Dataset,
    rules: Rules,
    *,
    night: str = "",
    asked: Mapping[str, Sequence[str] | None] | None = None,
    key: bytes = b"",
) -> Curated:
    """The union of `earlier` and what `rows` teach; every row is in it, or excluded for one reason.

    Args:
        rows: of a snapshot, each with COLUMNS; gone through twice.
        quarantined: ids of rows that validation set aside.
        barred: what is never learned.
        earlier: the dataset before.
        rules: what configs/curation.yaml says.
        night: the cycle's id, which new lines keep.
        asked: questions by suite, as `evaluated` gives them.
        key: the secret by which sessions are drawn for the gate.
    """
    unlearned: dict[str, list[str]] = {reason: [] for reason in REASONS}
    lessons: list[Lesson] = []
    is_hostile = poison.hostile(rules.poison)
    for row in rows:
        made = _example(row, quarantined, barred, rules)
        if isinstance(made, Example) and is_hostile(made):
            made = "hostile"
        if isinstance(made, str):
            unlearned[made].append(str(row["inference_id"]))
        else:
            lessons.append(lesson(made))
    suites_asked = {name: questions for name, questions in (asked or {}).items() if questions is not None}
    found = learned(lessons, earlier, rules, suites_asked, key)
    for reason, ids in unlearned.items():
        found.excluded[reason] += ids
    new = _lines(rows, found, quarantined, barred, rules, night)
    train = [*found.old_train, *(new[one.inference_id] for one in found.new_train)]
    gate = [*found.old_gate, *(new[one.inference_id] for one in found.new_gate)]
    return Curated(
        dataset=Dataset(
            train=tuple(balance.weighted(_by_id(train), rules.balance)), gate=tuple(_by_id(gate))
        ),
        new_train=len(found.new_train),
        new_gate=len(found.new_gate),
        found=found,
    )


def _example(
    row: Mapping[str, Any], quarantined: AbstractSet[str], barred: Barred, rules: Rules
) -> Example | str:
    if str(row["inference_id"]) in quarantined:
        return "quarantined"
    return example(row, barred, rules.max_characters, rules.accepted.score)


def _lines(
    rows: Iterable[Mapping[str, Any]],
    found: Learned,
    quarantined: AbstractSet[str],
    barred: Barred,
    rules: Rules,
    night: str,
) -> dict[str, Line]:
    """The new lines of the dataset, by inference id, from the rows gone through once more."""
    for_train = {one.inference_id: one for one in found.new_train}
    for_gate = {one.inference_id: one for one in found.new_gate}
    lines: dict[str, Line] = {}
    for row in rows:
        inference_id = str(row["inference_id"])
        known = for_train.get(inference_id) or for_gate.get(inference_id)
        made = _example(row, quarantined, barred, rules) if known is not None else ""
        # The id is another row's too where it stands twice, which validation has not told.
        if known is None or isinstance(made, str) or fingerprint(made.prompt) != known.prompt:
            continue
        make = _train_line if inference_id in for_train else _gate_line
        lines[inference_id] = {
            "inference_id": inference_id,
            "session_id": made.session_id,
            "caller": made.caller,
            "voices": sorted(known.voices),
            "cycle": night,
            **make(made, known, rules),
        }
    return lines


def _train_line(one: Example, known: Lesson, rules: Rules) -> Line:
    base = (rules.demonstrated if one.source == "demonstrated" else rules.accepted).weight
    return {
        "prompt": one.prompt,
        "completion": one.completion,
        "question": known.question,
        "source": one.source,
        "tool": known.tool,
        "tools": sorted(known.tools),
        "base": base,
        "weight": base,
    }


def _gate_line(one: Example, _known: Lesson, _rules: Rules) -> Line:
    return {"request": request_to_plain(one.request), "demonstration": message_to_plain(one.answer)}


def _by_id(lines: Iterable[Line]) -> list[Line]:
    return sorted(lines, key=lambda line: str(line["inference_id"]))
