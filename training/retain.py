"""Which of what the nights left may go? The large files of old cycles; never what any command still needs.

Of every cycle but the newest ones go: the model's GGUF, the adapter's weights, what an unfinished step left,
and the rows of the snapshot that this night's dataset does not have. What stays for ever is small: records,
verdicts, datasets, evaluations, pages. So lineage and erasure (a caller's rows are found in datasets, and by
the snapshot's rows of the same inferences), the best ever, regressions, the error budget, drift and the
watermark work as before; `reproduce` says of such a cycle that its snapshot has changed.

A GGUF stays, however old, if a route of the live server leads to it, if it is the best ever on a suite that
the gate guards, or if it is one of the last that served (`make rollback`, and what unlearning falls back to).
`retained.json` says what went, before it does; a run that was killed is finished by the next.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentloop.errors import NotFound
from agentloop.night import Night, cycles_in, folders_of_cycles
from training import best_ever, cycle, unlearn
from training.quantize import GGUF
from training.rewriting import BATCH_ROWS, SNAPSHOT, held, rewrite_snapshot
from training.room import size_of

if TYPE_CHECKING:
    from agentloop.sync_client import Client

RECORD = "retained.json"
LAST_SERVED = 3
"""So many of the versions that have served keep their GGUF, the newest."""

_KEPT_OF_ADAPTER = {"finetune.json", "training.jsonl", "config.yaml", "adapter_config.json"}
_LINES = ("dataset/train.jsonl", "dataset/gate.jsonl", "regressions.jsonl")


@dataclass(frozen=True, slots=True)
class Retired:
    """What goes of one cycle: names in it, their bytes, rows of its snapshot; why its model stays."""

    directory: Path
    version: str
    names: tuple[str, ...]
    size: int
    rows: int
    stays: str

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "cycle_id": self.directory.name,
            "model_version": self.version,
            "files": list(self.names),
            "bytes": self.size,
            "snapshot_rows": self.rows,
            "model_stays": self.stays,
        }


def run(
    cycles: Path, nights: int, client: Client, alias: str = "default", *, dry_run: bool = False
) -> dict[str, Any]:
    """Let go of what cycles older than the newest `nights` need no more; return what went, or would go.

    `cycles` has what each lost: files (names in the cycle), bytes, snapshot_rows, and why its model_stays;
    `removed` what became of retired versions on the server, in words; `bytes` is what was given back, without
    what the snapshots' rows took.

    Raises:
        AgentLoopError: if the live server does not say what serves; nothing was changed.
        StepRunningError: if a step of an old cycle runs now; that one, and later ones, were not changed.
        ValueError: if a record cannot be read; that cycle, and later ones, were not changed.
    """
    every = cycles_in(cycles)
    needed = _needed(cycles, client, alias)
    plans = []
    for directory in every[: max(0, len(every) - nights)]:
        with held([] if dry_run else [directory]):
            plan = _plan(directory, needed, client)  # who leads to it is asked right before it goes
            if not (plan.names or plan.rows):
                continue
            plans.append(plan)
            if not dry_run:
                _retire(plan)
    gone = [plan.version for plan in plans if GGUF in plan.names and plan.version and not dry_run]
    removed = unlearn.withdraw(gone, client)
    return {
        "nights": nights,
        "dry_run": dry_run,
        "bytes": sum(plan.size for plan in plans),
        "cycles": [plan.plain() for plan in plans],
        "removed": removed,
    }


def run_all(cycles: Path, nights: int, client: Client, *, dry_run: bool = False) -> dict[str, Any]:
    """The same for every model's folder of cycles in `cycles`, one after another; what went of all."""
    every = [run(each, nights, client, dry_run=dry_run) for each in folders_of_cycles(cycles)]
    return {
        "nights": nights,
        "dry_run": dry_run,
        "bytes": sum(one["bytes"] for one in every),
        "cycles": [cycle for one in every for cycle in one["cycles"]],
        "removed": {version: said for one in every for version, said in one["removed"].items()},
    }


# What is needed.


def _needed(cycles: Path, client: Client, alias: str) -> dict[str, str]:
    """Why a version's GGUF stays, by version; routes of other aliases are asked version by version."""
    stable = client.get_route(alias).stable
    installed = {model.name: model.sha256 for model in client.list_models()}
    needed = dict.fromkeys(_last_served(cycles), f"one of the last {LAST_SERVED} that served")
    tonight = cycles / cycle.cycle_id(datetime.now(UTC))
    champion = {"model_version": stable, "sha256": installed.get(stable, "")}
    withdrawn = unlearn.withdrawn(cycles)
    for suite in sorted(
        {path.stem for each in cycles_in(cycles) for path in (each / "evaluation").glob("*.jsonl")}
    ):
        for version in best_ever.ranked(tonight, suite, champion):
            there = (cycles / version.model_version.rpartition(":")[2] / GGUF).is_file()
            if version.model_version not in withdrawn and (there or version.model_version == stable):
                needed[version.model_version] = f"the best ever on {suite}"
                break
    return needed | {stable: f"{alias} leads to it"}


def _last_served(cycles: Path) -> list[str]:
    served: dict[str, None] = {}
    for each in cycles_in(cycles):
        gate = Night(each).gate
        versions = [(gate.get("champion") or {}).get("model_version")]
        if Night(each).rollout.get("result") == "promoted":
            versions.append((gate.get("candidate") or {}).get("model_version"))
        for version in filter(None, versions):
            served.pop(str(version), None)
            served[str(version)] = None
    made = [version for version in served if not version.endswith(":base")]
    return made[-LAST_SERVED:]


def _why(version: str, needed: Mapping[str, str], client: Client) -> str:
    if version in needed:
        return needed[version]
    try:
        aliases = client.get_model(version).aliases if version else ()
    except NotFound:
        return ""
    return f"{', '.join(aliases)} leads to it" if aliases else ""


# What goes.


def _plan(directory: Path, needed: Mapping[str, str], client: Client) -> Retired:
    version = str((Night(directory).gate.get("candidate") or {}).get("model_version", ""))
    there = (directory / GGUF).is_file()
    stays = _why(version, needed, client) if there else ""
    names = [GGUF] if there and not stays else []
    adapter = directory / "adapter"
    if adapter.is_dir():
        names += [
            f"adapter/{each.name}" for each in sorted(adapter.iterdir()) if each.name not in _KEPT_OF_ADAPTER
        ]
    names += [each.name for each in sorted(directory.glob(".*.*"))]  # of a step that was killed
    names += ["adapter.partial"] if (directory / "adapter.partial").is_dir() else []
    size = sum(_bytes(directory / name) for name in names)
    return Retired(directory, version, tuple(names), size, sum(1 for _ in _unlearned(directory)), stays)


def _bytes(path: Path) -> int:
    return size_of(path) if path.is_dir() and not path.is_symlink() else path.lstat().st_size


def _learned(directory: Path) -> frozenset[str]:
    """The inferences of which the cycle's dataset has a line."""
    found: set[str] = set()
    for name in _LINES:
        if (directory / name).is_file():
            with (directory / name).open(encoding="utf-8") as lines:
                found.update(str(json.loads(line)["inference_id"]) for line in lines if line.strip())
    return frozenset(found)


def _unlearned(directory: Path) -> Iterator[str]:
    """The inferences of the snapshot of which the dataset has no line."""
    from pyarrow import parquet

    if (directory / SNAPSHOT).is_file():
        learned = _learned(directory)
        with parquet.ParquetFile(directory / SNAPSHOT) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=["inference_id"]):
                yield from (one for one in batch.column(0).to_pylist() if str(one) not in learned)


def _retire(plan: Retired) -> None:
    """Say what goes, then let it go; the manifest tells what is left."""
    directory = plan.directory
    before = cycle.read_json(directory / RECORD) if (directory / RECORD).is_file() else {}
    told = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": sorted({*before.get("files", ()), *plan.names}),
        "snapshot_rows": before.get("snapshot_rows", 0) + plan.rows,
    }
    cycle.write_json(directory / RECORD, told)
    for name in plan.names:
        path = directory / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if plan.rows:
        learned = _learned(directory)
        rewrite_snapshot(directory, lambda row: row if str(row["inference_id"]) in learned else None)
    if (directory / cycle.MANIFEST).is_file():
        cycle.write_manifest(directory)


def told(found: Mapping[str, Any]) -> str:
    """The record in words."""
    verb = "would go" if found["dry_run"] else "went"
    lines = [_line(one, verb) for one in found["cycles"]]
    lines += [f"{version}: {said}" for version, said in found["removed"].items()]
    return "\n".join(
        [*lines, f"{verb} of cycles before the newest {found['nights']}: {found['bytes'] / 1e6:.1f} MB"]
    )


def _line(one: Mapping[str, Any], verb: str) -> str:
    parts: Iterable[str] = (
        f"{len(one['files'])} files, {one['bytes'] / 1e6:.1f} MB" if one["files"] else "",
        f"{one['snapshot_rows']} rows of the snapshot that nobody learned" if one["snapshot_rows"] else "",
    )
    stays = f"; its model stays: {one['model_stays']}" if one["model_stays"] else ""
    return f"{one['cycle_id']}: {verb}: {', '.join(filter(None, parts))}{stays}"
