"""The nightly DAG, run by a real Airflow on a real Postgres; its steps are a script that plays them.

The DAG starts every step by AGENTLOOP_PYTHON: here a script that writes down what it was asked, and does what
the variables PLAY_<step> say.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy.engine import make_url

from tests.coverage_files import untraced

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
HOME = Path(__file__).resolve().parents[2]
ALL = [
    "training room",
    "validation freeze",
    "validation check",
    "training curate",
    "training finetune",
    "training quantize",
    "training evaluate",
    "training gate",
    "training register",
    "ansible playbook",
    "training report",
]

# A step, called as `-m <package> <step> …`. PLAY_<step> is bash that it runs.
STEP = """#!/bin/bash
if [[ $3 == models ]]; then eval "$PLAY_models"; fi
mkdir -p "$AGENTLOOP_CYCLE_DIR"
echo "$2 $3 $(cut -d' ' -f3 /proc/self/autogroup 2>/dev/null)" >>"$AGENTLOOP_CYCLE_DIR/ran"
play="PLAY_$3"
eval "${!play}"
if [[ $3 == gate ]]; then
  printf '{"verdict": "%s", "reason": "as told"}' "${VERDICT:-pass}" >"$AGENTLOOP_CYCLE_DIR/gate.json"
fi
"""


class Night:
    """Runs nights in one state folder, on one Postgres."""

    def __init__(self, folder: Path, dsn: str) -> None:
        self.folder = folder
        self.dsn = dsn
        self.python = folder / "python"
        self.python.write_text(STEP)
        self.python.chmod(0o755)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        kept = {k: v for k, v in untraced().items() if not k.startswith(("AGENTLOOP", "AIRFLOW", "ANSIBLE"))}
        return subprocess.Popen(
            [sys.executable, str(HOME / "scripts" / "night.py"), *arguments],
            env=kept
            | {
                "AGENTLOOP_STATE_DIR": str(self.folder / "var"),
                "AGENTLOOP_CYCLES_DIR": str(self.folder / "cycles"),
                "AGENTLOOP_AIRFLOW_DATABASE_URL": self.dsn,
                "AGENTLOOP_TOKEN": "al_unused",
                "AGENTLOOP_PYTHON": str(self.python),
                "AGENTLOOP_NIGHT_RETRY_SECONDS": "0.1",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> Ran:
        process = self.start(*arguments, **environment)
        try:
            out, _ = process.communicate(timeout=200)
        finally:
            process.terminate()
        return Ran(process.returncode, out)


class Ran:
    """A night that has ended."""

    def __init__(self, code: int, out: str) -> None:
        self.code = code
        self.out = out
        self.cycle_dir = Path(out.splitlines()[-1])

    @property
    def steps(self) -> list[str]:
        """The commands that ran, in order."""
        return [line.rsplit(" ", 1)[0] for line in (self.cycle_dir / "ran").read_text().splitlines()]

    @property
    def priorities(self) -> set[str]:
        """The autogroup priorities that they ran at."""
        lines = (self.cycle_dir / "ran").read_text().splitlines()
        return {line.rsplit(" ", 1)[1] for line in lines if not line.startswith("ansible")}


@pytest.fixture(scope="module")
def night(local_postgres: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Night]:
    folder = tmp_path_factory.mktemp("night") / "nächte & co"
    folder.mkdir()
    url = make_url(local_postgres.dsn("postgres")).set(
        drivername="postgresql+psycopg", database=f"airflow_{uuid4().hex[:8]}"
    )
    yield Night(folder, url.render_as_string(hide_password=False))


def test_a_night_runs_every_step_in_its_order_at_the_lowest_priority_and_a_warm_up_is_a_second_cycle(
    night: Night,
) -> None:
    first = night.run()
    assert first.code == 0, first.out
    assert first.steps == ALL
    assert first.cycle_dir.parent == night.folder / "cycles"
    if Path("/proc/self/autogroup").exists():
        assert first.priorities == {"19"}
    with psycopg.connect(
        make_url(night.dsn).set(drivername="postgresql").render_as_string(False)
    ) as connection:
        assert connection.execute("SELECT slots FROM slot_pool WHERE pool = 'training'").fetchone() == (1,)
    second = night.run(
        *("--warmup", "var/datasets/bfcl", "--warmup", "/sets & more/a b"),
        VERDICT="inconclusive",
        PLAY_warmup='echo "from $AGENTLOOP_WARMUP_FROM"',
    )
    assert second.code == 0, second.out
    assert second.cycle_dir != first.cycle_dir
    learned = [step for step in ALL[4:] if step != "ansible playbook"]
    assert second.steps == ["training room", "training warmup", *learned]
    assert f"   from {HOME}/var/datasets/bfcl:/sets & more/a b" in second.out.splitlines()
    assert "skipped: The champion serves on: the gate says inconclusive: as told" in second.out


def test_where_there_is_nothing_to_learn_the_night_skips_and_succeeds(night: Night) -> None:
    ran = night.run(PLAY_curate="echo too few examples; exit 99")
    assert ran.code == 0, ran.out
    assert ran.steps == [*ALL[:4], "training report"]
    assert "   too few examples" in ran.out.splitlines()


def test_a_failed_step_fails_the_night_though_the_report_still_runs_and_the_cycle_can_be_gone_on_with(
    night: Night,
) -> None:
    broken = night.run(PLAY_quantize="echo disk full; exit 1")
    assert broken.code == 1
    before = broken.steps
    assert before == [*ALL[:5], "training quantize", "training quantize", "training report"]
    assert "   disk full" in broken.out.splitlines()
    repaired = night.run("--cycle", broken.cycle_dir.name)
    assert repaired.code == 0, repaired.out
    assert repaired.cycle_dir == broken.cycle_dir
    assert repaired.steps == before + ALL


MODELS = """
models:
  - {model: gemma-3-270m, alias: default, recipe: training/configs/gemma3-270m.yaml, base: Makefile}
  - {model: gemma-3-1b, alias: agent, recipe: training/configs/gemma3-1b.yaml, base: README.md}
"""


@pytest.mark.soak
def test_several_models_learn_in_one_night_and_what_stops_one_does_not_stop_the_other(night: Night) -> None:
    listed = night.folder / "models.yaml"
    listed.write_text(MODELS)
    told = 'echo "$AGENTLOOP_MODEL_NAME $AGENTLOOP_ALIAS $AGENTLOOP_RECIPE $AGENTLOOP_BASE_GGUF"'
    ran = night.run(
        AGENTLOOP_NIGHT_MODELS=str(listed),
        REAL=sys.executable,
        # The list is read by the real command; the steps are played.
        PLAY_models='exec "$REAL" -m training models',
        PLAY_curate=f"{told}; [[ $AGENTLOOP_ALIAS == default ]] || {{ echo broken; exit 1; }}",
    )
    assert ran.code == 1, ran.out
    cycles, cycle_id = ran.cycle_dir.parent, ran.cycle_dir.name
    assert ran.steps == ALL
    other = (cycles / "gemma-3-1b" / cycle_id / "ran").read_text().splitlines()
    names = [line.rsplit(" ", 1)[0] for line in other]
    assert names == [*ALL[:4], "training curate", "training report"]
    recipe = HOME / "training" / "configs"
    assert f"gemma-3-270m default {recipe}/gemma3-270m.yaml {HOME}/Makefile" in ran.out
    assert f"gemma-3-1b agent {recipe}/gemma3-1b.yaml {HOME}/README.md" in ran.out


@pytest.mark.soak
def test_a_failed_report_fails_the_night_too(night: Night) -> None:
    ran = night.run(PLAY_report="exit 1", PLAY_freeze="exit 99")
    assert ran.code == 1
    assert ran.steps == [*ALL[:2], "training report", "training report"]


def test_a_night_that_is_told_to_end_ends_its_step_too(night: Night) -> None:
    pid_file = night.folder / "pid"
    process = night.start(PLAY_freeze=f"echo $$ >'{pid_file}'; exec sleep 600")
    try:
        end = time.monotonic() + 120
        while not (pid_file.exists() and pid_file.read_text().strip()):
            assert process.poll() is None
            assert time.monotonic() < end, "the step did not begin"
            time.sleep(0.1)
        step = int(pid_file.read_text())
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 1
        assert Path(out.splitlines()[-1]).parent == night.folder / "cycles"
        end = time.monotonic() + 10
        while alive(step):
            assert time.monotonic() < end, "the step outlived its night"
            time.sleep(0.1)
    finally:
        process.kill()


def alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return "sleep" in Path(f"/proc/{pid}/cmdline").read_text()
    return False
