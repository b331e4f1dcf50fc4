"""The nights past one machine: what infra/airflow says is what Airflow's executors and Kubernetes take."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.coverage_files import untraced
from tests.unit.test_dag import HOME, load

AIRFLOW = HOME / "infra" / "airflow"
HEAVY = {"finetune", "quantize", "evaluate"}


@pytest.fixture
def nightly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    return load(monkeypatch, tmp_path)


def settings(name: str) -> dict[str, str]:
    lines = (AIRFLOW / name).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_what_fills_a_machine_has_a_queue_and_a_pod_of_its_own(nightly: ModuleType) -> None:
    for each in nightly.dag.tasks:
        heavy = each.task_id in HEAVY
        assert each.queue == ("training" if heavy else "default"), each.task_id
        template = each.executor_config.get("pod_template_file", "")
        assert Path(template).is_file() == heavy and (not heavy or Path(template).name == "training.yaml")


# In a process of its own: Airflow's tables, half imported, would break MLflow's in this one.
READ = """
import json, sys
from airflow.providers.cncf.kubernetes.get_provider_info import get_provider_info
from airflow.providers.cncf.kubernetes.pod_generator import PodGenerator
from airflow.utils import timezone

found = {"options": sorted(get_provider_info()["config"]["kubernetes_executor"]["options"])}
for name, file in (each.split("=", 1) for each in sys.argv[1:]):
    pod = PodGenerator.deserialize_model_file(file)
    found[name] = PodGenerator.serialize_pod(pod)
    made = PodGenerator.construct_pod(
        dag_id="nightly_loop", task_id="finetune", pod_id="nightly-loop-finetune", try_number=1,
        kube_image="registry.example.internal/agentloop:0.2.0", date=timezone.utcnow(), args=["python"],
        pod_override_object=None, base_worker_pod=pod, namespace="agentloop", scheduler_job_id="1",
        run_id="m",
    )
    found[f"task of {name}"] = PodGenerator.serialize_pod(made)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def understood(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The templates as Airflow's Kubernetes provider understands them, and the pods that it makes of them."""
    files = [f"{name}={AIRFLOW}/pods/{name}.yaml" for name in ("step", "training")]
    home = str(tmp_path_factory.mktemp("airflow"))
    done = subprocess.run(
        [sys.executable, "-c", READ, *files],
        env=untraced() | {"AIRFLOW_HOME": home, "_AIRFLOW__AS_LIBRARY": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("template", ["step", "training"])
def test_a_pod_template_is_a_pod_as_airflow_and_kubernetes_read_it(
    understood: dict[str, Any], template: str
) -> None:
    written = yaml.safe_load((AIRFLOW / "pods" / f"{template}.yaml").read_text())
    assert _leaves(written) <= _leaves(understood[template]), "what is not understood is not sent"
    spec = written["spec"]
    (container,) = spec["containers"]
    assert container["name"] == "base" and spec["restartPolicy"] == "Never"
    assert set(container["resources"]["requests"]) == {"cpu", "memory"}
    assert set(container["resources"]["limits"]) == {"memory"}
    asked = container["resources"]["requests"].values()
    assert all(re.fullmatch(r"\d+(m|Gi)?", each) for each in asked)
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in spec["volumes"]}


def test_a_training_asks_for_more_than_a_light_step_and_runs_the_same_image() -> None:
    step, training = (
        yaml.safe_load((AIRFLOW / "pods" / f"{name}.yaml").read_text())["spec"]["containers"][0]
        for name in ("step", "training")
    )
    memory = [int(each["resources"]["requests"]["memory"].removesuffix("Gi")) for each in (step, training)]
    assert memory[0] < memory[1] and step["image"] == training["image"]
    assert {**step, "resources": None} == {**training, "resources": None}


def test_airflow_makes_the_pod_of_a_task_from_its_template(understood: dict[str, Any]) -> None:
    made = understood["task of training"]
    (container,) = made["spec"]["containers"]
    assert container["image"].endswith(":0.2.0")
    assert container["resources"]["requests"]["memory"] == "8Gi"
    assert (made["metadata"]["labels"]["dag_id"], made["metadata"]["namespace"]) == (
        "nightly_loop",
        "agentloop",
    )


def test_every_setting_is_one_that_its_executor_has(understood: dict[str, Any]) -> None:
    celery, kubernetes = settings("celery.env"), settings("kubernetes.env")
    assert celery["AIRFLOW__CORE__EXECUTOR"] == "CeleryExecutor"
    assert kubernetes["AIRFLOW__CORE__EXECUTOR"] == "KubernetesExecutor"
    assert int(celery["AIRFLOW__CELERY_BROKER_TRANSPORT_OPTIONS__VISIBILITY_TIMEOUT"]) > 8 * 3600
    for name in kubernetes:
        if name.startswith("AIRFLOW__KUBERNETES_EXECUTOR__"):
            assert name.removeprefix("AIRFLOW__KUBERNETES_EXECUTOR__").lower() in understood["options"]
    path = kubernetes["AIRFLOW__KUBERNETES_EXECUTOR__POD_TEMPLATE_FILE"]
    assert (HOME / Path(path).relative_to(kubernetes["AGENTLOOP_HOME"])).is_file()


def _leaves(value: Any, path: str = "") -> set[tuple[str, str]]:
    if isinstance(value, dict):
        return {leaf for key, each in value.items() for leaf in _leaves(each, f"{path}.{key}")}
    if isinstance(value, list):
        return {leaf for number, each in enumerate(value) for leaf in _leaves(each, f"{path}[{number}]")}
    return {(path, str(value))}
