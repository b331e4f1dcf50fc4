"""The night: the real DAG, watched through the files that it writes."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from demo.failure import LinkError
from demo.plan import Plan
from demo.processes import Program, Programs
from demo.serving import Serving

# What each step leaves when it has finished, in the order of the DAG.
STEPS = (
    ("freeze", "snapshot/snapshot.json"),
    ("validate", "validation/result.json"),
    ("curate", "dataset/dataset.json"),
    ("finetune", "adapter/finetune.json"),
    ("quantize", "quantize.json"),
    ("evaluate", "evaluation/summary.json"),
    ("gate", "gate.json"),
    ("register", "registry.json"),
    ("roll out", "rollout.json"),
    ("report", "manifest.json"),
)
ROLL_OUT = "roll out"
CYCLE_ID = re.compile(r"\d{8}T\d{6}Z")

# What a night is given that has minutes, not hours; the environment may say otherwise. Half of the requests
# go to the canary, so that two minutes at a request a second are enough for the rollout to see it.
SHORT_NIGHT = {
    "AGENTLOOP_NIGHT_RETRY_SECONDS": "5",
    "AGENTLOOP_CANARY_PERCENT": "50",
    "AGENTLOOP_CANARY_MIN_REQUESTS": "20",
    "AGENTLOOP_CANARY_TIME_LIMIT": "120",
    "AGENTLOOP_CANARY_POLL_INTERVAL": "2",
}


@dataclass(slots=True)
class Night:
    """A run of `nightly_loop` that goes on, or has ended."""

    program: Program
    cycles_dir: Path
    earlier: frozenset[str]

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
        """The step that runs now."""
        cycle_dir = self.cycle_dir
        if cycle_dir is None:
            return "starting Airflow"
        passed = verdict(cycle_dir) == "pass"
        for name, output in STEPS:
            if not (cycle_dir / output).exists() and (name != ROLL_OUT or passed):
                return name
        return "ending"

    async def ended(self, *, something_new: bool) -> Path:
        """Wait for the end of the run; its cycle directory.

        `something_new`: whether there was something to learn, so that a run that skips everything is broken.

        Raises:
            LinkError: naming the step that failed.
        """
        code = await self.program.ended()
        cycle_dir = self.cycle_dir
        if code != 0:
            raise LinkError(
                f"night, step {self.step}",
                f"the DAG's run ended with exit code {code}",
                "see the log and, in dags/nightly_loop.py, what the step's page says; then `make demo` again",
                self.program.log,
            )
        if cycle_dir is None or not verdict(cycle_dir):
            if cycle_dir is not None and not something_new:
                return cycle_dir
            raise LinkError(
                f"night, step {self.step}",
                "the DAG's run found nothing to learn, though services have shown right answers",
                "see the log: the step that was skipped says why",
                self.program.log,
            )
        return cycle_dir


async def begin(plan: Plan, programs: Programs, serving: Serving) -> Night:
    """Start the DAG's run. It puts itself, and its steps, behind what serves."""
    earlier = frozenset(path.name for path in plan.cycles_dir.iterdir()) if plan.cycles_dir.is_dir() else None
    program = await programs.start(
        "night",
        plan.night,
        plan.environment
        | {
            "AGENTLOOP_DATABASE_URL": serving.database_url,
            "AGENTLOOP_SERVER": serving.grpc_address,
            "AGENTLOOP_TOKEN": "",  # one that the caller's shell has would come before the file
            "AGENTLOOP_TOKEN_FILE": str(serving.operator_token_file),
            "AGENTLOOP_METRICS_URL": f"http://{serving.http_address}/metrics",
            **{name: os.environ.get(name, value) for name, value in SHORT_NIGHT.items()},
        },
    )
    return Night(program, plan.cycles_dir, earlier or frozenset())


def verdict(cycle_dir: Path) -> str:
    """The gate's verdict, or "" if there is none."""
    try:
        return str(json.loads((cycle_dir / "gate.json").read_text(encoding="utf-8"))["verdict"])
    except (OSError, ValueError, KeyError):
        return ""
