"""A real MLflow registry: a run and a version a cycle, and marks that follow what serves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from grpc_server.adapters.local_postgres import LocalPostgres
from tests.coverage_files import untraced
from tests.integration.night_by_hand import BASE, CANDIDATE, CYCLE, make
from training import cycle, recipe, register, subjects
from training.__main__ import app
from training.subjects import Place

MODEL = "gemma-3-270m"


@pytest.fixture(scope="module")
def empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry's file with its tables made, which takes seconds; tests copy it."""
    folder = tmp_path_factory.mktemp("registry")
    uri = register.database("", "", folder)
    with register._registry(uri) as client:
        client.search_registered_models()
    return folder / "mlflow.db"


@pytest.fixture
def uri(empty_registry: Path, tmp_path: Path) -> str:
    (tmp_path / "mlflow.db").write_bytes(empty_registry.read_bytes())
    return register.database("", "", tmp_path)


def client_of(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def aliases(uri: str) -> dict[str, str]:
    """The model version that each mark is on."""
    client = client_of(uri)
    marked = client.get_registered_model(MODEL).aliases
    return {
        alias: client.get_model_version(MODEL, str(version)).tags["model_version"]
        for alias, version in marked.items()
    }


def runs(uri: str) -> list[Any]:
    client = client_of(uri)
    experiment = client.get_experiment_by_name(register.EXPERIMENT)
    return list(client.search_runs([experiment.experiment_id]))


def test_a_cycle_that_passed_is_a_run_a_version_and_a_candidate(uri: str, tmp_path: Path) -> None:
    directory = make(tmp_path / "cycles", until="gate")
    record = register.run(directory, uri, MODEL)
    assert record["model_version"] == CANDIDATE["model_version"]
    assert (record["champion_before"], record["tracking_uri_scheme"]) == (BASE["model_version"], "sqlite")
    assert aliases(uri) == {"candidate": CANDIDATE["model_version"], "champion": BASE["model_version"]}
    (run,) = runs(uri)
    assert run.info.run_id == record["run_id"]
    assert run.info.status == "FINISHED"
    assert run.data.params["finetune.lora.rank"] == "16"
    assert run.data.params["champion"] == BASE["model_version"]
    assert run.data.metrics["simple_python.candidate.accuracy"] == pytest.approx(0.37)
    assert run.data.metrics["gate.better_than_the_champion.difference"] == pytest.approx(0.37)
    assert run.data.metrics["quantize.kl_divergence"] == pytest.approx(0.0213)
    client = client_of(uri)
    losses = client.get_metric_history(record["run_id"], "train.loss")
    assert [loss.step for loss in losses] == list(range(1, 97))
    version = client.get_model_version(MODEL, record["version"])
    assert version.source == (directory / "model.gguf").as_uri()
    assert version.tags["sha256"] == CANDIDATE["sha256"]
    assert (version.tags["cycle_id"], version.tags["verdict"]) == (CYCLE, "pass")


def test_the_run_knows_what_the_cycle_ran_on_and_what_each_step_took(uri: str, tmp_path: Path) -> None:
    directory = make(tmp_path / "cycles", until="gate")
    tuned = cycle.read_json(directory / "adapter" / "finetune.json")
    tuned |= {"seed": 7, "config": recipe.read().model_dump()}  # as fine-tuning writes them
    tuned |= {"inputs": {"files": {"train.jsonl": "d" * 64}}}
    cycle.write_json(directory / "adapter" / "finetune.json", tuned)
    note = cycle.read_json(directory / "steps" / "finetune.json")
    cycle.write_json(
        directory / "steps" / "finetune.json", note | {"processor": "Z80", "gpu_energy_joules": 12.5}
    )
    record = register.run(directory, uri, MODEL)
    (run,) = runs(uri)
    assert run.info.experiment_id == record["experiment_id"]
    told = run.data.params
    assert (told["finetune.seed"], told["processor"], told["version.python"]) == ("7", "Z80", "3.11.7")
    assert told["sha256.train.jsonl"] == "d" * 64
    assert run.data.metrics["step.finetune.seconds"] == 322.0
    assert run.data.metrics["step.finetune.gpu_energy_joules"] == 12.5
    assert (directory / "MODEL_CARD.md").is_file()


def test_a_version_that_is_withdrawn_says_why_and_is_no_candidate(uri: str, tmp_path: Path) -> None:
    assert register.withdraw(uri, MODEL, [CANDIDATE["model_version"]], "erasure 1") == []
    record = register.run(make(tmp_path / "cycles", until="gate"), uri, MODEL)
    marked = register.withdraw(uri, MODEL, [CANDIDATE["model_version"], "m:unknown"], "erasure 1")
    assert marked == [CANDIDATE["model_version"]]
    assert client_of(uri).get_model_version(MODEL, record["version"]).tags["withdrawn"] == "erasure 1"
    assert aliases(uri) == {"champion": BASE["model_version"]}


def test_registering_twice_changes_nothing_and_losing_the_record_makes_no_second_version(
    uri: str, tmp_path: Path
) -> None:
    directory = make(tmp_path / "cycles", until="gate")
    first = register.run(directory, uri, MODEL)
    written = (directory / register.RECORD).stat().st_mtime_ns
    assert register.run(directory, uri, MODEL) == first
    assert (directory / register.RECORD).stat().st_mtime_ns == written
    (directory / register.RECORD).unlink()
    assert register.run(directory, uri, MODEL) == first
    assert len(runs(uri)) == 1


def test_a_run_that_a_kill_left_half_written_is_replaced(uri: str, tmp_path: Path) -> None:
    directory = make(tmp_path / "cycles", until="gate")
    client = client_of(uri)
    half = client.create_run(register._experiment(client), tags={"cycle_id": CYCLE, "fingerprint": "x"})
    record = register.run(directory, uri, MODEL)
    assert record["run_id"] != half.info.run_id
    assert [run.info.run_id for run in runs(uri)] == [record["run_id"]]


@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
def test_a_cycle_that_did_not_pass_is_registered_without_the_candidates_mark(
    uri: str, tmp_path: Path, verdict: str
) -> None:
    directory = make(tmp_path / "cycles", until="gate", verdict=verdict)
    record = register.run(directory, uri, MODEL)
    assert aliases(uri) == {"champion": BASE["model_version"]}
    assert client_of(uri).get_model_version(MODEL, record["version"]).tags["verdict"] == verdict


def test_the_champions_mark_moves_and_moves_back_and_a_second_time_is_no_change(
    uri: str, tmp_path: Path
) -> None:
    directory = make(tmp_path / "cycles", until="gate")
    register.run(directory, uri, MODEL)
    assert register.mark(uri, CANDIDATE["model_version"])
    assert aliases(uri) == {"champion": CANDIDATE["model_version"]}
    assert not register.mark(uri, CANDIDATE["model_version"])
    (directory / register.RECORD).touch()
    register.run(directory, uri, MODEL)
    assert aliases(uri) == {"champion": CANDIDATE["model_version"]}, "a rerun does not take the mark away"
    assert register.mark(uri, BASE["model_version"])
    assert aliases(uri) == {"champion": BASE["model_version"]}
    assert not register.mark(uri, BASE["model_version"])


def test_the_champion_of_the_next_cycle_is_the_version_of_the_last(uri: str, tmp_path: Path) -> None:
    first = make(tmp_path / "cycles", until="gate")
    former = register.run(first, uri, MODEL)
    register.mark(uri, CANDIDATE["model_version"])
    second = make(tmp_path / "later", until="gate").rename(tmp_path / "cycles" / "20260201T020000Z")
    gate = cycle.read_json(second / "gate.json")
    gate["champion"] = CANDIDATE
    gate["candidate"] = {"model_version": "gemma-3-270m:20260201T020000Z", "sha256": "d" * 64}
    cycle.write_json(second / "gate.json", gate)
    record = register.run(second, uri, MODEL)
    assert record["champion_before_version"] == former["version"]
    assert len(runs(uri)) == 2


def test_a_verdict_that_is_made_again_is_told_to_the_same_version(uri: str, tmp_path: Path) -> None:
    directory = make(tmp_path / "cycles", until="gate")
    first = register.run(directory, uri, MODEL)
    gate = cycle.read_json(directory / "gate.json")
    cycle.write_json(directory / "gate.json", gate | {"verdict": "inconclusive", "reason": "by other rules"})
    again = register.run(directory, uri, MODEL)
    assert again["version"] == first["version"]
    client = client_of(uri)
    assert len(client.search_model_versions(f"name = '{MODEL}'")) == 2  # the base, and the candidate
    version = client.get_model_version(MODEL, again["version"])
    assert (version.tags["verdict"], version.description) == ("inconclusive", "by other rules")
    assert [run.info.run_id for run in runs(uri)] == [again["run_id"]] == [version.tags["run_id"]]


def test_the_same_registry_by_another_address_gets_no_second_version(uri: str, tmp_path: Path) -> None:
    directory = make(tmp_path / "cycles", until="gate")
    first = register.run(directory, uri, MODEL)
    (tmp_path / "link.db").hardlink_to(tmp_path / "mlflow.db")
    again = register.run(directory, f"sqlite:///{tmp_path / 'link.db'}", MODEL)
    assert again["inputs"] != first["inputs"]
    assert (again["version"], again["run_id"]) == (first["version"], first["run_id"])
    assert len(client_of(uri).search_model_versions(f"name = '{MODEL}'")) == 2


SAME = "postgresql+psycopg://postgres@/mlflow?host=%2Frun%2Fpg&port=5432"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (SAME, "postgresql+psycopg://postgres@/mlflow?port=5432&host=/run/pg", True),
        (SAME, "postgresql+psycopg://me:secret@/mlflow?host=/run/pg&connect_timeout=5", True),
        (SAME, "postgresql+psycopg://postgres@/mlflow?host=/run/../run/pg", True),
        (SAME, "postgresql+psycopg://postgres@/mlflow?host=/run/other", False),
        (SAME, "postgresql+psycopg://postgres@/mlflow?host=/run/pg&port=5433", False),
        (SAME, "postgresql+psycopg://postgres@/other?host=/run/pg", False),
        ("postgresql://u:p@DB:5432/mlflow", "postgresql+psycopg://v@/mlflow?host=db", True),
        ("sqlite:////a/b.db", "sqlite:////a/x/../b.db", True),
        ("sqlite:////a/b.db", "sqlite:////a/c.db", False),
        ("http://me:secret@mlflow:5000", "http://mlflow:5000", True),
        ("http://mlflow:5000", "http://mlflow:5001", False),
    ],
)
def test_a_registry_is_the_same_however_its_address_is_written(one: str, other: str, same: bool) -> None:
    assert (register._identity(one) == register._identity(other)) is same
    assert "secret" not in register._identity(other)


def test_the_champions_mark_goes_to_what_serves_where_a_rollout_was_killed_before_it_moved_it(
    uri: str, tmp_path: Path
) -> None:
    directory = make(tmp_path / "cycles", until="gate")
    register.run(directory, uri, MODEL)
    assert aliases(uri)["champion"] == BASE["model_version"]
    register.run(directory, uri, MODEL, serving=CANDIDATE["model_version"])  # otherwise nothing to do
    assert aliases(uri) == {"champion": CANDIDATE["model_version"]}
    (directory / register.RECORD).unlink()
    register.run(directory, uri, MODEL, serving=CANDIDATE["model_version"])
    assert aliases(uri) == {"champion": CANDIDATE["model_version"]}, "what serves is no candidate"
    register.run(directory, uri, MODEL, serving="gemma-3-270m:by-hand")
    assert aliases(uri) == {"champion": CANDIDATE["model_version"]}, "what is not registered gets no mark"


def test_the_command_asks_the_live_server_what_serves_and_says_so_if_it_does_not_answer(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make(tmp_path / "cycles", until="gate")
    options = ["register", "--cycle", str(directory), "--mlflow-uri", uri, "--state-dir", str(tmp_path)]
    done = CliRunner().invoke(app, [*options, "--server", "127.0.0.1:1"])
    assert done.exit_code == 0, done.stderr
    assert "mark stays where it is" in done.stderr

    async def serving(place: Place) -> tuple[str, str]:
        assert (place.server, place.token) == ("127.0.0.1:1", "al_read")
        return CANDIDATE["model_version"], CANDIDATE["sha256"]

    monkeypatch.setattr(subjects, "serving", serving)
    done = CliRunner().invoke(app, [*options, "--server", "127.0.0.1:1", "--token", "al_read"])
    assert (done.exit_code, "mark stays" in done.stderr) == (0, False)
    assert aliases(uri) == {"champion": CANDIDATE["model_version"]}


def test_a_mark_needs_a_version_that_is_registered_unless_what_serves_is_no_nights(
    uri: str, tmp_path: Path
) -> None:
    with pytest.raises(register.NotRegisteredError, match="training register"):
        register.mark(uri, CANDIDATE["model_version"])
    assert not register.mark(uri, f"{MODEL}:by-hand", or_none=True), "there is no registry to speak of yet"
    register.run(make(tmp_path / "cycles", until="gate"), uri, MODEL)
    assert register.mark(uri, f"{MODEL}:by-hand", or_none=True)
    assert aliases(uri) == {"candidate": CANDIDATE["model_version"]}, "nobody is called champion who is none"
    assert not register.mark(uri, f"{MODEL}:by-hand", or_none=True)
    assert register.mark(uri, BASE["model_version"], or_none=True)
    assert aliases(uri)["champion"] == BASE["model_version"]


def test_a_registry_that_does_not_answer_is_named(tmp_path: Path) -> None:
    directory = make(tmp_path / "cycles", until="gate")
    with pytest.raises(register.RegistryError, match="AGENTLOOP_MLFLOW_URI"):
        register.run(directory, "postgresql+psycopg://127.0.0.1:1/mlflow?connect_timeout=2", MODEL)
    assert not (directory / register.RECORD).exists()


def test_the_command_registers_and_moves_the_mark(uri: str, tmp_path: Path) -> None:
    directory = make(tmp_path / "cycles", until="gate")
    runner, options = CliRunner(), ["register", "--cycle", str(directory), "--mlflow-uri", uri]
    options += ["--server", "127.0.0.1:1"]
    marking = ["mark", CANDIDATE["model_version"], "--mlflow-uri", uri]
    too_early = runner.invoke(app, marking)
    assert (too_early.exit_code, "training register" in too_early.stderr) == (1, True)
    done = runner.invoke(app, [*options, "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["version"] == "2"
    assert "champion: moved" in runner.invoke(app, marking).stdout
    assert aliases(uri) == {"champion": CANDIDATE["model_version"]}
    assert json.loads(runner.invoke(app, [*marking, "--json"]).stdout) == {"moved": False}


def test_the_registry_lies_where_it_is_told(tmp_path: Path) -> None:
    def at(uri: str) -> str:
        return register.database(uri, "host=/nowhere", tmp_path)

    assert at("postgresql://postgres@/mlflow?host=/x") == "postgresql+psycopg://postgres@/mlflow?host=/x"
    assert at("http://mlflow:5000") == "http://mlflow:5000"
    assert register.database("", "", tmp_path / "st ate") == f"sqlite:///{tmp_path / 'st ate' / 'mlflow.db'}"
    with pytest.raises(register.RegistryError, match="AGENTLOOP_MLFLOW_URI"):
        at("")
    (tmp_path / "postgres" / "cluster").mkdir(parents=True)
    with pytest.raises(register.RegistryError, match="start the server"):
        register.database("", "", tmp_path)


@pytest.fixture
def state(local_postgres: LocalPostgres) -> Path:
    """A state folder whose Postgres runs, with the service's database in it."""
    return local_postgres.data_dir.parent


WATCHED = """
import socket, sys
tried = []
def refuse(self, address):
    tried.append(address)
    raise OSError("no network in this test")
real = socket.socket.connect
socket.socket.connect = lambda self, address: (
    real(self, address) if self.family == socket.AF_UNIX else refuse(self, address)
)
def resolve(host, *rest, **named):
    tried.append(host)
    raise OSError("no network in this test")
socket.getaddrinfo = resolve
from pathlib import Path
from training import register
uri = register.database("", "", Path(sys.argv[2]))
assert register.database("", register._local(Path(sys.argv[2])), Path(".")) == uri
record = register.run(Path(sys.argv[1]), uri, "gemma-3-270m")
register.mark(uri, record["model_version"])
print(record["tracking_uri_scheme"], record["version"], "tried", tried)
"""


def test_it_works_beside_the_services_own_database_and_contacts_nobody(state: Path, tmp_path: Path) -> None:
    directory = make(tmp_path / "cycles", until="gate")
    telemetry = ("PYTEST_CURRENT_TEST", "CI", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(directory), str(state)],
        env={key: value for key, value in untraced().items() if key not in telemetry},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "postgresql+psycopg 2 tried []"
    assert not Path("mlruns").exists()
