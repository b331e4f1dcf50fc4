"""Makes the model forget: trains again without rows that were erased, judges, rolls out, and keeps evidence.

It begins where an erasure ends: its tombstones say which datasets lost which ids, and which versions learned
from them. A cycle of its own gets the last judged dataset (the erasure has already taken the rows out of it)
and goes through the night's own steps, as commands: fine-tune, quantize, evaluate, gate, register, roll out.
No new rows come in, so that what differs from the champion is what was erased.

The gate asks for no gain here (configs/gate-unlearn.yaml). Where even that is not shown, the newest version
that served and never learned from the rows is put back, in the end the untouched base: what was erased must
not go on serving because nothing better is at hand. Then every version that learned is taken from the server
and marked in the registry. Each step may be run again; the next call for the same erasure goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from agentloop.errors import AgentLoopError, NotFound
from agentloop.lineage import PARTS, rows
from agentloop.night import Night, cycles_in
from agentloop.sync_client import Client
from training import card, cycle

if TYPE_CHECKING:
    from training.subjects import Place

HOME = Path(__file__).resolve().parents[1]
RULES = Path(__file__).parent / "configs" / "gate-unlearn.yaml"
RECORD = "unlearn.json"
PAGE = "unlearn.html"

Otherwise = Literal["fall-back", "hold"]
Run = Callable[[Sequence[str]], None]
"""Runs a command to its end; raises StepFailedError unless it succeeds."""


class StepFailedError(RuntimeError):
    """A step did not succeed; run again, it goes on there."""


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What an erasure took: by cycle the ids that its dataset lost, and who had learned from them."""

    ids: Mapping[str, Mapping[str, frozenset[str]]]
    learned_by: Mapping[str, str]  # model version by cycle

    @property
    def every(self) -> frozenset[str]:
        """All ids that any dataset lost."""
        return frozenset(one for parts in self.ids.values() for gone in parts.values() for one in gone)


def forgotten(cycles: Path, erasure_id: str) -> Forgotten:
    """What the tombstones of an erasure say; nothing, if no cycle has one."""
    ids: dict[str, dict[str, frozenset[str]]] = {}
    learned_by: dict[str, str] = {}
    for directory in cycles_in(cycles):
        for tombstone in Night(directory).erasures:
            if tombstone.get("id") == erasure_id:
                told = tombstone.get("ids") or {}
                ids[directory.name] = {part: frozenset(told.get(part, ())) for part in PARTS}
                if tombstone.get("learned_by"):
                    learned_by[directory.name] = str(tombstone["learned_by"])
    return Forgotten(ids, learned_by)


def begin(cycles: Path, erasure_id: str, by: str) -> Path:
    """The cycle of this erasure's retraining: the one that was begun, or a new one.

    Raises:
        FileNotFoundError: if no judged cycle has a dataset to train on.
    """
    for directory in reversed(cycles_in(cycles)):
        if Night(directory).unlearn.get("erasure") == erasure_id:
            return directory
    directory = cycles / cycle.cycle_id(datetime.now(UTC))
    source = _last_dataset(directory)
    _dataset(directory, source, erasure_id)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    cycle.write_json(directory / RECORD, {"erasure": erasure_id, "by": by, "begun_at": now})
    return directory


def _last_dataset(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    judged = [each / "dataset" for each in reversed(cycle.judged_before(directory))]
    found = next((each for each in judged if (each / "dataset.json").is_file()), None)
    if found is None:
        directory.rmdir()
        raise FileNotFoundError(
            f"no judged cycle in {directory.parent} has a dataset: there is nothing to train"
        )
    return found


def _dataset(directory: Path, source: Path, erasure_id: str) -> None:
    """The dataset of `source` as it is now, as that of a cycle in which nothing was new."""
    files = {f"{source.parent.name}/{part}.jsonl": source / f"{part}.jsonl" for part in PARTS}
    before = cycle.read_json(source / "dataset.json")
    with cycle.new_directory(directory / "dataset") as building:
        counts = {}
        for part in PARTS:
            (building / f"{part}.jsonl").write_bytes((source / f"{part}.jsonl").read_bytes())
            counts[part] = sum(1 for _ in rows(source.parent, part))
        record = before | counts
        record |= {"new_train": 0, "new_gate": 0, "rows": 0, "excluded_ids": {}, "dropped_earlier": {}}
        record["excluded"] = dict.fromkeys(before.get("excluded", ()), 0)
        record |= {"enough": counts["train"] > 0, "reason": "", "triggers": []}
        record["inputs"] = cycle.inputs_of(files, {"erasure": erasure_id})
        if "replay" in before:
            record["replay"] = before["replay"] | {"older": counts["train"], "new": 0}
        cycle.write_json(building / "dataset.json", record)
        if "shares" in before:
            card.write(building)


# The steps.


def retrain(directory: Path, run: Run) -> str:
    """Take the cycle to its verdict by the night's own commands; return it."""
    gone = forgotten(directory.parent, Night(directory).unlearn["erasure"]).every
    if left := contained(directory, gone):
        raise StepFailedError(
            f"the dataset of {directory.name} still has {len(left)} erased rows: erase again"
        )
    if not Night(directory).dataset.get("enough"):
        return "nothing_left"
    place = ("--cycle", str(directory))
    for step in ("finetune", "quantize", "evaluate"):
        run((sys.executable, "-m", "training", step, *place))
    run((sys.executable, "-m", "training", "gate", *place, "--rules", str(RULES)))
    run((sys.executable, "-m", "training", "register", *place))
    return str(cycle.read_json(directory / "gate.json")["verdict"])


def contained(directory: Path, gone: frozenset[str]) -> set[str]:
    """Which of the erased rows the cycle's dataset has."""
    return {one for part in PARTS for one in rows(directory, part) if one in gone}


def serve(
    directory: Path,
    verdict: str,
    otherwise: Otherwise,
    client: Client,
    base: Path,
    run: Run,
    alias: str = "default",
) -> str:
    """Put in service what has not learned from the rows; return its version, empty if that is on hold."""
    if verdict == "pass":
        run((sys.executable, "-m", "scripts.rollout", "rollout", "--cycle", str(directory)))
        if Night(directory).rollout.get("result") == "promoted":
            return str(cycle.read_json(directory / "gate.json")["candidate"]["model_version"])
    gone = forgotten(directory.parent, Night(directory).unlearn["erasure"])
    stable = client.get_route(alias).stable
    if stable not in gone.learned_by.values():
        return stable
    if otherwise == "hold":
        return ""
    version, gguf = innocent(directory.parent, gone.learned_by.values(), stable, base)
    client.install_model(version, gguf.resolve(), cycle.sha256(gguf))
    run((sys.executable, "-m", "scripts.rollout", "rollback", "--to", version))
    return version


def innocent(cycles: Path, learned_by: Iterable[str], stable: str, base: Path) -> tuple[str, Path]:
    """The newest version that served and did not learn from the rows, with its GGUF; else the base."""
    guilty = set(learned_by)
    for directory in reversed(cycles_in(cycles)):
        night = Night(directory)
        version = (night.gate.get("candidate") or {}).get("model_version")
        gguf = directory / "model.gguf"
        if night.rollout.get("result") == "promoted" and version not in guilty and gguf.is_file():
            return str(version), gguf
    return f"{stable.rpartition(':')[0]}:base", base


def withdraw(versions: Iterable[str], client: Client) -> dict[str, str]:
    """Take versions from the server, where no route leads to them; what became of each, in words."""
    found = {}
    for version in dict.fromkeys(versions):
        if ":" not in version:
            found[version] = "had no verdict, and so never served"
            continue
        try:
            aliases = client.get_model(version).aliases
            if aliases:
                found[version] = f"still served: {', '.join(aliases)} leads to it"
                continue
            client.remove_model(version)
            found[version] = "removed from the server"
        except NotFound:
            found[version] = "was not on the server"
        except AgentLoopError as error:
            found[version] = f"not removed: {error}"
    return found


def withdrawn(cycles: Path) -> frozenset[str]:
    """The versions that an unlearning has withdrawn: they must not even be what others are held to.

    Raises:
        ValueError: if a cycle's record cannot be read.
    """
    records = (each / RECORD for each in cycles_in(cycles))
    return frozenset(
        version
        for record in records
        if record.is_file()
        for version in cycle.read_json(record).get("withdrawn", ())
    )


def evidence(directory: Path, serving: str, verdict: str, withdrawn: Mapping[str, str]) -> dict[str, Any]:
    """What anybody can check afterwards, written to unlearn.json; `complete` says whether all of it is so."""
    before = Night(directory).unlearn
    gone = forgotten(directory.parent, before["erasure"])
    night = Night(directory)
    trained = ((night.finetune.get("inputs") or {}).get("files") or {}).get("train.jsonl")
    train = directory / "dataset" / "train.jsonl"
    remains = {
        each.name: len(contained(each, gone.every))
        for each in cycles_in(directory.parent)
        if contained(each, gone.every)
    }
    found = before | {
        "cycle_id": directory.name,
        "datasets_lost": {
            name: {part: sorted(ids) for part, ids in parts.items()} for name, parts in gone.ids.items()
        },
        "learned_by": dict(gone.learned_by),
        "datasets_that_still_have_them": remains,
        "dataset_sha256": cycle.sha256(train),
        "trained_on_that_dataset": trained == cycle.sha256(train) if trained else None,
        "new_version": night.gate.get("candidate"),
        "verdict": verdict,
        "reason": night.gate.get("reason", ""),
        "rollout": night.rollout.get("result"),
        "serving": serving,
        "withdrawn": dict(withdrawn),
        "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    still = [text for text in withdrawn.values() if text.startswith(("still", "not "))]
    same = found["trained_on_that_dataset"] is not False
    found["complete"] = bool(serving) and same and not remains and not still
    cycle.write_json(directory / RECORD, found)
    with cycle.new_file(directory / PAGE) as building:
        building.write_text(page(found), encoding="utf-8")
    return found


def page(found: Mapping[str, Any]) -> str:
    """The evidence as a page that loads nothing."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(f"{PAGE}.j2").render(found=found)


def settings(place: Place, mlflow_uri: str, database_url: str) -> dict[str, str]:
    """What the steps must know, by the names of their environment: where all is, and how to reach it."""
    found = {
        "AGENTLOOP_CYCLES_DIR": place.cycles_dir,
        "AGENTLOOP_STATE_DIR": place.state_dir,
        "AGENTLOOP_BASE_GGUF": place.base_gguf,
        "AGENTLOOP_MODEL_NAME": place.model_name,
        "AGENTLOOP_ALIAS": place.alias,
        "AGENTLOOP_SERVER": place.server,
        "AGENTLOOP_TOKEN": place.token,
        "AGENTLOOP_TOKEN_FILE": place.token_file and place.token_file.absolute(),
        "AGENTLOOP_MLFLOW_URI": mlflow_uri,
        "AGENTLOOP_DATABASE_URL": database_url,
    }
    return {name: str(value) for name, value in found.items() if value}


def commanded(command: Sequence[str]) -> None:
    """Run a command in the checkout, its output where ours goes.

    Raises:
        StepFailedError: unless it ends with 0.
    """
    done = subprocess.run(command, cwd=HOME, env=os.environ, stdout=sys.stderr, check=False)
    if done.returncode:
        raise StepFailedError(
            f"`{' '.join(command[1:4])}` ended with {done.returncode}: put that right, run again"
        )


def erased(kind: str, name: str, by: str) -> str:
    """Erase what a caller, a session or an inference (`kind`) said, everywhere; return the erasure's id.

    Raises:
        StepFailedError: if the erasure was not finished.
    """
    command = [sys.executable, "-m", "grpc_server", "erase", f"--{kind}", name, "--json"]
    command += ["--by", by] if by else []
    done = subprocess.run(command, cwd=HOME, env=os.environ, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise StepFailedError("the erasure was not finished: its words are above; run again")
    return str(json.loads(done.stdout)["erasure"])


def told(found: Mapping[str, Any]) -> str:
    """The evidence in words."""
    lost = {name: sum(map(len, parts.values())) for name, parts in found["datasets_lost"].items()}
    lines = [f"erasure {found['erasure']}: {sum(lost.values())} examples in {len(lost)} datasets"]
    lines += [f"  {name} lost {count}" for name, count in lost.items()]
    lines.append(f"learned by {', '.join(found['learned_by'].values()) or 'no model version'}")
    lines.append(f"cycle {found['cycle_id']}, trained without them: {found['verdict']}. {found['reason']}")
    lines.append(f"serves now: {found['serving'] or 'a version that learned from them (on hold)'}")
    lines += [f"  {version}: {what}" for version, what in found["withdrawn"].items()]
    lines.append("complete" if found["complete"] else "NOT complete")
    return "\n".join(lines)
