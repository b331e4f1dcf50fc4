"""What the DAGs of this folder share: how a step is run, and where the cycles are."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.providers.standard.operators.bash import BashOperator

HOME = Path(os.environ.get("AGENTLOOP_HOME") or Path(__file__).resolve().parents[1])
SKIP = 99  # a step's exit code for "nothing to do"
TRAINING_POOL = "training"  # one slot: two fine-tunings would not fit into memory
HEAVY = {
    "pool": TRAINING_POOL,
    "queue": "training",
    "executor_config": {"pod_template_file": str(HOME / "infra/airflow/pods/training.yaml")},
}
"""Where what fills a machine runs: its pool; past one machine its queue (Celery), its pod (Kubernetes)."""

# Each step is a process of its own (a long one inside Airflow's would miss its heartbeat). Airflow starts it
# in a new session, and sessions share the processor by autogroup, which plain `nice` does not reach. It must
# end if Airflow's task process is killed, or a retry would run beside it.
PROMPT = "exec setpriv --pdeathsig TERM"
_POLITE = f"{{ echo 19 >/proc/self/autogroup; }} 2>/dev/null; {PROMPT} nice -n 19"


CYCLES = {"AGENTLOOP_CYCLES_DIR": str(HOME / os.environ.get("AGENTLOOP_CYCLES_DIR", "cycles"))}
"""Where the cycles are, as a variable of a command; several models have a folder each."""
CYCLE_ID = "{{ cycle_id(dag_run.run_after, params) }}"
IN_CYCLE = 'export AGENTLOOP_CYCLE_DIR="$AGENTLOOP_CYCLES_DIR/$AGENTLOOP_CYCLE_ID"; '


def cycle_id(run_after: datetime, params: Mapping[str, Any]) -> str:
    """The run's cycle; see *A cycle's id* in the DAG."""
    return str(params.get("cycle_id") or run_after.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ"))


def operator(doc: str, timeout: timedelta, retries: int) -> dict[str, Any]:
    """What all steps have in common, as arguments of an operator."""
    return {
        "doc_md": doc,
        "execution_timeout": timeout,
        "retries": retries,
        "retry_delay": timedelta(seconds=float(os.environ.get("AGENTLOOP_NIGHT_RETRY_SECONDS", "60"))),
        "retry_exponential_backoff": 2.0,
        "max_retry_delay": timedelta(minutes=30),
        "cwd": str(HOME),
        # Paths reach the shell as variables, never as text of the command: spaces, quotes and & are safe.
        "env": {
            "AGENTLOOP_PYTHON": os.environ.get("AGENTLOOP_PYTHON") or sys.executable,
            "ANSIBLE_CONFIG": str(HOME / "infra/ansible/ansible.cfg"),
            "PYTHONUNBUFFERED": "1",
        },
        "append_env": True,
        "do_xcom_push": False,  # a step's last line is for its log; the next step reads files
    }


def with_cycle(doc: str, timeout: timedelta, retries: int, model: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a task that works in a cycle of a model, whose variables are `model`."""
    common = operator(doc, timeout, retries)
    return {**common, "env": {**common["env"], **CYCLES, **model, "AGENTLOOP_CYCLE_ID": CYCLE_ID}}


def command(
    name: str,
    words: str,
    doc: str,
    *,
    timeout: timedelta,
    retries: int,
    environment: Mapping[str, str] | None = None,
    only_if: str = "",
    before: str = "",
    **options: Any,
) -> BashOperator:
    """The task `name`: `python -m <words>`, after the bash `before`.

    Where the variable `only_if` is named and not set, it skips.
    """
    common = operator(doc, timeout, retries)
    unset = f'[ -n "${{{only_if}}}" ] || {{ echo "{only_if} is not set"; exit {SKIP}; }}; ' if only_if else ""
    return BashOperator(
        task_id=name,
        bash_command=f'{unset}{before}{_POLITE} "$AGENTLOOP_PYTHON" -m {words}',
        skip_on_exit_code=SKIP,
        **{**common, "env": {**common["env"], **(environment or {})}, **options},
    )


def step(name: str, module: str, doc: str, *, model: Mapping[str, Any], **options: Any) -> BashOperator:
    """The task `name`: `python -m <module> --cycle <cycle directory>`; options as of `command`."""
    environment = {**CYCLES, **model, "AGENTLOOP_CYCLE_ID": CYCLE_ID, **options.pop("environment", {})}
    words = f'{module} --cycle "$AGENTLOOP_CYCLE_DIR"'
    return command(name, words, doc, environment=environment, before=IN_CYCLE, **options)
