"""What is learned from a snapshot: a training set and a gate set, and of every row not used the reason.

A row is used when a caller demonstrated the answer that it should have had (how the inference itself ended
does not matter). Sessions are split by a hash: a session is wholly for training or wholly for the gate. The
dataset of a cycle is the union with the dataset of the last cycle that has a verdict; training keeps the
newest examples up to a cap, gate items accumulate. Always true of it:

- no training example is nearly a gate item, so that the gate measures what was not learned by heart;
- no new gate item is nearly an example of the dataset before, which the champion may have been trained on
  (what the cap dropped earlier is not looked at: the champion may have learned a question that is near it);
- nothing is, by content, a question or a function of the held-out part of the leaderboard
  (`data/barred.json` holds their fingerprints).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grpc_server.domain.plain import message_to_plain, request_from_plain, request_to_plain
from training import bfcl, cycle
from training.examples import COLUMNS, Barred, Example, example, read_barred
from training.neighbours import Neighbours, question

REASONS = (
    "quarantined",
    "no_demonstration",
    "raw_prompt",
    "invalid_request",
    "invalid_demonstration",
    "barred",
    "too_long",
    "duplicate",
    "near_duplicate_of_gate",
    "near_duplicate_of_train",
    "over_cap",
)
"""Why a row is not used. The first that applies is the one counted."""

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Options:
    """How a snapshot is curated.

    `cap` bounds the training examples, `max_characters` a prompt with its completion; fewer than
    `min_examples` new training examples are not worth a training. `gate_share` is of sessions.
    """

    cap: int = 2000
    gate_share: float = 0.15
    min_examples: int = 32
    max_characters: int = 3600  # about the 1024 tokens of configs/gemma3-270m.yaml

    def __post_init__(self) -> None:
        if self.cap < 1 or self.min_examples < 1 or self.max_characters < 1:
            raise ValueError("cap, min_examples and max_characters must be 1 or more")
        if not 0 <= self.gate_share < 1:
            raise ValueError(f"gate_share is {self.gate_share}; it must be from 0 to below 1")


@dataclass(frozen=True, slots=True)
class Dataset:
    """Lines of train.jsonl and gate.jsonl, in order of inference id, which is order of time."""

    train: tuple[Line, ...] = ()
    gate: tuple[Line, ...] = ()


@dataclass(frozen=True, slots=True)
class Curated:
    """A dataset, what of it is new, and why every other row is not in it."""

    dataset: Dataset
    new_train: int
    new_gate: int
    excluded: Mapping[str, Sequence[str]]  # inference ids by reason
    dropped_earlier: Mapping[str, int]  # examples of the earlier dataset that are not in this one


# The step.


def run(directory: Path, options: Options | None = None) -> dict[str, Any]:
    """Write `<cycle>/dataset/`, unless it is there of the same inputs; return what dataset.json holds.

    Its `enough` says whether the new training examples are worth a training.

    Raises:
        FileNotFoundError: if the snapshot, or its validation, is missing.
        ValueError: if validation did not accept the snapshot.
    """
    options = options or Options()
    snapshot = directory / "snapshot" / "inferences.parquet"
    validation = directory / "validation" / "result.json"
    earlier = _earlier_dataset(directory)
    files = {"snapshot": snapshot, "validation": validation, "barred": bfcl.BARRED_FILE}
    for name in ("train.jsonl", "gate.jsonl"):
        if earlier is not None:
            files[f"{earlier.parent.name}/{name}"] = earlier / name
    inputs = cycle.inputs_of(files, asdict(options))
    output = directory / "dataset"
    if not cycle.done(output / "dataset.json", inputs):
        judged = cycle.read_json(validation)
        if not judged.get("success"):
            raise ValueError(
                f"validation did not accept the snapshot: {judged.get('reason', 'no reason given')}"
            )
        with cycle.step(directory, "curate", outputs=["dataset"]):
            quarantined = {str(each["inference_id"]) for each in judged.get("quarantined", ())}
            before = Dataset() if earlier is None else read_dataset(earlier)
            merged = [] if earlier is None else cycle.read_json(earlier / "dataset.json")["cycles"]
            found = curate(read_rows(snapshot), quarantined, read_barred(), before, options)
            _write(output, found, options, [*merged, directory.resolve().name], inputs)
    return cycle.read_json(output / "dataset.json")


def read_rows(snapshot: Path) -> Iterator[dict[str, Any]]:
    """The rows of a snapshot, the columns that curation needs."""
    from pyarrow import parquet

    with parquet.ParquetFile(snapshot) as file:
        for batch in file.iter_batches(batch_size=1000, columns=list(COLUMNS)):
            yield from batch.to_pylist()


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


def _write(
    output: Path, found: Curated, options: Options, cycles: Sequence[str], inputs: Mapping[str, Any]
) -> None:
    excluded = {reason: sorted(found.excluded.get(reason, ())) for reason in REASONS}
    enough = found.new_train >= options.min_examples
    reason = f"{found.new_train} new training examples, {options.min_examples} needed"
    with cycle.new_directory(output) as building:
        for name, lines in (("train.jsonl", found.dataset.train), ("gate.jsonl", found.dataset.gate)):
            with (building / name).open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines)
        cycle.write_json(
            building / "dataset.json",
            {
                "train": len(found.dataset.train),
                "gate": len(found.dataset.gate),
                "new_train": found.new_train,
                "new_gate": found.new_gate,
                "rows": found.new_train + found.new_gate + sum(map(len, excluded.values())),
                "excluded": {name: len(ids) for name, ids in excluded.items()},
                "excluded_ids": excluded,
                "dropped_earlier": dict(found.dropped_earlier),
                "cap": options.cap,
                "cycles": list(cycles),
                "enough": enough,
                "reason": "" if enough else reason,
                "inputs": dict(inputs),
            },
        )


# Pure from here on.


def curate(
    rows: Iterable[Mapping[str, Any]],
    quarantined: AbstractSet[str],
    barred: Barred,
    earlier: Dataset,
    options: Options,
) -> Curated:
    """The union of `earlier` and what `rows` teach; every row is in it, or excluded for one reason."""
    night = _Night(earlier)
    for each in night.taught(rows, quarantined, barred, options.max_characters):
        (night.for_gate if _is_for_gate(each, options.gate_share) else night.for_train).append(each)
    gate, new_gate = night.merged_gate()
    train, new_train = night.merged_train(gate)
    train, new_train = night.capped(train, new_train, options.cap)
    return Curated(
        dataset=Dataset(train=tuple(train), gate=tuple(gate)),
        new_train=len(new_train),
        new_gate=len(new_gate),
        excluded=night.excluded,
        dropped_earlier=night.dropped,
    )


class _Night:
    """One snapshot on its way into the dataset, and the count of what falls by the wayside."""

    def __init__(self, earlier: Dataset) -> None:
        self.earlier = earlier
        self.for_train: list[Example] = []
        self.for_gate: list[Example] = []
        self.excluded: defaultdict[str, list[str]] = defaultdict(list)
        self.dropped: Counter[str] = Counter()

    def taught(
        self,
        rows: Iterable[Mapping[str, Any]],
        quarantined: AbstractSet[str],
        barred: Barred,
        max_characters: int,
    ) -> list[Example]:
        """The examples that `rows` teach, oldest first; of those with the same prompt, the last."""
        examples = []
        for row in rows:
            inference_id = str(row["inference_id"])
            made = "quarantined" if inference_id in quarantined else example(row, barred, max_characters)
            if isinstance(made, str):
                self.excluded[made].append(inference_id)
            else:
                examples.append(made)
        unique: dict[str, Example] = {}
        for each in sorted(examples, key=lambda one: one.inference_id):
            if each.prompt in unique:
                self.excluded["duplicate"].append(unique.pop(each.prompt).inference_id)
            unique[each.prompt] = each
        return list(unique.values())

    def merged_gate(self) -> tuple[list[Line], set[str]]:
        """All gate items, and the ids of the new ones: none is nearly what was trained on before."""
        gate = {_gate_key(line): line for line in self.earlier.gate}
        trained = Neighbours(line["question"] for line in self.earlier.train)
        new = set()
        for each in self.for_gate:
            line = _gate_line(each)
            known = gate.get(_gate_key(line))
            if known is not None and known["demonstration"] == line["demonstration"]:
                self.excluded["duplicate"].append(each.inference_id)
            elif trained.near(question(each.request)):
                self.excluded["near_duplicate_of_train"].append(each.inference_id)
            else:
                gate[_gate_key(line)] = line
                new.add(each.inference_id)
        return _by_id(gate.values()), new

    def merged_train(self, gate: Iterable[Line]) -> tuple[list[Line], set[str]]:
        """All training examples, and the ids of the new ones: none is nearly an item of `gate`."""
        judged = Neighbours(question(request_from_plain(line["request"])) for line in gate)
        train: dict[str, Line] = {}
        for line in self.earlier.train:
            if judged.near(line["question"]):
                self.dropped["near_duplicate_of_gate"] += 1
            else:
                train[line["prompt"]] = line
        new = set()
        for each in self.for_train:
            known = train.get(each.prompt)
            if known is not None and known["completion"] == each.completion:
                self.excluded["duplicate"].append(each.inference_id)
            elif judged.near(question(each.request)):
                self.excluded["near_duplicate_of_gate"].append(each.inference_id)
            else:
                train[each.prompt] = _train_line(each)
                new.add(each.inference_id)
        return _by_id(train.values()), new

    def capped(self, train: list[Line], new: set[str], cap: int) -> tuple[list[Line], set[str]]:
        """The newest `cap` of `train`, and which of them are new."""
        over = {str(line["inference_id"]) for line in train[:-cap]}
        self.excluded["over_cap"] += sorted(over & new)
        self.dropped["over_cap"] += len(over - new)
        return train[-cap:], new - over


def _is_for_gate(one: Example, share: float) -> bool:
    """Decided by the session, or by the prompt where there is no session: the same every night."""
    key = f"session {one.session_id}" if one.session_id else f"prompt {one.prompt}"
    drawn = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return drawn < share


def _train_line(one: Example) -> Line:
    return {
        "inference_id": one.inference_id,
        "session_id": one.session_id,
        "prompt": one.prompt,
        "completion": one.completion,
        "question": question(one.request),
        "weight": 1.0,
    }


def _gate_line(one: Example) -> Line:
    return {
        "inference_id": one.inference_id,
        "session_id": one.session_id,
        "request": request_to_plain(one.request),
        "demonstration": message_to_plain(one.demonstration),
    }


def _gate_key(line: Line) -> str:
    """What makes two gate items the same: messages and tools, not how the answer is drawn."""
    return json.dumps([line["request"]["messages"], line["request"]["tools"]], sort_keys=True)


def _by_id(lines: Iterable[Line]) -> list[Line]:
    return sorted(lines, key=lambda line: str(line["inference_id"]))
