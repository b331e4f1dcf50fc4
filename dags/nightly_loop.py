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

**A night that is still running** when the next is due: the next is created when it has ended, and begins
then. Nights that were missed altogether need nothing, as the next one learns all that was stored since the
last verdict.

**A backfill** (`airflow backfill create --dag-id nightly_loop --from-date 2026-01-30 --to-date 2026-01-31
--max-active-runs 1 --reprocess-behavior failed`) runs missed or failed nights again, each in its own cycle.
The first takes all that was stored since the last verdict, the others find nothing and skip; a night before
the last verdict has nothing to learn, and skips too. One at a time: `room` refuses a night beside another.

**When the night is late**, `AGENTLOOP_NIGHT_LATE_MINUTES` (default 360; 0: never) after it was due and not
ended well, Airflow's deadline alert tells the Alertmanager of `AGENTLOOP_ALERTMANAGER_URL`; `night_late.py`
says how.

**Several models** learn in one run, each with its own verdict, if `AGENTLOOP_NIGHT_MODELS` names a list of
them (`training/configs/night-models.yaml` says what is in it): the steps are mapped over it, those that fill
the machine one at a time, and what one model's failed step stops is its own night.

**Before there is any log**, `warmup_loop` trains the first champion: the same steps, with a training set made
of imported public datasets in place of `freeze`, `validate` and `curate`. It has no schedule; trigger it with
the parameter `sets`, or run `make warmup SETS=var/datasets/bfcl`.

**Settings** are environment variables, the same for the schedule, for `make dag` and for a step run by hand:
`AGENTLOOP_HOME` (the checkout; default: where this file lies), `AGENTLOOP_PYTHON` (the interpreter that runs
the steps; default: Airflow's own), `AGENTLOOP_CYCLES_DIR` (default `cycles` in the checkout),
`AGENTLOOP_NIGHT_CRON` (default `0 2 * * *`, UTC), `AGENTLOOP_NIGHT_RETRY_SECONDS` (the first wait before a
retry; default 60, doubled each time), `AGENTLOOP_DISK_RESERVE` (what a night leaves free on each disk;
default `1GiB`), and whatever the steps themselves read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import night_late
from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import (  # type: ignore[attr-defined]
    DAG,
    CronDataIntervalTimetable,
    DeadlineAlert,
    DeadlineReference,
    Param,
    SyncCallback,
    TriggerRule,
    chain,
    task,
    task_group,
)
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException
from night_steps import CYCLE_ID, CYCLES, HEAVY, IN_CYCLE, PROMPT, command, cycle_id, step, with_cycle

_CYCLE_ID = Param(
    None,
    type=["null", "string"],
    pattern=r"^\d{8}T\d{6}Z$",
    description="Go on with this cycle (`YYYYMMDDTHHMMSSZ`) rather than begin one of its own.",
)
Model = Mapping[str, Any]  # the variables that say which model a step works on; none: the service's own
_LATE_MINUTES = float(os.environ.get("AGENTLOOP_NIGHT_LATE_MINUTES", "360"))
_BOTH: dict[str, Any] = {
    "start_date": datetime(2026, 1, 1, tzinfo=UTC),
    "catchup": False,
    "max_active_runs": 1,
    "dagrun_timeout": timedelta(hours=14),
    "user_defined_macros": {"cycle_id": cycle_id},
    "tags": ["agentloop"],
    "deadline": DeadlineAlert(
        name="The night is late",
        reference=DeadlineReference.DAGRUN_QUEUED_AT,
        interval=timedelta(minutes=_LATE_MINUTES),
        callback=SyncCallback(night_late.tell),
    )
    if _LATE_MINUTES
    else None,
}


def _room(model: Model) -> BashOperator:
    """The first step of both."""
    return step(
        "room",
        "training room",
        """
- **Does:** sees that the disks have room for a night, and that no other night is at work.
- **Skipped:** a backfilled night from before the last verdict, which learned all there was.
- **Breaks when it fails:** the night does not begin; nothing is lost, and nothing that serves is stopped by a
full disk.
- **Who acts:** whoever runs the nights.
- **What to do:** the log names the disk, what is wanted and what is free.
`python -m training retain --dry-run` tells what old nights would give back, which the DAG `retention` takes
daily. *At work*: wait for that cycle, or end its run. Clear the task.
""",
        model=model,
        environment={"AGENTLOOP_RUN_TYPE": "{{ dag_run.run_type }}"},
        timeout=timedelta(minutes=15),
        retries=3,
    )


def _learn_and_roll_out(model: Model, dataset: list[BashOperator]) -> None:
    """From the steps that make `dataset/` on: what both DAGs have in common."""
    finetune = step(
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
        model=model,
        timeout=timedelta(hours=8),
        retries=2,
        **HEAVY,
    )
    quantize = step(
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
        model=model,
        timeout=timedelta(hours=1),
        retries=1,
        **HEAVY,
    )
    evaluate = step(
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
        model=model,
        timeout=timedelta(hours=4),
        retries=2,
        **HEAVY,
    )
    gate = step(
        "gate",
        "training gate",
        """
- **Does:** decides from the paired answers: pass, fail or inconclusive. All three are successes of this task.
- **Breaks when it fails:** there is no verdict; the champion serves on, the watermark stays.
- **Who acts:** whoever runs the nights.
- **What to do:** the log names the file of `evaluation/` that is missing or malformed: clear `evaluate`.
*OtherDatasetError*: rows were erased since the candidate learned them; clear the task that the log names,
mostly `finetune`, with what follows.
""",
        model=model,
        timeout=timedelta(minutes=15),
        retries=0,
    )
    register = step(
        "register",
        "training register",
        """
- **Does:** writes the cycle to the MLflow registry, whatever the verdict; marks a candidate that passed.
- **Breaks when it fails:** nothing is rolled out, because what serves must be found in the registry.
- **Who acts:** whoever runs MLflow's database.
- **What to do:** check that the database answers; clear the task. It finds what it wrote before.
""",
        model=model,
        timeout=timedelta(minutes=30),
        retries=3,
    )

    @task.bash(  # type: ignore[call-overload, untyped-decorator]
        skip_on_exit_code=None,  # Ansible's 99 is an interrupt
        **with_cycle(
            """
- **Does:** installs the candidate, warms it, gives it a share of the traffic, compares its own figures with
the champion's at each step, then promotes it and watches, or puts the route back. Both are successes: read
`rollout.json`.
- **Skipped:** the gate said fail or inconclusive; the champion serves on.
- **Breaks when it fails:** it could not finish *and* could not tell, or restore, what serves: look at once.
- **Who acts:** an SRE.
- **What to do:** `.venv/bin/agent-loop route get` shows what serves. To put the former champion back within
seconds: `make rollback CYCLE=<cycle id>`. *Another rollout*: wait for it. *Server down*: start it. Then clear
the task: it goes on where it stopped.
""",
            timeout=timedelta(hours=5),  # four steps of an hour at most, their minute each, and the watch
            retries=2,
            model=model,
        ),
    )
    def roll_out(cycles: str, cycle: str) -> str:
        """The command that rolls the candidate out; skips, with the gate's reason, unless it passed."""
        verdict = json.loads(Path(cycles, cycle, "gate.json").read_text(encoding="utf-8"))
        if verdict["verdict"] != "pass":
            raise AirflowSkipException(
                f"The champion serves on: the gate says {verdict['verdict']}: {verdict['reason']}"
            )
        return (
            f'{IN_CYCLE}{PROMPT} "$AGENTLOOP_PYTHON" -m ansible playbook infra/ansible/playbooks/rollout.yml'
        )

    rolled_out = roll_out({**CYCLES, **model}["AGENTLOOP_CYCLES_DIR"], CYCLE_ID)

    report = step(
        "report",
        "training report",
        """
- **Does:** writes `report.html` of whatever the night made, and `manifest.json` last. Runs even after a
failure.
- **Breaks when it fails:** the night did what it did; only its page is missing.
- **Who acts:** whoever runs the nights.
- **What to do:** the log names the file that it could not read; clear the task.
""",
        model=model,
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


def _night(model: Model) -> None:
    """All steps of one model's night."""
    room = _room(model)
    freeze = step(
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
        model=model,
        timeout=timedelta(minutes=30),
        retries=3,
    )
    validate = step(
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
        model=model,
        timeout=timedelta(minutes=30),
        retries=0,
    )
    curate = step(
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
        model=model,
        timeout=timedelta(minutes=30),
        retries=1,
    )
    _learn_and_roll_out(model, [room, freeze, validate, curate])


@task_group(group_id="model")  # type: ignore[untyped-decorator]
def _night_of(model: str, alias: str, recipe: str, base: str, cycles: str) -> None:
    """One of several models' night; Airflow maps it over the list that the task `models` reads."""
    _night(
        {
            "AGENTLOOP_MODEL_NAME": model,
            "AGENTLOOP_ALIAS": alias,
            "AGENTLOOP_RECIPE": recipe,
            "AGENTLOOP_BASE_GGUF": base,
            "AGENTLOOP_CYCLES_DIR": cycles,
        }
    )


with DAG(
    dag_id="nightly_loop",
    description="Freeze, validate, curate, fine-tune, quantize, evaluate, gate, register, roll out, report.",
    doc_md=__doc__,
    schedule=CronDataIntervalTimetable(os.environ.get("AGENTLOOP_NIGHT_CRON", "0 2 * * *"), timezone="UTC"),
    # The watermark, not the data interval, says what a cycle learns from: see *A backfill* above.
    allowed_run_types=["scheduled", "manual", "backfill"],
    params={"cycle_id": _CYCLE_ID},
    **_BOTH,
) as dag:
    if os.environ.get("AGENTLOOP_NIGHT_MODELS"):
        models = command(
            "models",
            "training models",
            """
- **Does:** reads the list of models that `AGENTLOOP_NIGHT_MODELS` names; each has its night beside the
others'.
- **Breaks when it fails:** no model learns tonight; nothing is lost.
- **Who acts:** whoever runs the nights. - **What to do:** the log names the entry of the list that is wrong,
or the file that is not there. Clear the task.
""",
            environment=CYCLES,
            timeout=timedelta(minutes=15),
            retries=1,
            do_xcom_push=True,
            output_processor=json.loads,
        )
        _night_of.expand_kwargs(models.output)
    else:
        _night({})


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
    room = _room({})
    warmup = step(
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
        model={},
        timeout=timedelta(minutes=30),
        retries=1,
        environment={"AGENTLOOP_WARMUP_FROM": "{{ params['sets'] | join(':') }}"},
    )
    _learn_and_roll_out({}, [room, warmup])
