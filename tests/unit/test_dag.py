"""The nightly DAG's shape, and what each of its pages tells."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest

HOME = Path(__file__).resolve().parents[2]
STEPS = [
    "room",
    "freeze",
    "validate",
    "curate",
    "finetune",
    "quantize",
    "evaluate",
    "gate",
    "register",
    "roll_out",
    "report",
]


def load(
    monkeypatch: pytest.MonkeyPatch, folder: Path, file: str = "nightly_loop", **environment: str
) -> ModuleType:
    """A DAG file, parsed anew as Airflow does, with `environment`."""
    for name in [name for name in os.environ if name.startswith("AGENTLOOP_")]:
        monkeypatch.delenv(name)
    for name, value in {"AIRFLOW_HOME": str(folder), "_AIRFLOW__AS_LIBRARY": "1", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(HOME / "dags")
    for shared in ("night_steps", "night_late"):
        monkeypatch.delitem(sys.modules, shared, raising=False)
    spec = importlib.util.spec_from_file_location(f"{file}_under_test", HOME / "dags" / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nightly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    return load(monkeypatch, tmp_path)


def task(nightly: ModuleType, name: str) -> Any:
    return nightly.dag.task_dict[name]


def test_the_steps_follow_one_another(nightly: ModuleType) -> None:
    assert [each for each in nightly.dag.task_ids if each != "watch"] == STEPS
    for before, after in itertools.pairwise(STEPS):
        assert task(nightly, after).upstream_task_ids == {before}


def test_a_warm_up_shares_all_steps_but_those_that_make_its_dataset_and_runs_when_it_is_told(
    nightly: ModuleType,
) -> None:
    dag = nightly.warmup_dag
    assert (dag.dag_id, dag.max_active_runs, type(dag.timetable).__name__) == (
        "warmup_loop",
        1,
        "NullTimetable",
    )
    assert {kind.value for kind in dag.allowed_run_types} == {"manual"}
    steps = ["room", "warmup", *STEPS[4:]]
    assert [each for each in dag.task_ids if each != "watch"] == steps
    for before, after in itertools.pairwise(steps):
        assert dag.task_dict[after].upstream_task_ids == {before}
    assert dag.task_dict["watch"].upstream_task_ids == set(steps)
    first = dag.task_dict["warmup"]
    assert first.bash_command.endswith('-m training warmup --cycle "$AGENTLOOP_CYCLE_DIR"')
    assert first.env["AGENTLOOP_WARMUP_FROM"] == "{{ params['sets'] | join(':') }}"
    for name in STEPS[4:-3]:
        assert dag.task_dict[name].bash_command == task(nightly, name).bash_command
    with pytest.raises(Exception, match="non-empty"):
        dag.params.get_param("sets").resolve([])
    assert dag.params.get_param("sets").resolve(["var/datasets/bfcl"]) == ["var/datasets/bfcl"]


def test_it_runs_nightly_one_at_a_time_without_catching_up_and_may_be_backfilled(nightly: ModuleType) -> None:
    dag = nightly.dag
    assert (dag.dag_id, dag.max_active_runs, dag.catchup) == ("nightly_loop", 1, False)
    assert type(dag.timetable).__name__ == "CronDataIntervalTimetable"
    assert {kind.value for kind in dag.allowed_run_types} == {"scheduled", "manual", "backfill"}


def test_several_models_have_a_night_each_mapped_over_their_list(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dag = load(monkeypatch, tmp_path, AGENTLOOP_NIGHT_MODELS="models.yaml").dag
    assert [each for each in dag.task_ids if not each.endswith("watch")] == [
        "models",
        *(f"model.{name}" for name in STEPS),
    ]
    group = dag.task_group.children["model"]
    assert type(group).__name__ == "MappedTaskGroup"
    assert dag.task_dict["models"].bash_command.endswith('"$AGENTLOOP_PYTHON" -m training models')
    assert dag.task_dict["models"].output_processor("[1]") == [1]
    for name in STEPS:
        step = dag.task_dict[f"model.{name}"]
        assert {f"AGENTLOOP_{each}" for each in ("MODEL_NAME", "ALIAS", "RECIPE", "BASE_GGUF")} <= set(
            step.env
        )
        assert type(step.env["AGENTLOOP_CYCLES_DIR"]).__name__ == "MappedArgument"
    assert {each.task_id for each in dag.tasks if each.pool == "training"} == {
        f"model.{name}" for name in ("finetune", "quantize", "evaluate")
    }


def test_a_night_that_is_late_is_told_once_it_should_have_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nightly: ModuleType
) -> None:
    for dag in (nightly.dag, nightly.warmup_dag):
        (deadline,) = dag.deadline
        assert type(deadline.reference).__name__ == "DagRunQueuedAtDeadline"
        assert (deadline.interval, deadline.callback.path) == (timedelta(hours=6), "night_late.tell")
    dag = load(monkeypatch, tmp_path, AGENTLOOP_NIGHT_LATE_MINUTES="90").dag
    assert dag.deadline[0].interval == timedelta(minutes=90)
    assert not load(monkeypatch, tmp_path, AGENTLOOP_NIGHT_LATE_MINUTES="0").dag.deadline


LATE = {"dag_run": {"dag_id": "nightly_loop", "dag_run_id": "scheduled__1", "state": "running"}}


def test_alertmanager_is_told_of_a_late_night(monkeypatch: pytest.MonkeyPatch, nightly: ModuleType) -> None:
    taken: list[Any] = []

    class Alertmanager(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            taken.append((self.path, json.loads(body)))
            self.send_response(200 if "/v2/" in self.path and len(taken) == 1 else 500)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Alertmanager) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AGENTLOOP_ALERTMANAGER_URL", f"http://127.0.0.1:{server.server_port}/")
        nightly.night_late.tell(LATE)
        with pytest.raises(nightly.night_late.NobodyToldError, match="500"):
            nightly.night_late.tell(LATE)
        server.shutdown()
    path, (alert,) = taken[0]
    assert path == "/api/v2/alerts"
    assert (
        alert["labels"]["alertname"] == "AgentloopNightLate" and alert["labels"]["run_id"] == "scheduled__1"
    )
    assert "is running, and should have ended" in alert["annotations"]["summary"]
    ends, starts = (datetime.fromisoformat(alert[name]) for name in ("endsAt", "startsAt"))
    assert ends - starts == timedelta(hours=12)


def test_where_nobody_can_be_told_of_a_late_night_the_callback_fails(
    monkeypatch: pytest.MonkeyPatch, nightly: ModuleType
) -> None:
    for address in ("", "file:///etc/passwd", "http://127.0.0.1:1"):
        monkeypatch.setenv("AGENTLOOP_ALERTMANAGER_URL", address)
        with pytest.raises(nightly.night_late.NobodyToldError):
            nightly.night_late.tell(LATE)


def test_what_is_old_goes_daily_beside_no_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dag = load(monkeypatch, tmp_path, "retention", AGENTLOOP_RETENTION_CRON="5 9 * * *").dag
    assert (dag.dag_id, dag.timetable.expression, dag.max_active_runs) == ("retention", "5 9 * * *", 1)
    cycles, log = dag.task_dict["retain_cycles"], dag.task_dict["retain_log"]
    assert cycles.bash_command.endswith('"$AGENTLOOP_PYTHON" -m training retain')
    assert (cycles.pool, cycles.downstream_task_ids, "AGENTLOOP_CYCLE_DIR" in cycles.env) == (
        "training",
        set(),
        False,
    )
    assert '-m grpc_server log retain --months "$AGENTLOOP_LOG_RETAIN_MONTHS"' in log.bash_command
    for months, code in (("", 99), ("3", 0)):
        environment = {"AGENTLOOP_LOG_RETAIN_MONTHS": months, "AGENTLOOP_PYTHON": "true", "PATH": os.defpath}
        assert subprocess.run(["bash", "-c", log.bash_command], env=environment).returncode == code
    for each in dag.tasks:
        assert all(f"- **{heading}:**" in each.doc_md for heading in ("Does", "Who acts", "What to do"))


def test_the_hour_is_a_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dag = load(monkeypatch, tmp_path, AGENTLOOP_NIGHT_CRON="30 4 * * *").dag
    assert dag.timetable.expression == "30 4 * * *"


def test_what_fills_the_machine_takes_the_one_slot_of_the_training_pool(nightly: ModuleType) -> None:
    pooled = {each.task_id for each in nightly.dag.tasks if each.pool == "training"}
    assert pooled == {"finetune", "quantize", "evaluate"}


def test_every_step_is_retried_with_growing_waits_unless_it_could_only_say_the_same(
    nightly: ModuleType,
) -> None:
    retries = {name: task(nightly, name).retries for name in STEPS}
    assert {name for name, count in retries.items() if count == 0} == {"validate", "gate"}
    for name in STEPS:
        assert task(nightly, name).retry_exponential_backoff == 2.0
        assert task(nightly, name).retry_delay == timedelta(seconds=60)


def test_every_step_ends_in_time_and_the_run_too(nightly: ModuleType) -> None:
    timeouts = [task(nightly, name).execution_timeout for name in STEPS]
    assert all(timedelta(0) < timeout <= timedelta(hours=8) for timeout in timeouts)
    assert nightly.dag.dagrun_timeout >= timedelta(hours=8)


def test_only_exit_code_99_skips_and_for_ansible_not_even_that(nightly: ModuleType) -> None:
    for name in STEPS:
        assert list(task(nightly, name).skip_on_exit_code) == ([] if name == "roll_out" else [99])


def test_the_report_runs_after_a_failure_and_the_run_fails_all_the_same(nightly: ModuleType) -> None:
    assert task(nightly, "report").trigger_rule == "all_done"
    watch = task(nightly, "watch")
    assert (watch.trigger_rule, watch.retries) == ("one_failed", 0)
    assert watch.upstream_task_ids == set(STEPS)
    with pytest.raises(nightly.AirflowFailException, match="a step of this night failed"):
        watch.python_callable()


def test_nothing_but_files_goes_from_step_to_step(nightly: ModuleType) -> None:
    assert not any(task(nightly, name).do_xcom_push for name in STEPS)


def test_every_task_says_what_it_does_what_breaks_who_acts_and_what_to_do(nightly: ModuleType) -> None:
    for each in [*nightly.dag.tasks, *nightly.warmup_dag.tasks]:
        for heading in ("Does", "Breaks when it fails", "Who acts", "What to do"):
            assert re.search(rf"^- \*\*{heading}:\*\* \S.+", each.doc_md, re.MULTILINE), (
                each.task_id,
                heading,
            )
    for heading in ("What it does", "What breaks when it fails", "Who acts", "What to do"):
        assert f"**{heading}.**" in nightly.dag.doc_md


def test_every_step_runs_its_command_by_the_given_interpreter_from_the_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / "chéckout & co"
    nightly = load(monkeypatch, tmp_path, AGENTLOOP_HOME=str(home), AGENTLOOP_PYTHON="/opt/a b/python")
    commands = {"freeze": "validation freeze", "validate": "validation check"}
    for name in STEPS:
        if name == "roll_out":
            continue
        step = task(nightly, name)
        called = (
            f'"$AGENTLOOP_PYTHON" -m {commands.get(name, f"training {name}")} --cycle "$AGENTLOOP_CYCLE_DIR"'
        )
        assert step.bash_command.endswith(called)
        assert "echo 19 >/proc/self/autogroup" in step.bash_command
        assert step.cwd == str(home)
        assert step.append_env is True
        assert step.env["AGENTLOOP_PYTHON"] == "/opt/a b/python"
        assert step.env["ANSIBLE_CONFIG"] == str(home / "infra/ansible/ansible.cfg")


def test_a_cycle_is_named_after_the_time_its_run_was_due_in_utc(nightly: ModuleType) -> None:
    due = datetime(2026, 1, 2, 4, 4, 5, tzinfo=timezone(timedelta(hours=1)))
    assert nightly.cycle_id(due, {"cycle_id": None}) == "20260102T030405Z"
    assert task(nightly, "freeze").env["AGENTLOOP_CYCLES_DIR"] == str(HOME / "cycles")


def test_a_run_may_go_on_with_the_cycle_of_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nightly = load(monkeypatch, tmp_path, AGENTLOOP_CYCLES_DIR=str(tmp_path / "é & b"))
    chosen = {"cycle_id": "20251231T020000Z"}
    assert nightly.cycle_id(datetime(2026, 1, 2, tzinfo=UTC), chosen) == "20251231T020000Z"
    environment = task(nightly, "freeze").env
    assert environment["AGENTLOOP_CYCLES_DIR"] == str(tmp_path / "é & b")
    assert environment["AGENTLOOP_CYCLE_ID"] == "{{ cycle_id(dag_run.run_after, params) }}"
    assert "$AGENTLOOP_CYCLES_DIR/$AGENTLOOP_CYCLE_ID" in task(nightly, "freeze").bash_command
    schema = nightly.dag.params.get_param("cycle_id").schema
    assert re.fullmatch(schema["pattern"], "20251231T020000Z")
    assert not re.search(schema["pattern"], "../../etc")


@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
def test_a_candidate_that_did_not_pass_is_not_rolled_out_and_the_reason_is_told(
    nightly: ModuleType, tmp_path: Path, verdict: str
) -> None:
    (tmp_path / "gate.json").write_text(json.dumps({"verdict": verdict, "reason": "no better"}))
    with pytest.raises(nightly.AirflowSkipException, match=f"the gate says {verdict}: no better"):
        task(nightly, "roll_out").python_callable(str(tmp_path.parent), tmp_path.name)


def test_a_candidate_that_passed_is_rolled_out_by_ansible(nightly: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "gate.json").write_text(json.dumps({"verdict": "pass", "reason": "better"}))
    command = task(nightly, "roll_out").python_callable(str(tmp_path.parent), tmp_path.name)
    assert command.endswith('"$AGENTLOOP_PYTHON" -m ansible playbook infra/ansible/playbooks/rollout.yml')
    assert (HOME / "infra/ansible/playbooks/rollout.yml").is_file()


def test_parsing_imports_nothing_of_the_project_and_nothing_heavy(tmp_path: Path) -> None:
    heavy = [
        "great_expectations",
        "torch",
        "mlflow",
        "pandas",
        "validation",
        "training",
        "grpc_server",
        "agentloop",
    ]
    program = (
        f"import sys, runpy; runpy.run_path(sys.argv[1]); print([m for m in {heavy} if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, str(HOME / "dags" / "nightly_loop.py")],
        env=os.environ
        | {"AIRFLOW_HOME": str(tmp_path), "_AIRFLOW__AS_LIBRARY": "1", "PYTHONPATH": str(HOME / "dags")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert found.stdout.splitlines()[-1] == "[]"


def test_no_file_beside_the_dag_shadows_a_package() -> None:
    packages = {path.parent.name for path in HOME.glob("*/__init__.py")} | {"airflow", "ansible"}
    assert not packages & {path.stem for path in (HOME / "dags").iterdir()}
