"""Does a cycle come out the same again? Its dataset from the snapshots still there, its adapter from that.

Both are made anew in a scratch folder, with the options, the seed and the number of threads that the records
name, and compared by SHA-256. What could make them differ is looked at first, and named: inputs that are gone
or were erased, other packages, another processor.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from agentloop.night import Night
from grpc_server.guard import hostile
from training import bfcl, curate, curation_rules, cycle, gate_key, recipe, suites
from training.watching import Progress, unwatched

SAME, DIFFERS, IMPOSSIBLE = 0, 3, 4
"""Exit codes: everything came out the same; something did not; it cannot be made again."""

_SETS = ("train.jsonl", "gate.jsonl")
_OF_NO_CYCLE = ("barred", "suites", "hostile", "gate_key")


@dataclass(slots=True)
class _Findings:
    """What was found so far: why something may differ, why it cannot be made, and what was compared."""

    differences: list[str] = field(default_factory=list)
    impossible: list[str] = field(default_factory=list)
    compared: dict[str, dict[str, Any]] = field(default_factory=dict)

    def compare(self, name: str, then: str | None, again: str | None) -> None:
        self.compared[name] = {"then": then, "again": again, "same": then is not None and then == again}


def run(
    directory: Path,
    base_gguf: Path,
    state_dir: Path,
    *,
    suites_file: Path = suites.CONFIG,
    dataset_only: bool = False,
    progress: Progress = unwatched,
) -> dict[str, Any]:
    """Make a cycle's dataset and adapter again, and say whether they are the same.

    Returns `same` (None where it cannot be made), `compared` (by file, SHA-256 then and again), `differences`
    (what is not as it was then) and `impossible` (why something could not be made). Nothing of the cycle is
    changed; the scratch folder, under `state_dir`, is deleted.

    Raises:
        FileNotFoundError: if there is no such cycle, or it has no dataset.
        ValueError: if a record cannot be read.
    """
    record = directory / "dataset" / "dataset.json"
    if not record.is_file():
        raise FileNotFoundError(f"{directory} has no dataset/dataset.json: there is nothing to make again")
    found = _Findings()
    _compare_packages(directory, found)
    for one in Night(directory).erasures:
        found.differences.append(f"rows were erased from this cycle at {one.get('at')}: {one.get('counts')}")
    with _scratch(state_dir / "reproduce", directory.resolve().name) as scratch:
        _curate_again(directory, scratch, cycle.read_json(record), suites_file, state_dir, found)
        if not dataset_only and (directory / "adapter" / "finetune.json").is_file():
            _train_again(directory, scratch, base_gguf, state_dir, found, progress)
    same = all(each["same"] for each in found.compared.values())
    return {
        "cycle_id": directory.resolve().name,
        "same": None if found.impossible and same else same,
        "compared": found.compared,
        "differences": found.differences,
        "impossible": found.impossible,
    }


def exit_code(found: Mapping[str, Any]) -> int:
    """What a script is told."""
    if any(not each["same"] for each in found["compared"].values()):
        return DIFFERS
    return IMPOSSIBLE if found["impossible"] else SAME


def told(found: Mapping[str, Any]) -> str:
    """The findings in words."""
    words = {True: "the same", False: "NOT the same"}
    lines = [f"{name}: {words[each['same']]}" for name, each in found["compared"].items()]
    lines += [f"differs: {each}" for each in found["differences"]]
    lines += [f"cannot be made again: {each}" for each in found["impossible"]]
    return "\n".join(lines)


# The dataset.


def _curate_again(
    directory: Path,
    scratch: Path,
    record: Mapping[str, Any],
    suites_file: Path,
    state_dir: Path,
    found: _Findings,
) -> None:
    inputs = record.get("inputs") or {}
    recorded: Mapping[str, str] = inputs.get("files") or {}
    places = {name: _place(name, directory, suites_file, state_dir) for name in recorded}
    before = len(found.impossible)
    for name, sha256 in recorded.items():
        _compare_input(name, places[name], sha256, found)
    if not recorded:
        found.impossible.append("the dataset: dataset.json does not say what it was made of")
    if len(found.impossible) > before:
        return
    for name, place in places.items():
        if place is not None and name not in _OF_NO_CYCLE:
            _link(place, directory, scratch)
    rules_file = scratch / "curation.yaml"
    rules_file.write_text(yaml.safe_dump(inputs.get("options") or {}, sort_keys=False), encoding="utf-8")
    try:
        curation_rules.read_rules(rules_file)
    except ValueError as error:
        first = str(error).partition("\n")[0]
        found.impossible.append(f"the dataset: curation had rules of another form then ({first})")
        return
    curate.run(scratch, rules_file, suites_file, key_file=places.get("gate_key"))
    for name in _SETS:
        found.compare(f"dataset/{name}", _then(directory, name), cycle.sha256(scratch / "dataset" / name))


def _place(name: str, directory: Path, suites_file: Path, state_dir: Path) -> Path | None:
    """Where an input of curation lies; None where its name says nothing to this code."""
    fixed = {
        "snapshot": directory / "snapshot" / "inferences.parquet",
        "validation": directory / "validation" / "result.json",
        "barred": bfcl.BARRED_FILE,
        "suites": suites_file,
        "hostile": hostile.RULES,
        "gate_key": state_dir / gate_key.NAME,
    }
    earlier, _, file = name.partition("/")
    if file in _SETS:
        return directory.resolve().parent / earlier / "dataset" / file
    return fixed.get(name)


def _compare_input(name: str, place: Path | None, sha256: str, found: _Findings) -> None:
    if place is None:
        found.impossible.append(f"the dataset: this code does not know its input {name!r}")
    elif not place.is_file():
        found.impossible.append(f"the dataset: {name} is gone ({place})")
    elif cycle.sha256(place) != sha256:
        buried = name not in _OF_NO_CYCLE and Night(place.parents[1]).erasures
        erased = " by an erasure" if buried else ""
        found.impossible.append(f"the dataset: {name} was changed{erased} since ({place})")


def _link(place: Path, directory: Path, scratch: Path) -> None:
    """The input under the name that it had, in the scratch folder; an earlier cycle as one with a verdict."""
    owner = place.parents[1]
    target = scratch if owner == directory else scratch.parent / owner.name
    link = target / place.relative_to(owner)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(place.resolve())
    if target != scratch:
        for name in ("gate.json", "dataset/dataset.json"):
            if not (target / name).exists():
                (target / name).symlink_to((owner / name).resolve())


def _then(directory: Path, name: str) -> str | None:
    """The SHA-256 that a set had when it was made: what the training read, else what the manifest says."""
    if name == "train.jsonl" and (trained := _finetune(directory).get("train.jsonl")):
        return str(trained)
    manifest = directory / cycle.MANIFEST
    files = cycle.read_json(manifest).get("files", {}) if manifest.is_file() else {}
    if f"dataset/{name}" in files:
        return str(files[f"dataset/{name}"]["sha256"])
    path = directory / "dataset" / name
    return cycle.sha256(path) if path.is_file() else None


# The adapter.


def _train_again(
    directory: Path, scratch: Path, base_gguf: Path, state_dir: Path, found: _Findings, progress: Progress
) -> None:
    record = cycle.read_json(directory / "adapter" / "finetune.json")
    if (processes := record.get("processes", 1)) != 1:
        found.impossible.append(
            f"the adapter: {processes} processes trained it together, whose sums one alone does not repeat"
        )
        return
    files = _finetune(directory)
    train = _trained_on(directory, scratch, files.get("train.jsonl"))
    if train is None:
        found.impossible.append("the adapter: the dataset that it was trained on is no longer there")
        return
    if not base_gguf.is_file() or cycle.sha256(base_gguf) != files.get("base"):
        found.impossible.append(f"the adapter: {base_gguf} is not the base that it was trained from")
        return
    target = scratch / "dataset" / "train.jsonl"
    if train != target:
        target.parent.mkdir(exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(train.resolve())
    recipe_file = scratch / "recipe.yaml"
    options = record["inputs"]["options"] | {"compute_dtype": record["config"]["compute_dtype"]}
    recipe_file.write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
    from training import finetune

    try:
        recipe.read(recipe_file)
    except ValueError as error:
        first = str(error).partition("\n")[0]
        found.impossible.append(f"the adapter: the recipe had another form then ({first})")
        return
    with _threads(record.get("threads"), found):
        finetune.run(scratch, base_gguf, state_dir, recipe_file, progress)
    for path in sorted((directory / "adapter").glob("*.safetensors")):
        again = scratch / "adapter" / path.name
        found.compare(
            f"adapter/{path.name}", cycle.sha256(path), cycle.sha256(again) if again.is_file() else None
        )


def _finetune(directory: Path) -> dict[str, str]:
    """What the fine-tuning read, by name: SHA-256."""
    record = directory / "adapter" / "finetune.json"
    inputs = cycle.read_json(record).get("inputs", {}) if record.is_file() else {}
    return dict(inputs.get("files", {}))


def _trained_on(directory: Path, scratch: Path, sha256: str | None) -> Path | None:
    for place in (scratch, directory):
        path = place / "dataset" / "train.jsonl"
        if path.is_file() and cycle.sha256(path) == sha256:
            return path
    return None


@contextmanager
def _threads(wanted: Any, found: _Findings) -> Iterator[None]:
    """As many threads as then: sums of floating-point numbers come out otherwise with another number."""
    import torch

    before = torch.get_num_threads()
    if isinstance(wanted, int) and 0 < wanted <= 1024:
        torch.set_num_threads(wanted)
    else:
        found.differences.append("how many threads computed is not recorded")
    try:
        yield
    finally:
        torch.set_num_threads(before)


# What else may make a difference.


def _compare_packages(directory: Path, found: _Findings) -> None:
    for step in ("curate", "finetune"):
        path = directory / "steps" / f"{step}.json"
        note = cycle.read_json(path) if path.is_file() else {}
        then: Mapping[str, str] = note.get("versions") or {}
        now = cycle.versions([name for name in then if name not in ("python", "agent-loop-service")])
        found.differences += [
            f"{name} was {version} at {step}, and is {now.get(name)}"
            for name, version in then.items()
            if now.get(name) != version
        ]
        processor = note.get("processor")
        if processor and processor != cycle.processor():
            found.differences.append(f"the processor was {processor} at {step}, and is {cycle.processor()}")


@contextmanager
def _scratch(parent: Path, cycle_id: str) -> Iterator[Path]:
    """An empty cycle of the same name, alone in a folder that is deleted at the end."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=f"{cycle_id}-"))
    try:
        (folder / cycle_id).mkdir()
        yield folder / cycle_id
    finally:
        shutil.rmtree(folder, ignore_errors=True)
