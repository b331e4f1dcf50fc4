"""`make airflow`: Airflow's scheduler on a real Postgres, its pages in Chromium, its alerts in Alertmanager.

Steps are played by a script, as in test_night.py, but where a worker is killed: there a real fine-tuning of
tiny weights runs, and goes on. Pictures of the pages are left in AGENTLOOP_TEST_PICTURES, if that is set.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen
from uuid import uuid4

import psutil
import pytest
import torch
import yaml
from sqlalchemy.engine import make_url

from tests.browser import page
from tests.coverage_files import untraced
from tests.tiny_gemma import tiny_base
from training import recipe

pytestmark = [pytest.mark.soak, pytest.mark.timeout(2400)]
HOME = Path(__file__).resolve().parents[2]
PATIENCE = 900.0
MISSED_HEARTBEAT = 20
NEVER = "0 0 29 2 *"

# A step, called as `-m <package> <step> …`. PLAY_<step> is bash that it runs.
STEP = """#!/bin/bash
play="PLAY_$3"
eval "${!play}"
mkdir -p "$AGENTLOOP_CYCLE_DIR"
if [[ $3 == gate ]]; then
  printf '{"verdict": "inconclusive", "reason": "as told"}' >"$AGENTLOOP_CYCLE_DIR/gate.json"
fi
"""
# Longer than a heartbeat may be missing; says when it held the machine.
LONG = f"""
if [[ $AGENTLOOP_CYCLE_DIR == *20260303* ]]; then
  exec "$REAL" -m training finetune --cycle "$AGENTLOOP_CYCLE_DIR"
fi
echo "begin $(date +%s.%N)" >>"$SPANS"; sleep {2 * MISSED_HEARTBEAT}; echo "end $(date +%s.%N)" >>"$SPANS"
"""
FAIL_ONCE = """
once="$AGENTLOOP_CYCLE_DIR/failed once"
[[ -e $once ]] || { mkdir -p "$AGENTLOOP_CYCLE_DIR"; touch "$once"; exit 1; }
"""


def until(what: str, found: Callable[[], Any]) -> Any:
    """What `found` finds, once that is true."""
    end = time.monotonic() + PATIENCE
    while not (value := found()):
        assert time.monotonic() < end, f"it never came to this: {what}"
        time.sleep(0.5)
    return value


class Airflow:
    """The program, its pages' address and login, and its API."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scripts.scheduler", "--port", "0"],
            cwd=HOME,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said = []
        for line in self.process.stdout or ():
            said.append(line)
            if line.startswith("Airflow: "):
                break
        else:
            raise AssertionError("".join(said))
        words = line.replace(",", "").split()
        self.address, self.user, self.password = words[1], words[3], words[5]
        self.parts = psutil.Process(self.process.pid).children(recursive=True)
        self._token = ""
        self._token = self.api("POST", "/auth/token", username=self.user, password=self.password)[
            "access_token"
        ]

    def api(self, method: str, path: str, **body: Any) -> Any:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._token}"}
        data = json.dumps(body).encode() if body else None
        with urlopen(Request(self.address + path, data, headers, method=method), timeout=PATIENCE) as answer:
            return json.load(answer)

    def switch_on(self, dag: str) -> None:
        def known() -> bool:
            return any(each["dag_id"] == dag for each in self.api("GET", "/api/v2/dags")["dags"])

        until(f"{dag} is known", known)
        self.api("PATCH", f"/api/v2/dags/{dag}", is_paused=False)

    def trigger(self, dag: str, **conf: Any) -> str:
        made = self.api("POST", f"/api/v2/dags/{dag}/dagRuns", logical_date=None, conf=conf)
        return f"/api/v2/dags/{dag}/dagRuns/{made['dag_run_id']}"

    def ended(self, run: str) -> str:
        """How a run ended, once it has."""

        def state() -> str:
            found = str(self.api("GET", run)["state"])
            return found if found in ("success", "failed") else ""

        return str(until(f"{run} ends", state))

    def task(self, run: str, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.api("GET", f"{run}/taskInstances/{name}")
        return found

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)


@contextmanager
def alertmanager(folder: Path) -> Iterator[str]:
    """A real Alertmanager's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    folder.mkdir()
    (folder / "config.yml").write_text("route: {receiver: nobody}\nreceivers: [{name: nobody}]\n")
    process = subprocess.Popen(
        [
            "prometheus-alertmanager",
            f"--config.file={folder}/config.yml",
            f"--storage.path={folder}/data",
            f"--web.listen-address={address}",
            "--cluster.listen-address=",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def alerts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with alertmanager(tmp_path_factory.mktemp("alerts") / "manager") as address:
        yield address


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a real training set, tiny weights and a recipe of many steps for the night of 2026-03-03."""
    folder = tmp_path_factory.mktemp("airflow")
    tiny_base(folder / "base")
    options = {
        "rank": 4,
        "epochs": 60,
        "batch_examples": 4,
        "compute_dtype": "float32",
        "checkpoint_steps": 3,
    }
    written = recipe.read().model_dump() | options | {"max_tokens": 10**9}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(written))
    dataset = folder / "cycles" / "20260303T020000Z" / "dataset"
    dataset.mkdir(parents=True)
    with (dataset / "train.jsonl").open("w") as file:
        for number in range(40):
            prompt = f"<start_of_turn>user\nadd {number}<end_of_turn>\n<start_of_turn>model\n"
            line = {"prompt": prompt, "completion": '{"name": "add"}<end_of_turn>', "weight": 1.0}
            file.write(json.dumps(line) + "\n")
    python = folder / "python"
    python.write_text(STEP)
    python.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def airflow(folder: Path, alerts: str, local_postgres: Any) -> Iterator[Airflow]:
    url = make_url(local_postgres.dsn("postgres")).set(
        drivername="postgresql+psycopg", database=f"airflow_{uuid4().hex[:8]}"
    )
    kept = {k: v for k, v in untraced().items() if not k.startswith(("AGENTLOOP", "AIRFLOW", "ANSIBLE"))}
    environment = kept | {
        "AGENTLOOP_STATE_DIR": str(folder / "var"),
        "AGENTLOOP_CYCLES_DIR": str(folder / "cycles"),
        "AGENTLOOP_AIRFLOW_DATABASE_URL": url.render_as_string(hide_password=False),
        "AGENTLOOP_TOKEN": "al_unused",
        "AGENTLOOP_PYTHON": str(folder / "python"),
        "AGENTLOOP_NIGHT_RETRY_SECONDS": "1",
        "AGENTLOOP_NIGHT_CRON": NEVER,
        "AGENTLOOP_NIGHT_LATE_MINUTES": "0.2",
        "AGENTLOOP_ALERTMANAGER_URL": alerts,
        "AGENTLOOP_BASE_GGUF": str(folder / "base"),
        "AGENTLOOP_RECIPE": str(folder / "recipe.yaml"),
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": str(MISSED_HEARTBEAT),
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
        "REAL": sys.executable,
        "SPANS": str(folder / "spans"),
        "PLAY_finetune": LONG,
        "PLAY_quantize": FAIL_ONCE,
    }
    airflow = Airflow(folder, environment)
    try:
        yield airflow
    finally:
        airflow.stop()


def test_two_nights_share_the_pool_a_failed_step_is_retried_and_a_long_one_keeps_its_heartbeat(
    airflow: Airflow, folder: Path, alerts: str
) -> None:
    for dag in ("nightly_loop", "warmup_loop"):
        airflow.switch_on(dag)
    runs = [airflow.trigger("nightly_loop"), airflow.trigger("warmup_loop", sets=["var/datasets/any"])]

    def one_works_and_one_waits() -> bool:
        pool = airflow.api("GET", "/api/v2/pools/training")
        slots = (pool["slots"], pool["occupied_slots"], pool["queued_slots"] + pool["scheduled_slots"])
        return slots == (1, 1, 1)

    until("one fine-tuning works, and one waits for it", one_works_and_one_waits)
    assert [airflow.ended(run) for run in runs] == ["success", "success"]
    words = (folder / "spans").read_text().split()
    assert words[::2] == ["begin", "end", "begin", "end"], "one after the other"
    begin, end = float(words[1]), float(words[3])
    assert end - begin > MISSED_HEARTBEAT, "longer than a heartbeat may be missing"
    for run in runs:
        assert airflow.task(run, "finetune")["try_number"] == 1, "its heartbeat came from beside the step"
        assert airflow.task(run, "quantize")["try_number"] == 2, "it failed once"
        assert airflow.task(run, "roll_out")["state"] == "skipped"

    def told() -> list[Any]:
        with urlopen(f"{alerts}/api/v2/alerts", timeout=PATIENCE) as answer:
            return [each for each in json.load(answer) if each["labels"]["dag_id"] == "nightly_loop"]

    alert, *_ = until("Alertmanager has the alert of the late night", told)
    assert alert["labels"]["alertname"] == "AgentloopNightLate"
    assert datetime.fromisoformat(alert["endsAt"]) > datetime.fromisoformat(alert["startsAt"])


def test_its_pages_are_seen_in_a_browser(airflow: Airflow, tmp_path: Path) -> None:
    pictures = Path(os.environ.get("AGENTLOOP_TEST_PICTURES", tmp_path / "pictures"))
    with page(tmp_path / "profile", PATIENCE) as browser:
        browser.open(airflow.address)
        browser.type("input[name=username]", airflow.user)
        browser.type("input[name=password]", airflow.password)
        browser.picture(pictures / "login.png")
        browser.run("document.querySelector('button[type=submit]').click()")
        browser.wait("!location.pathname.includes('login')")
        browser.open(f"{airflow.address}/dags")
        browser.sees("nightly_loop", "warmup_loop", "retention")
        browser.picture(pictures / "dags.png")
        browser.open(f"{airflow.address}/dags/nightly_loop")
        browser.sees("room", "finetune", "roll_out")
        browser.picture(pictures / "nightly_loop.png")
        browser.open(f"{airflow.address}/dags/nightly_loop/tasks/finetune")
        browser.sees("finetune")
        browser.picture(pictures / "finetune.png")
        browser.open(f"{airflow.address}/pools")
        browser.sees("training")
        browser.picture(pictures / "pools.png")


def test_a_training_whose_worker_was_killed_goes_on_from_its_checkpoint(
    airflow: Airflow, folder: Path
) -> None:
    airflow.switch_on("nightly_loop")
    run = airflow.trigger("nightly_loop", cycle_id="20260303T020000Z")
    state = folder / "cycles" / "20260303T020000Z" / "adapter.partial" / "state.pt"
    until("a checkpoint is kept", state.is_file)
    workers = [
        each
        for each in psutil.Process(airflow.process.pid).children(recursive=True)
        if "airflow worker -- LocalExecutor" in " ".join(each.cmdline())
    ]
    step = [
        each for worker in workers for each in worker.children(recursive=True) if "finetune" in each.cmdline()
    ]
    assert step, "the step is a descendant of a worker"
    worker = next(each for each in workers if step[0] in each.children(recursive=True))
    family = worker.children(recursive=True)
    for each in (worker, *family):
        if each not in step:
            each.kill()
    until("the step has ended with its worker", lambda: not step[0].is_running())
    lines = json.loads(torch.load(state, weights_only=True, map_location="cpu")["history"])[0]
    assert airflow.ended(run) == "success"
    assert airflow.task(run, "finetune")["try_number"] == 2
    adapter = state.parents[1] / "adapter"
    trained = [json.loads(line) for line in (adapter / "training.jsonl").read_text().splitlines()]
    assert len(trained) > len(lines) > 0
    assert trained[: len(lines)] == lines, "these steps, with their seconds, are those before the kill"


def test_all_of_it_ends_when_it_is_told_to_and_only_its_user_reads_its_secrets(airflow: Airflow) -> None:
    parts = psutil.Process(airflow.process.pid).children(recursive=True)
    assert {
        connection.laddr.ip for each in parts for connection in each.net_connections() if not connection.raddr
    } <= {"127.0.0.1"}
    for name in ("secrets.json", "passwords.json"):
        assert (airflow.folder / "var" / "airflow" / name).stat().st_mode & 0o077 == 0
    airflow.stop()
    assert airflow.process.returncode == 0
    assert not [each for each in parts if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
