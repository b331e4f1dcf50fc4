"""Which model versions are there, and which of them serves? The MLflow registry's answer, one run a cycle.

A cycle's run holds its configuration, losses and figures; its model version is the GGUF, by path and sha256.
The alias `candidate` marks a version that the gate passed, `champion` the one that serves: the route in
Postgres is the truth, so the rollout moves the mark after it moved the route, and registering sets it right
where a rollout was killed in between. MLflow is used without a server of its own, straight on its database,
and told not to phone home.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training import cycle, model_card

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

RECORD = "registry.json"
CHAMPION, CANDIDATE = "champion", "candidate"
EXPERIMENT = "nightly_loop"
DATABASE = "mlflow"

QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_LOGGING_LEVEL": "WARNING"}
"""Read by MLflow when it is imported: it tells nobody."""
# MLflow's own limits: of a param's value, and of params and metrics in one call.
_PARAM_CHARACTERS = 6000
_PARAMS = 100
_METRICS = 1000

Record = Mapping[str, Any]


class RegistryError(RuntimeError):
    """The registry cannot be reached, or refuses; the text says why."""


class NotRegisteredError(RegistryError):
    """A mark cannot move to a version that the registry does not have."""


def run(directory: Path, uri: str, model_name: str, serving: str = "") -> dict[str, Any]:
    """Write the cycle to the registry at `uri`, and `registry.json`; return what that holds.

    A cycle that the same files had written is left as it is; one whose verdict has changed keeps its version.
    A verdict other than pass is registered too, without the candidate's mark. `serving` is the model version
    that the route names now, empty if that is not known: if it is registered, it gets the champion's mark.

    Raises:
        FileNotFoundError: if there is no gate.json or quantize.json.
        RegistryError: if the registry does not answer, or refuses.
    """
    files = _files(directory)
    gate = cycle.read_json(directory / "gate.json")
    quantized = cycle.read_json(directory / "quantize.json")
    options = {"uri": _identity(uri), "model_name": model_name, "sha256": gate["candidate"]["sha256"]}
    inputs = cycle.inputs_of(files, options)
    output = directory / RECORD
    if cycle.done(output, inputs):
        if serving:
            with _registry(uri) as client:
                _follow(client, model_name, serving)
        return cycle.read_json(output)
    with (
        cycle.step(directory, "register", packages=["mlflow"], outputs=[RECORD, model_card.CARD]),
        _registry(uri) as client,
    ):
        model_card.write(directory)
        fingerprint = hashlib.sha256(json.dumps(inputs["files"], sort_keys=True).encode()).hexdigest()
        tags = {"cycle_id": directory.resolve().name, "fingerprint": fingerprint, "verdict": gate["verdict"]}
        tags["model_name"] = model_name
        run_id = _logged(client, directory, gate, tags)
        _registered_model(client, model_name)
        champion_before = _champion(client, model_name, gate["champion"])
        version = _version(
            client,
            model_name,
            source=(directory / "model.gguf").resolve().as_uri(),
            run_id=run_id,
            tags={**tags, **_identified(gate["candidate"]), "gguf_bytes": str(quantized["size_bytes"])},
            description=gate["reason"],
        )
        _follow(client, model_name, serving)
        marked = client.get_registered_model(model_name).aliases
        if gate["verdict"] == "pass" and str(marked[CHAMPION]) != str(version.version):
            client.set_registered_model_alias(model_name, CANDIDATE, version.version)
        cycle.write_json(
            output,
            {
                "registered_model": model_name,
                "version": str(version.version),
                "run_id": run_id,
                "experiment_id": _experiment(client),
                "model_version": gate["candidate"]["model_version"],
                "tracking_uri_scheme": uri.partition(":")[0],
                "champion_before": champion_before.tags["model_version"],
                "champion_before_version": str(champion_before.version),
                "inputs": inputs,
            },
        )
    return cycle.read_json(output)


def mark(uri: str, serving: str, *, or_none: bool = False) -> bool:
    """Put the champion's mark on the model version that serves; False if it was there.

    Args:
        uri: the registry's address.
        serving: `<model>:<cycle id>`, which the route leads to.
        or_none: where the registry does not have that version, as before the first night, or because it was
            installed by hand, no version keeps the mark.

    Raises:
        NotRegisteredError: if the registry does not have it, unless `or_none`.
        RegistryError: if the registry does not answer, or refuses.
    """
    name = serving.partition(":")[0]
    with _registry(uri) as client:
        known = bool(client.search_registered_models(f"name = '{name}'"))
        found = _found(client, name, model_version=serving) if known else None
        if found is not None:
            return _mark(client, name, str(found.version))
        if not or_none:
            raise NotRegisteredError(
                f"the registry does not have {serving}; run `python -m training register` for its cycle first"
            )
        if not known or CHAMPION not in client.get_registered_model(name).aliases:
            return False
        client.delete_registered_model_alias(name, CHAMPION)
        return True


def withdraw(uri: str, name: str, versions: Iterable[str], reason: str) -> list[str]:
    """Mark model versions as withdrawn, for a reason; no candidate any more. Returns those registered.

    Raises:
        RegistryError: if the registry does not answer, or refuses.
    """
    marked = []
    with _registry(uri) as client:
        known = client.search_registered_models(f"name = '{name}'")
        for version in versions if known else ():
            found = _found(client, name, model_version=version)
            if found is None:
                continue
            client.set_model_version_tag(name, found.version, "withdrawn", reason)
            if str(client.get_registered_model(name).aliases.get(CANDIDATE)) == str(found.version):
                client.delete_registered_model_alias(name, CANDIDATE)
            marked.append(version)
    return marked


def _follow(client: MlflowClient, name: str, serving: str) -> None:
    """Put the champion's mark where the route is, if that version is registered."""
    found = _found(client, name, model_version=serving) if serving else None
    if found is not None:
        _mark(client, name, str(found.version))


def _mark(client: MlflowClient, name: str, version: str) -> bool:
    """Put the champion's mark on a version, which is then no candidate any more; False if it was there."""
    marked = client.get_registered_model(name).aliases
    if str(marked.get(CHAMPION)) == version:
        return False
    client.set_registered_model_alias(name, CHAMPION, version)
    if str(marked.get(CANDIDATE)) == version:
        client.delete_registered_model_alias(name, CANDIDATE)
    return True


def database(uri: str, database_url: str, state_dir: Path) -> str:
    """The registry's address as MLflow takes it.

    The first that there is: `uri`; the database `mlflow`, made if missing, in the cluster of `database_url`
    (the service's, as libpq takes it), or in the one that the server keeps in `state_dir`; a file there.

    Raises:
        RegistryError: if the cluster does not answer, or refuses to make the database.
    """
    if uri:
        scheme, separator, rest = uri.partition("://")
        return f"postgresql+psycopg{separator}{rest}" if scheme in ("postgresql", "postgres") else uri
    if database_url or (state_dir / "postgres" / "cluster").is_dir():
        return _beside(database_url or _local(state_dir))
    state_dir.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{(state_dir / 'mlflow.db').resolve()}"


def _beside(database_url: str) -> str:
    """The database `mlflow` of a cluster, made if it is missing."""
    import psycopg
    from psycopg import conninfo, sql
    from sqlalchemy import URL

    try:
        service = conninfo.conninfo_to_dict(database_url)
        anywhere = conninfo.make_conninfo(database_url, dbname="postgres", connect_timeout=10)
        with psycopg.connect(anywhere, autocommit=True) as connection:
            found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)).fetchone()
            if found is None:
                with suppress(psycopg.errors.DuplicateDatabase):
                    connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
    except psycopg.Error as error:
        first = str(error).strip().partition("\n")[0]
        raise RegistryError(
            f"the database {DATABASE} cannot be had: {first}. Start Postgres, or set AGENTLOOP_MLFLOW_URI"
        ) from error
    rest = {key: str(value) for key, value in service.items() if value is not None and key != "dbname"}
    user, password = rest.pop("user", None), rest.pop("password", None)
    # Host and port go into the query, where a socket's folder may stand too.
    url = URL.create("postgresql+psycopg", user, password, database=DATABASE, query=rest)
    return url.render_as_string(hide_password=False)


def _local(state_dir: Path) -> str:
    """The DSN of the Postgres that the server keeps; line 4 of postmaster.pid is its port, 5 its socket."""
    from psycopg import conninfo

    pid_file = state_dir / "postgres" / "cluster" / "postmaster.pid"
    try:
        lines = pid_file.read_text(encoding="utf-8").splitlines()
        # The socket's folder may be given as seen from the cluster's.
        socket = (pid_file.parent / lines[4].strip()).resolve()
        return conninfo.make_conninfo(user="postgres", port=lines[3].strip(), host=str(socket))
    except (OSError, IndexError):
        raise RegistryError(
            f"no Postgres runs in {pid_file.parent}: start the server, or set AGENTLOOP_MLFLOW_URI"
        ) from None


@contextmanager
def _registry(uri: str) -> Iterator[MlflowClient]:
    """A client that works on the database itself; its tables are made, or brought up to date, first."""
    os.environ.update(QUIET)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError

    try:
        if not uri.startswith("http"):
            create_engine(uri).connect().close()  # MLflow itself would try for an hour
        yield MlflowClient(tracking_uri=uri, registry_uri=uri)
    except (MlflowException, SQLAlchemyError) as error:
        first = str(error).partition("\n")[0]
        raise RegistryError(f"the MLflow registry failed: {first}. Check AGENTLOOP_MLFLOW_URI") from error


def _identity(uri: str) -> str:
    """What tells two registries apart, however the address is written: kind, host, port, database; no secret.

    libpq takes a host as part of the address or as an option of it, and a socket's folder for a host.
    """
    from sqlalchemy import make_url

    url = make_url(uri)
    kind = url.get_backend_name()
    host, port = (str(url.query.get(name) or getattr(url, name) or "") for name in ("host", "port"))
    database = url.database or ""
    if kind == "postgresql":
        port = port or "5432"
    elif kind == "sqlite":
        database = os.path.realpath(database)
    host = os.path.realpath(host) if host.startswith("/") else host.lower()
    return f"{kind}://{host}:{port}/{database}"


def _files(directory: Path) -> dict[str, Path]:
    needed = ("gate.json", "quantize.json")
    wanted = (
        "dataset/dataset.json",
        "adapter/finetune.json",
        "adapter/training.jsonl",
        "evaluation/summary.json",
    )
    found = (*needed, *(name for name in wanted if (directory / name).is_file()))
    return {name: directory / name for name in found}


def _logged(client: MlflowClient, directory: Path, gate: Record, tags: Mapping[str, str]) -> str:
    """The id of the cycle's run; one that a killed attempt left half-written is replaced."""
    from mlflow.entities import Metric, Param

    experiment = _experiment(client)
    for earlier in client.search_runs([experiment], f"tags.cycle_id = '{tags['cycle_id']}'"):
        if earlier.data.tags.get("model_name", tags["model_name"]) != tags["model_name"]:
            continue  # another model's, of the same night
        same = earlier.data.tags.get("fingerprint") == tags["fingerprint"]
        if same and earlier.info.status == "FINISHED":
            return str(earlier.info.run_id)
        client.delete_run(earlier.info.run_id)
    decided = int(datetime.fromisoformat(gate["decided_at"]).timestamp() * 1000)
    made = client.create_run(experiment, start_time=decided, run_name=tags["cycle_id"], tags=dict(tags))
    run_id = str(made.info.run_id)
    params = [Param(key, str(value)[:_PARAM_CHARACTERS]) for key, value in params_of(directory, gate)]
    metrics = [Metric(key, value, decided, step) for key, value, step in metrics_of(directory, gate)]
    for start in range(0, len(params), _PARAMS):
        client.log_batch(run_id, params=params[start : start + _PARAMS])
    for start in range(0, len(metrics), _METRICS):
        client.log_batch(run_id, metrics=metrics[start : start + _METRICS])
    client.set_terminated(run_id, "FINISHED", end_time=decided)
    return run_id


def _experiment(client: MlflowClient) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    # No artifact is ever stored: what a cycle made lies in its folder. The address is never written to.
    return str(client.create_experiment(EXPERIMENT, artifact_location="file:///dev/null"))


def params_of(directory: Path, gate: Record) -> Iterator[tuple[str, str]]:
    """What the cycle was made with: who was judged, configuration and seed, dataset, packages, processor."""
    yield "champion", gate["champion"]["model_version"]
    yield "candidate", gate["candidate"]["model_version"]
    tuned = _read(directory / "adapter" / "finetune.json")
    yield from _flat("finetune", tuned.get("config") or {})
    inputs = tuned.get("inputs") or {}
    yield from _flat("sha256", inputs.get("files") or {})
    note = _read(directory / "steps" / "finetune.json")
    yield from _flat("version", note.get("versions") or {})
    if "processor" in note:
        yield "processor", note["processor"]
    dataset = _read(directory / "dataset" / "dataset.json")
    for key in ("cap", "cycles"):
        if key in dataset:
            yield f"dataset.{key}", json.dumps(dataset[key])


def metrics_of(directory: Path, gate: Record) -> Iterator[tuple[str, float, int]]:
    """Name, value and step of every figure of the cycle; the fine-tuning's by its steps, all others at 0."""
    training = directory / "adapter" / "training.jsonl"
    if training.is_file():
        for line in training.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            step = int(values.pop("step", 0))
            yield from ((f"train.{key}", value, step) for key, value in _numbers(values))
    for name, path in (
        ("finetune", directory / "adapter" / "finetune.json"),
        ("quantize", directory / "quantize.json"),
        ("dataset", directory / "dataset" / "dataset.json"),
    ):
        yield from ((f"{name}.{key}", value, 0) for key, value in _numbers(_read(path)))
    for step_note in sorted((directory / "steps").glob("*.json")):
        yield from ((f"step.{step_note.stem}.{key}", value, 0) for key, value in _numbers(_read(step_note)))
    for suite, subjects in _read(directory / "evaluation" / "summary.json").items():
        for subject, figures in subjects.items():
            yield from ((f"{suite}.{subject}.{key}", value, 0) for key, value in _numbers(figures))
    for check in gate["checks"]:
        name = "".join(letter if letter.isalnum() else "_" for letter in check["name"])
        yield from ((f"gate.{name}.{key}", value, 0) for key, value in _numbers(check))


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, bool | int | float):
            yield key, float(value)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _flat(f"{prefix}.{key}", each)
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value)


def _read(path: Path) -> dict[str, Any]:
    return cycle.read_json(path) if path.is_file() else {}


def _registered_model(client: MlflowClient, name: str) -> None:
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description="Every GGUF that a night made; champion serves.")


def _champion(client: MlflowClient, name: str, champion: Record) -> ModelVersion:
    """The version of the champion that the gate saw; one that is new, as the first base is, gets the mark."""
    found = _found(client, name, model_version=champion["model_version"])
    if found is None:
        found = client.create_model_version(
            name,
            source=f"agentloop:/{champion['model_version']}",
            tags=_identified(champion),
            description="It served before the first cycle that is in this registry.",
        )
    if CHAMPION not in client.get_registered_model(name).aliases:
        client.set_registered_model_alias(name, CHAMPION, found.version)
    return found


def _version(
    client: MlflowClient, name: str, *, source: str, run_id: str, tags: Mapping[str, str], description: str
) -> ModelVersion:
    """The version of the cycle's GGUF: one that is there is told the latest verdict on it."""
    tags = {**tags, "run_id": run_id}  # a version's own never changes, and may be that of a former run
    found = _found(client, name, cycle_id=tags["cycle_id"], sha256=tags["sha256"])
    if found is None:
        return client.create_model_version(
            name, source=source, run_id=run_id, tags=tags, description=description
        )
    for key, value in tags.items():
        if found.tags.get(key) != value:
            client.set_model_version_tag(name, found.version, key, value)
    if found.description != description:
        client.update_model_version(name, found.version, description)
    return found


def _found(client: MlflowClient, name: str, **tags: str) -> ModelVersion | None:
    """The latest version with these tags."""
    wanted = " AND ".join((f"name = '{name}'", *(f"tags.{tag} = '{value}'" for tag, value in tags.items())))
    versions = client.search_model_versions(wanted, max_results=1, order_by=["version_number DESC"])
    return versions[0] if versions else None


def _identified(model: Record) -> dict[str, str]:
    return {"model_version": model["model_version"], "sha256": model["sha256"]}
