"""The nightly loop: one pass from what callers did today to the model that serves tomorrow.

**What it does.** Freezes what was logged since the last verdict, checks it, makes a training set of it,
fine-tunes the untouched base on all training sets so far, quantizes, asks champion and candidate the same
questions, lets the gate decide, registers the candidate, rolls it out behind a canary, and writes the page
that you read in the morning. Everything a pass makes lies in `cycles/<cycle id>/`.

**What breaks when it fails.** Nothing that serves: the champion goes on answering, and what was logged waits
for the next night, because only a verdict of the gate moves the watermark on. The model just does not
improve.

**Who acts.** Whoever runs the nights reads `report.html` and the failed task's log; each task's own page
(click it, then *Details*) says what to do. An SRE acts only when `roll_out` fails, since it alone touches
what serves.

**What to do.** Put right what the task's page names, then *clear* the failed task: it and what follows run
again in the same cycle, and steps that had finished do nothing. Skipped is not failed: there was nothing to
learn (`freeze`, `curate`), or the gate kept the champion (`roll_out`); the task's log says why.

**Commands** that a page shows are for a shell in the checkout, with `AGENTLOOP_TOKEN_FILE` naming a file that
holds a token of the scope admin.

**A cycle's id** is the UTC time from which its DAG run was due (`run_after`, as `YYYYMMDDTHHMMSSZ`): the one
time of a run that neither a retry nor a clear changes (`start_date` does change on a clear), and one that a
manual run has too (`logical_date` may be absent). So every run is a cycle of its own. To go on with the cycle
of another run, trigger the DAG with the parameter `cycle_id`.

**Before there is any log**, `warmup_loop` trains the first champion: the same steps, with a training set made
of imported public datasets in place of `freeze`, `validate` and `curate`. It has no schedule; trigger it with
the parameter `sets`, or run `make warmup SETS=var/datasets/bfcl`.

**Settings** are environment variables, the same for the schedule, for `make dag` and for a step run by hand:
`AGENTLOOP_HOME` (the checkout; default: where this file lies), `AGENTLOOP_PYTHON` (the interpreter that runs
the steps; default: Airflow's own), `AGENTLOOP_CYCLES_DIR` (default `cycles` in the checkout),
`AGENTLOOP_NIGHT_CRON` (default `0 2 * * *`, UTC), `AGENTLOOP_NIGHT_RETRY_SECONDS` (the first wait before a
retry; default 60, doubled each time), and whatever the steps themselves read.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, CronDataIntervalTimetable, Param, TriggerRule, chain, task
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

HOME = Path(os.environ.get("AGENTLOOP_HOME") or Path(__file__).resolve().parents[1])
SKIP = 99  # a step's exit code for "nothing to do"
TRAINING_POOL = "training"  # one slot: two fine-tunings would not fit into memory

# Each step is a process of its own (a long one inside Airflow's would miss its heartbeat). Airflow starts it
# in a new session, and sessions share the processor by autogroup, which plain `nice` does not reach. It must
# end if Airflow's task process is killed, or a retry would run beside it.
_PROMPT = "exec setpriv --pdeathsig TERM"
_POLITE = f"{{ echo 19 >/proc/self/autogroup; }} 2>/dev/null; {_PROMPT} nice -n 19"


def cycle_dir(run_after: datetime, params: Mapping[str, Any]) -> str:
    """Absolute path of the run's cycle directory; see *A cycle's id* above."""
    cycle_id = params.get("cycle_id") or run_after.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
    return str(HOME / os.environ.get("AGENTLOOP_CYCLES_DIR", "cycles") / cycle_id)


def _operator(doc: str, timeout: timedelta, retries: int) -> dict[str, Any]:
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
            "AGENTLOOP_CYCLE_DIR": "{{ cycle_dir(dag_run.run_after, params) }}",
            "ANSIBLE_CONFIG": str(HOME / "infra/ansible/ansible.cfg"),
            "PYTHONUNBUFFERED": "1",
        },
        "append_env": True,
        "do_xcom_push": False,  # a step's last line is for its log; the next step reads files
    }


def _step(
    name: str,
    module: str,
    doc: str,
    *,
    timeout: timedelta,
    retries: int,
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> BashOperator:
    """The task `name`: `python -m <module> <name> --cycle <cycle directory>`."""
    common = _operator(doc, timeout, retries)
    return BashOperator(
        task_id=name,
        bash_command=f'{_POLITE} "$AGENTLOOP_PYTHON" -m {module} --cycle "$AGENTLOOP_CYCLE_DIR"',
        skip_on_exit_code=SKIP,
        **{**common, "env": {**common["env"], **(environment or {})}},
        **options,
    )


_CYCLE_ID = Param(
    None,
    type=["null", "string"],
    pattern=r"^\d{8}T\d{6}Z$",
    description="Go on with this cycle (`YYYYMMDDTHHMMSSZ`) rather than begin one of its own.",
)
_BOTH: dict[str, Any] = {
    "start_date": datetime(2026, 1, 1, tzinfo=UTC),
    "catchup": False,
    "max_active_runs": 1,
    "dagrun_timeout": timedelta(hours=14),
    "user_defined_macros": {"cycle_dir": cycle_dir},
    "tags": ["agentloop"],
}


def _learn_and_roll_out(dataset: list[BashOperator]) -> None:
    """From the steps that make `dataset/` on: what both DAGs have in common."""
    finetune = _step(
        "finetune",
        "training finetune",
        """
- **Does:** trains a LoRA adapter on the untouched base; goes on from its last checkpoint after a kill.
- **Breaks when it fails:** there is no candidate tonight.
- **Who acts:** whoever runs the nights.
- **What to do:** *killed* or *out of memory*: look for what else took memory, or lower `max_tokens` or the
batch in `training/configs`; *loss is not finite*: lower the learning rate; *timeout*: raise it here, or
lower the cap of the dataset. Clear the task: finished steps are not trained again.
""",
        timeout=timedelta(hours=8),
        retries=2,
        pool=TRAINING_POOL,
    )
    quantize = _step(
        "quantize",
        "training quantize",
        """
- **Does:** merges the adapter into a fresh base, writes `model.gguf`, measures what quantizing cost.
- **Breaks when it fails:** there is no candidate tonight; the adapter is kept.
- **Who acts:** whoever runs the nights.
- **What to do:** check free space (three times the model) and that llama.cpp's tools are installed
(`make install`); a KL divergence over its limit means a broken conversion, so do not raise the limit. Clear
the task.
""",
        timeout=timedelta(hours=1),
        retries=1,
        pool=TRAINING_POOL,
    )
    evaluate = _step(
        "evaluate",
        "training evaluate",
        """
- **Does:** asks champion and candidate the same questions, through a server of its own.
- **Breaks when it fails:** there is no verdict, so the champion serves on and the window is learned again
tomorrow.
- **Who acts:** whoever runs the nights; an SRE if the live server does not answer (it names the champion).
- **What to do:** check `AGENTLOOP_SERVER` and `AGENTLOOP_TOKEN_FILE` (`.venv/bin/agent-loop health`), then
memory. Clear the task: answers already given are cached.
""",
        timeout=timedelta(hours=4),
        retries=2,
        pool=TRAINING_POOL,
    )
    gate = _step(
        "gate",
        "training gate",
        """
- **Does:** decides from the paired answers: pass, fail or inconclusive. All three are successes of this task.
- **Breaks when it fails:** there is no verdict; the champion serves on, the watermark stays.
- **Who acts:** whoever runs the nights.
- **What to do:** the log names the file of `evaluation/` that is missing or malformed. Clear `evaluate`.
""",
        timeout=timedelta(minutes=15),
        retries=0,
    )
    register = _step(
        "register",
        "training register",
        """
- **Does:** writes the cycle to the MLflow registry, whatever the verdict; marks a candidate that passed.
- **Breaks when it fails:** nothing is rolled out, because what serves must be found in the registry.
- **Who acts:** whoever runs MLflow's database.
- **What to do:** check that the database answers; clear the task. It finds what it wrote before.
""",
        timeout=timedelta(minutes=30),
        retries=3,
    )

    @task.bash(  # type: ignore[call-overload, untyped-decorator]
        skip_on_exit_code=None,  # Ansible's 99 is an interrupt
        **_operator(
            """
- **Does:** installs the candidate, warms it, gives it a share of the traffic, compares its own figures with
the champion's, then promotes it or puts the route back. Both are successes: read `rollout.json`.
- **Skipped:** the gate said fail or inconclusive; the champion serves on.
- **Breaks when it fails:** it could not finish *and* could not tell, or restore, what serves: look at once.
- **Who acts:** an SRE.
- **What to do:** `.venv/bin/agent-loop route get` shows what serves. To put the former champion back within
seconds: `make rollback CYCLE=<cycle id>`. *Another rollout*: wait for it. *Server down*: start it. Then clear
the task: it goes on where it stopped.
""",
            timeout=timedelta(hours=2),
            retries=2,
        ),
    )
    def roll_out(cycle: str) -> str:
        """The command that rolls the candidate out; skips, with the gate's reason, unless it passed."""
        verdict = json.loads(Path(cycle, "gate.json").read_text(encoding="utf-8"))
        if verdict["verdict"] != "pass":
            raise AirflowSkipException(
                f"The champion serves on: the gate says {verdict['verdict']}: {verdict['reason']}"
            )
        return f'{_PROMPT} "$AGENTLOOP_PYTHON" -m ansible playbook infra/ansible/playbooks/rollout.yml'

    rolled_out = roll_out("{{ cycle_dir(dag_run.run_after, params) }}")

    report = _step(
        "report",
        "training report",
        """
- **Does:** writes `report.html` of whatever the night made, and `manifest.json` last. Runs even after a
failure.
- **Breaks when it fails:** the night did what it did; only its page is missing.
- **Who acts:** whoever runs the nights.
- **What to do:** the log names the file that it could not read; clear the task.
""",
        timeout=timedelta(minutes=15),
        retries=1,
        trigger_rule=TriggerRule.ALL_DONE,
    )

    @task(  # type: ignore[untyped-decorator]
        trigger_rule=TriggerRule.ONE_FAILED,
        retries=0,
        doc_md="""
- **Does:** fails the run if any step failed; otherwise it is skipped. A run is judged by its last tasks, and
the report, which runs after a failure too, would hide it.
- **Breaks when it fails:** nothing; it repeats that something else did.
- **Who acts:** nobody, for this task.
- **What to do:** look at the red task before it.
""",
    )
    def watch() -> None:
        """Fails, whenever it runs."""
        raise AirflowFailException("a step of this night failed: see the failed task's log")

    steps = [*dataset, finetune, quantize, evaluate, gate, register, rolled_out, report]
    chain(*steps)
    steps >> watch()


with DAG(
    dag_id="nightly_loop",
    description="Freeze, validate, curate, fine-tune, quantize, evaluate, gate, register, roll out, report.",
    doc_md=__doc__,
    schedule=CronDataIntervalTimetable(os.environ.get("AGENTLOOP_NIGHT_CRON", "0 2 * * *"), timezone="UTC"),
    # No backfill: the watermark, not the data interval, says what a cycle learns from.
    allowed_run_types=["scheduled", "manual"],
    params={"cycle_id": _CYCLE_ID},
    **_BOTH,
) as dag:
    freeze = _step(
        "freeze",
        "validation freeze",
        """
- **Does:** copies every inference and feedback stored since the last verdict from Postgres to `snapshot/`.
- **Skipped:** nothing was stored since then.
- **Breaks when it fails:** nothing is learned tonight, nothing is lost.
- **Who acts:** whoever runs Postgres.
- **What to do:** the log names the database that it could not reach or the view that it could not read. Check
that Postgres is up and that the role `agentloop_freeze` may read `learning_log`
(`.venv/bin/python -m grpc_server migrate`); check the free space of the cycles folder; clear the task.
""",
        timeout=timedelta(minutes=30),
        retries=3,
    )
    validate = _step(
        "validate",
        "validation check",
        """
- **Does:** holds the snapshot to the expectations; sets bad rows aside, each with its reason; compares it
with the nights before.
- **Breaks when it fails:** the snapshot is not fit to learn from (schema drift, too many bad rows, a share of
failures out of bounds, many more refusals in what would be learned), so the night stops here. It is not
retried: the same file gives the same result.
- **Who acts:** whoever runs the nights, with the callers whose rows were set aside.
- **What to do:** open `validation/data_docs/index.html` and `validation/result.json` (`reason`,
`quarantined`). If a caller sends nonsense, tell them; the next night takes the window again. If the rows are
right and the expectation is wrong, change the suite in `validation/` and clear the task.
""",
        timeout=timedelta(minutes=30),
        retries=0,
    )
    curate = _step(
        "curate",
        "training curate",
        """
- **Does:** makes the training set and the gate's questions of this snapshot and all earlier ones.
- **Skipped:** too few new examples; they count again tomorrow.
- **Breaks when it fails:** nothing is learned tonight.
- **Who acts:** whoever runs the nights.
- **What to do:** `dataset/card.md` has every number: many rows *contradicted*, *disputed* or *trigger* are a
caller that is wrong or hostile (ids are in `dataset.json`). The log names the row or the earlier `dataset/`
that it could not read. A damaged earlier cycle: restore it from backup, or move its folder away (its examples
are then forgotten). Clear the task.
""",
        timeout=timedelta(minutes=30),
        retries=1,
    )
    _learn_and_roll_out([freeze, validate, curate])


with DAG(
    dag_id="warmup_loop",
    description="The first champion, from imported public datasets, by the steps of the nightly loop.",
    doc_md=__doc__,
    schedule=None,
    allowed_run_types=["manual"],
    params={
        "cycle_id": _CYCLE_ID,
        "sets": Param(
            [],
            type="array",
            items={"type": "string", "pattern": "^[^:]+$"},
            minItems=1,
            description="Folders that `python -m training import` made.",
        ),
    },
    **_BOTH,
) as warmup_dag:
    warmup = _step(
        "warmup",
        "training warmup",
        """
- **Does:** makes the training set and the gate's questions of imported public datasets.
- **Skipped:** too few examples were left of them.
- **Breaks when it fails:** there is no first champion; the untouched base serves on.
- **Who acts:** whoever runs the nights.
- **What to do:** the log names the folder that is no imported set: make one (README, "A first champion"), and
trigger the DAG with the parameter `sets`.
""",
        timeout=timedelta(minutes=30),
        retries=1,
        environment={"AGENTLOOP_WARMUP_FROM": "{{ params['sets'] | join(':') }}"},
    )
    _learn_and_roll_out([warmup])
