"""`retain`: old cycles lose their large files, and no command loses what it needs."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from agentloop import lineage
from agentloop.errors import NotFound, Unavailable
from agentloop.types import ModelDetails, ModelVersion, Route, Target
from training import cycle, erase, retain, unlearn
from training.__main__ import app

NIGHTS = [f"202601{day:02}T020000Z" for day in range(1, 8)]
NAME = "gemma-3-270m:"


class Server:
    """The live server: where aliases lead, and which versions it has."""

    def __init__(self, stable: str = NAME + "base", **aliases: str) -> None:
        self.aliases = {"default": stable, **aliases}
        self.installed = [NAME + each for each in NIGHTS]
        self.away = False

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get_route(self, alias: str) -> Route:
        if self.away:
            raise Unavailable(grpc.StatusCode.UNAVAILABLE, "no server")
        return Route(alias, 1, (Target(self.aliases[alias], "stable", 100),))

    def list_models(self) -> list[ModelVersion]:
        return [ModelVersion(name, "a" * 64, 1, loaded=False) for name in self.installed]

    def get_model(self, name: str) -> ModelDetails:
        if name not in self.installed:
            raise NotFound(grpc.StatusCode.NOT_FOUND, name)
        aliases = tuple(alias for alias, version in self.aliases.items() if version == name)
        version = ModelVersion(name, "a" * 64, 1, loaded=False)
        return ModelDetails(version, "gemma3", 1, "", 1, "", "", aliases)

    def remove_model(self, name: str) -> None:
        self.installed.remove(name)


def night(cycles: Path, name: str, champion: str = "base", *, promoted: bool = False, right: int = 0) -> Path:
    """A whole cycle: one row that it learned, one that nobody learned, by different callers."""
    directory = cycles / name
    rows = [
        {
            "inference_id": f"{name}-{what}",
            "caller": what,
            "session_id": "",
            "feedback_json": "[]",
            "feedback_count": 0,
        }
        for what in ("learned", "idle")
    ]
    (directory / "snapshot").mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(rows), directory / "snapshot" / "inferences.parquet")
    files = {"inferences.parquet": cycle.sha256(directory / "snapshot" / "inferences.parquet")}
    cycle.write_json(directory / "snapshot" / "snapshot.json", {"rows": 2, "files": files})
    (directory / "dataset").mkdir()
    line = {"inference_id": f"{name}-learned", "caller": "learned", "session_id": ""}
    (directory / "dataset" / "train.jsonl").write_text(json.dumps(line) + "\n")
    (directory / "dataset" / "gate.jsonl").write_text("")
    cycle.write_json(directory / "dataset" / "dataset.json", {"train": 1, "gate": 0})
    (directory / "adapter").mkdir()
    for file in ("adapter_model.safetensors", "tokenizer.json", "training.jsonl"):
        (directory / "adapter" / file).write_text("x" * 100)
    cycle.write_json(directory / "adapter" / "finetune.json", {})
    (directory / "adapter.partial").mkdir()
    (directory / "adapter.partial" / "state.pt").write_text("x" * 100)
    (directory / ".model.gguf.killed").write_text("x" * 100)
    (directory / "model.gguf").write_text("x" * 1000)
    made, served = ({"model_version": NAME + each, "sha256": each} for each in (name, champion))
    cycle.write_json(directory / "gate.json", {"candidate": made, "champion": served, "verdict": "pass"})
    cycle.write_json(directory / "rollout.json", {"result": "promoted" if promoted else "rolled_back"})
    (directory / "evaluation").mkdir()
    answers = [
        {"item_id": f"{name}{number}", "subject": subject, "correct": number < count}
        | {"model_version": who["model_version"], "model_sha256": who["sha256"]}
        for subject, who, count in (("champion", served, right), ("candidate", made, 0))
        for number in range(20)
    ]
    (directory / "evaluation" / "gate.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))
    cycle.write_manifest(directory)
    return directory


@pytest.fixture
def cycles(tmp_path: Path) -> Path:
    folder = tmp_path / "cycles"
    for name in NIGHTS:
        night(folder, name)
    return folder


def has_model(cycles: Path) -> list[str]:
    return [name for name in NIGHTS if (cycles / name / "model.gguf").is_file()]


def run(cycles: Path, server: Server, nights: int = 2, **options: Any) -> dict[str, Any]:
    return retain.run(cycles, nights, server, **options)  # type: ignore[arg-type]


def test_old_cycles_lose_what_is_large_and_keep_their_records(cycles: Path) -> None:
    server = Server()
    found = run(cycles, server)
    assert [one["cycle_id"] for one in found["cycles"]] == NIGHTS[:-2]
    assert has_model(cycles) == NIGHTS[-2:]
    old, new = cycles / NIGHTS[0], cycles / NIGHTS[-1]
    assert {each.name for each in (old / "adapter").iterdir()} == {"finetune.json", "training.jsonl"}
    assert not (old / "adapter.partial").exists() and not list(old.glob(".model*"))
    assert (new / "adapter" / "adapter_model.safetensors").is_file() and (new / "adapter.partial").is_dir()
    record = cycle.read_json(old / "retained.json")
    assert "model.gguf" in record["files"] and record["snapshot_rows"] == 1
    assert set(cycle.read_json(old / "manifest.json")["files"]) >= {"gate.json", "retained.json"}
    assert "model.gguf" not in cycle.read_json(old / "manifest.json")["files"]
    assert server.installed == [NAME + each for each in NIGHTS[-2:]], "nor has the server them any longer"
    assert found["bytes"] == 5 * 1400
    assert run(cycles, server)["cycles"] == [], "the second time there is nothing to do"


def test_what_lineage_and_erasure_read_stays(cycles: Path) -> None:
    before = lineage.of_cycle(cycles / NIGHTS[0])
    run(cycles, Server())
    assert (
        lineage.of_cycle(cycles / NIGHTS[0])["model_version"] == before["model_version"] == NAME + NIGHTS[0]
    )
    snapshot = parquet.read_table(cycles / NIGHTS[0] / "snapshot" / "inferences.parquet").to_pylist()
    assert [row["inference_id"] for row in snapshot] == [f"{NIGHTS[0]}-learned"]
    record = cycle.read_json(cycles / NIGHTS[0] / "snapshot" / "snapshot.json")
    assert record["rows"] == 1
    erasure = erase.Erasure("id", erase.Subject("learned"), "me")
    assert NAME + NIGHTS[0] in erase.run(cycles, erasure)["learned_by"]


def test_a_model_that_a_route_leads_to_stays_whatever_the_alias(cycles: Path) -> None:
    found = run(cycles, Server(stable=NAME + NIGHTS[0], agent=NAME + NIGHTS[1]))
    assert has_model(cycles) == [*NIGHTS[:2], *NIGHTS[-2:]]
    stays = {one["cycle_id"]: one["model_stays"] for one in found["cycles"]}
    assert stays[NIGHTS[0]] == "default leads to it" and stays[NIGHTS[1]] == "agent leads to it"
    assert not (cycles / NIGHTS[0] / "adapter" / "adapter_model.safetensors").exists()


def test_the_best_ever_and_the_last_that_served_stay(tmp_path: Path) -> None:
    cycles = tmp_path / "cycles"
    for number, name in enumerate(NIGHTS):
        champion = NIGHTS[number - 1] if number else "base"
        night(cycles, name, champion, promoted=True, right=20 if champion == NIGHTS[1] else 1)
    found = run(cycles, Server(stable=NAME + NIGHTS[-1]), nights=1)
    assert has_model(cycles) == [NIGHTS[1], *NIGHTS[-3:]]
    stays = {one["cycle_id"]: one["model_stays"] for one in found["cycles"]}
    assert stays[NIGHTS[1]] == "the best ever on gate" and "last 3 that served" in stays[NIGHTS[-2]]
    # What was withdrawn, as it learned what is erased, is no yardstick, and so does not stay for that.
    cycle.write_json(cycles / NIGHTS[-1] / unlearn.RECORD, {"withdrawn": [NAME + NIGHTS[1]]})
    run(cycles, Server(stable=NAME + NIGHTS[-1]), nights=1)
    assert has_model(cycles) == NIGHTS[-3:]


def test_a_dry_run_tells_and_changes_nothing(cycles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in cycles.rglob("*") if path.is_file()}
    server = Server()
    monkeypatch.setattr("agentloop.sync_client.Client", lambda *_, **__: server)
    options = ["retain", "--cycles", str(cycles), "--nights", "3", "--server", "x"]
    done = CliRunner().invoke(app, [*options, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert (
        f"{NIGHTS[0]}: would go: 5 files, 0.0 MB, 1 rows of the snapshot that nobody learned" in done.stdout
    )
    assert {path: path.read_bytes() for path in cycles.rglob("*") if path.is_file()} == before
    told = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
    assert (len(told["cycles"]), told["nights"], told["dry_run"]) == (4, 3, False)
    assert told["removed"][NAME + NIGHTS[0]] == "removed from the server"
    assert "removed from the server" in retain.told(told)


def test_where_nobody_knows_what_serves_nothing_goes(cycles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    server.away = True
    monkeypatch.setattr("agentloop.sync_client.Client", lambda *_, **__: server)
    done = CliRunner().invoke(app, ["retain", "--cycles", str(cycles), "--nights", "1", "--server", "x"])
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert has_model(cycles) == NIGHTS


def test_a_cycle_that_is_at_work_is_left_alone(cycles: Path) -> None:
    (cycles / NIGHTS[0] / "steps").mkdir()
    with (cycles / NIGHTS[0] / "steps" / ".quantize.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(cycle.StepRunningError, match=r"quantize of .* is running now"):
            run(cycles, Server())
    assert has_model(cycles) == NIGHTS


def test_a_cycle_that_came_to_nothing_loses_its_rows_and_one_that_is_damaged_is_named(tmp_path: Path) -> None:
    cycles = tmp_path / "cycles"
    for name in NIGHTS[:2]:
        night(cycles, name)
    for file in ("gate.json", "manifest.json", "dataset/train.jsonl", "dataset/gate.jsonl"):
        (cycles / NIGHTS[0] / file).unlink()
    server = Server()
    server.installed = []
    found = run(cycles, server, nights=1)
    assert found["cycles"][0]["snapshot_rows"] == 2 and found["removed"] == {}
    assert has_model(cycles) == [NIGHTS[1]]
    assert run(tmp_path / "none", server)["cycles"] == []
    (cycles / NIGHTS[1] / "dataset" / "train.jsonl").write_text('{"inference_id": "half')
    night(cycles, NIGHTS[2])
    with pytest.raises(ValueError, match="Unterminated"):
        run(cycles, server, nights=1)
    assert (cycles / NIGHTS[1] / "model.gguf").is_file()


def test_what_a_killed_run_has_begun_the_next_one_ends(cycles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(retain, "rewrite_snapshot", killed)
        with pytest.raises(KeyboardInterrupt):
            run(cycles, Server())
    run(cycles, Server())
    record = cycle.read_json(cycles / NIGHTS[0] / "retained.json")
    assert "model.gguf" in record["files"]
    assert parquet.read_metadata(cycles / NIGHTS[0] / "snapshot" / "inferences.parquet").num_rows == 1
