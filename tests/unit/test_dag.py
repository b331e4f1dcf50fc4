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
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HOME = Path(__file__).resolve().parents[2]
STEPS = [
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


def load(monkeypatch: pytest.MonkeyPatch, folder: Path, **environment: str) -> ModuleType:
    """The DAG file, parsed anew as Airflow does, with `environment`."""
    for name in [name for name in os.environ if name.startswith("AGENTLOOP_")]:
        monkeypatch.delenv(name)
    for name, value in {"AIRFLOW_HOME": str(folder), "_AIRFLOW__AS_LIBRARY": "1", **environment}.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location(
        "nightly_loop_under_test", HOME / "dags" / "nightly_loop.py"
    )
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
    steps = ["warmup", *STEPS[3:]]
    assert [each for each in dag.task_ids if each != "watch"] == steps
    for before, after in itertools.pairwise(steps):
        assert dag.task_dict[after].upstream_task_ids == {before}
    assert dag.task_dict["watch"].upstream_task_ids == set(steps)
    first = dag.task_dict["warmup"]
    assert first.bash_command.endswith('-m training warmup --cycle "$AGENTLOOP_CYCLE_DIR"')
    assert first.env["AGENTLOOP_WARMUP_FROM"] == "{{ params['sets'] | join(':') }}"
    for name in STEPS[3:-3]:
        assert dag.task_dict[name].bash_command == task(nightly, name).bash_command
    with pytest.raises(Exception, match="non-empty"):
        dag.params.get_param("sets").resolve([])
    assert dag.params.get_param("sets").resolve(["var/datasets/bfcl"]) == ["var/datasets/bfcl"]


def test_it_runs_nightly_one_at_a_time_without_catching_up_or_backfill(nightly: ModuleType) -> None:
    dag = nightly.dag
    assert (dag.dag_id, dag.max_active_runs, dag.catchup) == ("nightly_loop", 1, False)
    assert type(dag.timetable).__name__ == "CronDataIntervalTimetable"
    assert {kind.value for kind in dag.allowed_run_types} == {"scheduled", "manual"}


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
    assert nightly.cycle_dir(due, {"cycle_id": None}) == str(HOME / "cycles" / "20260102T030405Z")


def test_a_run_may_go_on_with_the_cycle_of_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nightly = load(monkeypatch, tmp_path, AGENTLOOP_CYCLES_DIR=str(tmp_path / "é & b"))
    chosen = {"cycle_id": "20251231T020000Z"}
    assert nightly.cycle_dir(datetime(2026, 1, 2, tzinfo=UTC), chosen) == str(
        tmp_path / "é & b" / "20251231T020000Z"
    )
    schema = nightly.dag.params.get_param("cycle_id").schema
    assert re.fullmatch(schema["pattern"], "20251231T020000Z")
    assert not re.search(schema["pattern"], "../../etc")


@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
def test_a_candidate_that_did_not_pass_is_not_rolled_out_and_the_reason_is_told(
    nightly: ModuleType, tmp_path: Path, verdict: str
) -> None:
    (tmp_path / "gate.json").write_text(json.dumps({"verdict": verdict, "reason": "no better"}))
    with pytest.raises(nightly.AirflowSkipException, match=f"the gate says {verdict}: no better"):
        task(nightly, "roll_out").python_callable(str(tmp_path))


def test_a_candidate_that_passed_is_rolled_out_by_ansible(nightly: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "gate.json").write_text(json.dumps({"verdict": "pass", "reason": "better"}))
    command = task(nightly, "roll_out").python_callable(str(tmp_path))
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
        env=os.environ | {"AIRFLOW_HOME": str(tmp_path), "_AIRFLOW__AS_LIBRARY": "1"},
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
