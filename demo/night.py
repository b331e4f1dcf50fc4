"""The night: the real DAG, watched through the files that it writes."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agentloop import night as records
from demo.failure import LinkError
from demo.plan import Plan
from demo.processes import Program, Programs
from demo.serving import Serving

ROLL_OUT = "roll_out"
CYCLE_ID = re.compile(r"\d{8}T\d{6}Z")

# Of so many new questions the 32 new examples that curation wants must come: a share is for the gate, and a
# few go wrong on purpose. Of fewer they need not, and a night that skips is as it should be.
PLENTY_OF_QUESTIONS = 64

# What a night is given that has minutes, not hours; the environment may say otherwise. Half of the requests
# go to the canary, so that two minutes at a request a second are enough for the rollout to see it.
SHORT_NIGHT = {
    "AGENTLOOP_NIGHT_RETRY_SECONDS": "5",
    "AGENTLOOP_TRAINING_TOKENS": "66000",  # five minutes of two cores
    "AGENTLOOP_CANARY_STEPS": "50",
    "AGENTLOOP_CANARY_MIN_REQUESTS": "20",
    "AGENTLOOP_CANARY_BAKE_SECONDS": "0",
    "AGENTLOOP_CANARY_WATCH_SECONDS": "5",
    "AGENTLOOP_CANARY_TIME_LIMIT": "120",
    "AGENTLOOP_CANARY_POLL_INTERVAL": "2",
}


@dataclass(slots=True)
class Night:
    """A run of `nightly_loop` that goes on, or has ended."""

    program: Program
    cycles_dir: Path
    earlier: frozenset[str]
    command: str = "make demo"

    @property
    def cycle_dir(self) -> Path | None:
        """The cycle that this night writes, as soon as there is one."""
        with suppress(OSError):
            names = {path.name for path in self.cycles_dir.iterdir() if CYCLE_ID.fullmatch(path.name)}
            new = sorted(names - self.earlier)
            if new:
                return self.cycles_dir / new[-1]
        return None

    @property
    def step(self) -> str:
        """The step that runs now, or that failed."""
        cycle_dir = self.cycle_dir
        if cycle_dir is None:
            return "starting Airflow"
        for step in records.Night(cycle_dir).steps:
            if step.state == "skipped":
                break
            if step.state != "done":
                return step.name
        return "ending" if (cycle_dir / "manifest.json").exists() else "report"

    async def ended(self, *, new_questions: int) -> Path:
        """Wait for the end of the run; its cycle directory.

        `new_questions` is how many were never asked before: where they are few, there may be too little to
        learn, and a run that curation skipped ended well.

        Raises:
            LinkError: naming the step that failed, or that was skipped and should not have been.
        """
        code = await self.program.ended()
        cycle_dir = self.cycle_dir
        stopped = None if cycle_dir is None else records.Night(cycle_dir).stopped
        why = f": {stopped.reason}" if stopped is not None and stopped.reason else ""
        if code != 0:
            raise LinkError(
                f"night, step {self.step}",
                f"the DAG's run ended with exit code {code}{why}",
                "see the log and, in dags/nightly_loop.py, what the step's page says;"
                f" then `{self.command}` again",
                self.program.log,
            )
        if cycle_dir is not None and verdict(cycle_dir):
            return cycle_dir
        if cycle_dir is not None and new_questions < PLENTY_OF_QUESTIONS:
            left_out = skipped(cycle_dir)
            if left_out is not None and left_out.name == "curate":
                return cycle_dir
        raise LinkError(
            f"night, step {self.step if stopped is None else stopped.name}",
            f"the DAG's run found nothing to learn, though services have shown right answers{why}",
            "see the log: the step that was skipped says why",
            self.program.log,
        )


async def begin(plan: Plan, programs: Programs, serving: Serving) -> Night:
    """Start the DAG's run. It puts itself, and its steps, behind what serves."""
    found = {path.name for path in plan.cycles_dir.iterdir()} if plan.cycles_dir.is_dir() else set()
    settings = SHORT_NIGHT | dict(plan.night_settings)
    program = await programs.start(
        "night",
        [*plan.night, *(("--cycle", plan.cycle_id) if plan.cycle_id else ())],
        plan.environment
        | {
            "AGENTLOOP_DATABASE_URL": serving.database_url,
            "AGENTLOOP_SERVER": serving.grpc_address,
            "AGENTLOOP_TOKEN": "",  # one that the caller's shell has would come before the file
            "AGENTLOOP_TOKEN_FILE": str(serving.operator_token_file),
            "AGENTLOOP_METRICS_URL": f"http://{serving.http_address}/metrics",
            **{name: os.environ.get(name, value) for name, value in settings.items()},
        },
    )
    return Night(program, plan.cycles_dir, frozenset(found - {plan.cycle_id}), plan.command)


def skipped(cycle_dir: Path) -> records.Step | None:
    """The step at which the night found nothing to learn, with its reason; None if it went on."""
    stopped = records.Night(cycle_dir).stopped
    return stopped if stopped is not None and stopped.state == "skipped" else None


def verdict(cycle_dir: Path) -> str:
    """The gate's verdict, or "" if there is none."""
    try:
        return str(json.loads((cycle_dir / "gate.json").read_text(encoding="utf-8"))["verdict"])
    except (OSError, ValueError, KeyError):
        return ""
