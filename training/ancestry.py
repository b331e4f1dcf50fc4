"""Is the candidate made of the dataset that is there? Not if rows were erased between two steps of its night.

Each record names by SHA-256 what its step read: finetune.json the training set, quantize.json the adapter and
the model made of it, evaluation.json the model that was asked. The gate follows them back, so that no model
is let through that learned what is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from agentloop.night import Night
from training import cycle, quantize


class OtherDatasetError(RuntimeError):
    """The candidate is not of what lies in the cycle now; the text says which steps to run again."""


def check(directory: Path, candidate: Mapping[str, Any]) -> None:
    """Return if `candidate` (its sha256) was made of the cycle's `dataset/train.jsonl` as it is now.

    A cycle in which nothing was trained here passes. Weights that retention took are not looked for.

    Raises:
        OtherDatasetError: naming the first step that must be run again.
        ValueError: if a record is no JSON object.
    """
    adapter, record = directory / "adapter", directory / quantize.RECORD
    if not (adapter / "finetune.json").is_file():
        return
    train = directory / "dataset" / "train.jsonl"
    learned = _read_by(adapter / "finetune.json").get(train.name)
    if not train.is_file() or cycle.sha256(train) != learned:
        raise _refused(directory, "finetune", "dataset/train.jsonl is not what the candidate learned from")
    made_of = _read_by(record) if record.is_file() else {}
    weights = {name: path for name, path in quantize.trained(adapter).items() if path.is_file()}
    if not made_of or any(made_of.get(name) != cycle.sha256(path) for name, path in weights.items()):
        raise _refused(directory, "quantize", "model.gguf was not made of the adapter that is there")
    if cycle.read_json(record).get("sha256") != candidate["sha256"]:
        raise _refused(directory, "evaluate", "another model than model.gguf was asked")


def _read_by(record: Path) -> Mapping[str, Any]:
    """The hashes of the files that a step read, by name; none where its record has another form."""
    inputs = cycle.read_json(record).get("inputs")
    files = inputs.get("files") if isinstance(inputs, dict) else None
    return files if isinstance(files, dict) else {}


def _refused(directory: Path, step: str, why: str) -> OtherDatasetError:
    erased = [str(one.get("at")) for one in Night(directory).erasures]
    since = f" (rows of this cycle were erased, last at {max(erased)})" if erased else ""
    return OtherDatasetError(
        f"{why}{since}, so there is no verdict; run `python -m training {step} --cycle"
        f" {quote(str(directory))}` and the steps after it again (in Airflow: clear the task {step} with what"
        " follows)"
    )
