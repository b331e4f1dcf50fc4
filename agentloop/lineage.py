"""Which rows did a model version learn from, and which versions learned from a row? The cycles' files say it.

Each dataset holds the union of those before it, so what a version learned from are the ids in its own cycle's
`train.jsonl`, and the first cycle that has an id is the night in which it was new. What was erased since is
in the tombstones of manifest.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import file_digest
from pathlib import Path
from typing import Any, Literal

from agentloop.cycle_summary import inference_ids
from agentloop.night import Night, cycles_in, every_cycle, lines_of

Part = Literal["train", "gate"]
Told = dict[str, Any]

PARTS: tuple[Part, ...] = ("train", "gate")


def learned_by(directory: Path) -> str:
    """The model version that was trained on the cycle's dataset; empty if it came to none.

    Without a verdict a version has no name yet, and was never served.
    """
    candidate = Night(directory).gate.get("candidate")
    if isinstance(candidate, dict) and isinstance(candidate.get("model_version"), str):
        return str(candidate["model_version"])
    trained = (directory / "model.gguf").is_file() or (directory / "adapter").is_dir()
    return f"of {directory.name}, without a verdict" if trained else ""


def made_by(model_version: str, cycles: Path) -> Path | None:
    """The cycle that made a model version; None for an untouched base, and where the cycle is gone."""
    tag = model_version.rpartition(":")[2]
    found = [each for each in every_cycle(cycles) if each.name == tag]
    # Of several models that learned the same night, the one of this name.
    return next((each for each in found if learned_by(each) == model_version), next(iter(found), None))


def rows(directory: Path, part: Part) -> Iterator[str]:
    """The inference ids in a cycle's dataset, in order of time; those that were erased are not there."""
    return inference_ids(directory / "dataset" / f"{part}.jsonl")


def of_cycle(directory: Path) -> Told:
    """What a cycle's model version is, and from how many rows of which nights it learned."""
    night = Night(directory)
    candidate = night.gate.get("candidate")
    champion = night.gate.get("champion")
    inputs = night.finetune.get("inputs")
    files = inputs.get("files") if isinstance(inputs, dict) else None
    files = files if isinstance(files, dict) else {}
    problems = [*night.problems, *(told for part in PARTS for told in _damaged(directory, part))]
    return {
        "cycle_id": night.cycle_id,
        "model_version": learned_by(directory) or None,
        "sha256": candidate.get("sha256") if isinstance(candidate, dict) else None,
        "trained_from_sha256": files.get("base"),
        "verdict": night.gate.get("verdict"),
        "result": night.rollout.get("result"),
        "judged_against": champion.get("model_version") if isinstance(champion, dict) else None,
        "rows": {part: sum(1 for _ in rows(directory, part)) for part in PARTS},
        "new_in": _new_in(directory),
        "dataset_as_trained": _as_trained(directory, files.get("train.jsonl")),
        "erased": [
            {"at": one.get("at"), "counts": one.get("counts"), "erasure": one.get("id")}
            for one in night.erasures
        ],
        "problems": problems,
    }


def of_row(inference_id: str, cycles: Path) -> list[Told]:
    """Every cycle that knows the row, oldest first: what it was there, and which version learned from it.

    `as` is train, gate, or why the row was not used; `erased_at` is None where the row is still there.
    """
    found = []
    for directory in every_cycle(cycles):
        for known, erased_at in _known(directory, inference_id):
            found.append(
                {
                    "cycle_id": directory.name,
                    "as": known,
                    "erased_at": erased_at,
                    "learned_by": (learned_by(directory) or None) if known == "train" else None,
                    "verdict": (night := Night(directory)).gate.get("verdict"),
                    "result": night.rollout.get("result"),
                }
            )
    return found


def versions(told: Sequence[Told]) -> list[str]:
    """The model versions that learned from a row, of what `of_row` told, oldest first."""
    return list(dict.fromkeys(one["learned_by"] for one in told if one["learned_by"]))


def _known(directory: Path, inference_id: str) -> Iterator[tuple[str, str | None]]:
    for part in PARTS:
        if inference_id in rows(directory, part):
            yield part, None
    night = Night(directory)
    for tombstone in night.erasures:
        for erased_from, gone in _ids(tombstone).items():
            if inference_id in gone:
                yield erased_from, str(tombstone.get("at"))
    excluded = night.dataset.get("excluded_ids")
    for reason, ids in excluded.items() if isinstance(excluded, dict) else ():
        if isinstance(ids, list) and inference_id in ids:
            yield str(reason), None


def _damaged(directory: Path, part: Part) -> Iterator[str]:
    path = directory / "dataset" / f"{part}.jsonl"
    count = sum(line is None for _, line in lines_of(path)) if path.is_file() else 0
    if count:
        yield f"dataset/{part}.jsonl has {count} lines that are no JSON objects: their rows are not counted"


def _ids(tombstone: Told) -> dict[str, list[Any]]:
    found = tombstone.get("ids")
    found = found if isinstance(found, dict) else {}
    return {part: ids for part, ids in found.items() if isinstance(ids, list)}


def _new_in(directory: Path) -> list[Told]:
    """In which nights the training examples of a cycle were new: cycle and count, oldest first."""
    left = set(rows(directory, "train"))
    found = []
    for other in cycles_in(directory.resolve().parent):
        if not left or other.name > directory.resolve().name:
            break
        here = left.intersection(rows(other, "train"))
        left -= here
        if here:
            found.append({"cycle_id": other.name, "rows": len(here)})
    return found


def _as_trained(directory: Path, sha256: Any) -> bool | None:
    """Whether train.jsonl still has the bytes that the version was trained on; None where nobody knows."""
    if not isinstance(sha256, str):
        return None
    with suppress(OSError), (directory / "dataset" / "train.jsonl").open("rb") as file:
        return file_digest(file, "sha256").hexdigest() == sha256
    return False
