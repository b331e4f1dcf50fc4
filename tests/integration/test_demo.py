"""The demo from end to end on a real server, Postgres and engine; only its night is a stand-in."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from demo.conductor import conduct
from demo.failure import LinkError
from demo.plan import HOME, Plan
from demo.processes import MARK
from demo.screen import Screen
from grpc_server.adapters.local_postgres import LocalPostgres
from tests.unit.test_demo_pieces import NAMES

STAND_INS = HOME / "tests" / "integration"
ENOUGH_FOR_EACH_MISHAP = 7  # where every second request goes wrong
NIGHT = (sys.executable, str(STAND_INS / "night_stand_in.py"))
FAKE_ENGINE = (sys.executable, str(STAND_INS / "server_stand_in.py"))  # all else of it is real
TRACING = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of ours reaches the demo's programs; other tests run the same, for coverage to trace."""
    for name in [name for name in os.environ if name.startswith(("AGENTLOOP_", "COVERAGE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(HOME))


@pytest.fixture(scope="module")
def plan(places: Callable[[str], Path], cluster: Callable[[Path], Path], base_gguf: Path) -> Iterator[Plan]:
    """One state folder for all, as on a machine where the demo is run again and again."""
    place = places("a démo & its state")
    cluster(place / "var" / "postgres")
    yield Plan(
        state_dir=place / "var",
        cycles_dir=place / "cycles",
        base_gguf=base_gguf,
        requests=2,
        traffic_seconds=0,
        night=(*NIGHT, "inconclusive"),
    )
    assert started_by(place / "var") == []


def started_by(state_dir: Path) -> list[int]:
    """What still runs of a demo on that folder, and its Postgres, which knows nothing of the demo."""
    postmaster = LocalPostgres(state_dir / "postgres").pid
    left = [] if postmaster is None else [postmaster]
    for process in psutil.process_iter():
        try:
            ours = process.environ().get(MARK) == str(state_dir) or str(state_dir) in process.cmdline()
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process.pid)
        except psutil.Error:
            continue
    return left


async def run(plan: Plan) -> tuple[Path, str]:
    """One demo: its demo.json, and what it showed."""
    console = Console(file=io.StringIO(), width=120)
    path = await conduct(plan, Screen(console))
    return path, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.slow
async def test_a_demo_shows_its_figures_and_leaves_nothing_running(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demo.traffic.MISHAP_EVERY", 2)
    install = (sys.executable, "-c", "import time; print('building', flush=True); time.sleep(1)")
    path, shown = await run(replace(plan, requests=ENOUGH_FOR_EACH_MISHAP, install=install))
    figures = json.loads(path.read_text())
    assert set(figures) >= NAMES
    assert figures["requests"] >= ENOUGH_FOR_EACH_MISHAP
    assert figures["requests_failed"] == 0, shown
    assert 0 < figures["ttft_p50_ms"] <= figures["ttft_p95_ms"]
    assert figures["rows_accepted"] == figures["rows_logged"] >= ENOUGH_FOR_EACH_MISHAP
    assert figures["verdict"] == "inconclusive"
    assert figures["route_before"] == figures["route_after"]
    assert figures["route_before"][0]["model_version"] == "gemma-3-270m:base"
    assert 0.3 < figures["peak_memory_gb"] < 8
    assert (figures["examples_kept"], figures["candidate_accuracy"]) == (24, 0.1)
    for text in (
        "the first answer streamed",
        "1 cancelled, 1 malformed, 1 timed out",
        "report.html",
        "0.10 (",
    ):
        assert text in shown
    assert started_by(plan.state_dir) == []


@pytest.mark.slow
async def test_a_night_that_fails_names_its_step_its_log_and_what_to_do(plan: Plan) -> None:
    with pytest.raises(LinkError) as caught:
        await run(replace(plan, server=FAKE_ENGINE, night=(*NIGHT, "fail")))
    text = str(caught.value)
    assert "night, step curate" in text
    assert "exit code 3" in text
    assert "no space left on device" in text
    assert str(plan.log_dir / "night.log") in text
    assert started_by(plan.state_dir) == []


@pytest.mark.slow
async def test_a_night_that_few_new_questions_teach_too_little_ends_well_and_says_why(plan: Plan) -> None:
    path, shown = await run(replace(plan, server=FAKE_ENGINE, night=(*NIGHT, "skip")))
    assert json.loads(path.read_text())["verdict"] == "skipped"
    assert "skipped at curate: 3 new training examples, 32 needed" in shown


@pytest.mark.slow
async def test_a_server_that_dies_is_named(plan: Plan) -> None:
    with pytest.raises(LinkError) as caught:
        await run(replace(plan, server=FAKE_ENGINE, night=(*NIGHT, "kill")))
    assert str(caught.value).startswith("server: it ended, with exit code -9")
    assert started_by(plan.state_dir) == []


@pytest.mark.slow
async def test_an_installation_that_fails_ends_the_demo(plan: Plan) -> None:
    install = (sys.executable, "-c", "import sys; sys.exit('no matching distribution')")
    with pytest.raises(LinkError) as caught:
        await run(replace(plan, server=FAKE_ENGINE, install=install))
    assert str(caught.value).startswith("installation: it ended with exit code 1")
    assert "no matching distribution" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
async def test_a_signal_ends_the_demo_and_all_that_it_started(
    plan: Plan, number: signal.Signals, code: int
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "demo", "--requests", "100", "--night-python", "false"),
        cwd=HOME,
        env=os.environ
        | (TRACING if number is signal.SIGTERM else {})  # nothing else runs `demo/__main__.py`
        | {
            "AGENTLOOP_STATE_DIR": str(plan.state_dir),
            "AGENTLOOP_CYCLES_DIR": str(plan.cycles_dir),
            "AGENTLOOP_BASE_GGUF": str(plan.base_gguf),
        },
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(120):
        while b"2 of 4" not in await process.stdout.readline():
            pass
    assert started_by(plan.state_dir) != []
    process.send_signal(number)
    process.send_signal(number)  # an impatient second one changes nothing
    async with asyncio.timeout(60):
        assert await process.wait() == code
    assert started_by(plan.state_dir) == []


@pytest.mark.slow
async def test_two_demos_do_not_share_a_state_folder(plan: Plan) -> None:
    first = asyncio.create_task(run(plan))
    await asyncio.sleep(0)
    try:
        with pytest.raises(LinkError, match="another demo uses"):
            await run(plan)
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


# What breaks before anything serves: a server that is a script.

SCRIPT = """#!/bin/sh
case "$1 $BREAKS" in
  "postgres postgres") echo "initdb: no space left" >&2; exit 1;;
  postgres*) echo postgresql:///agentloop; exec sleep 600;;
  "migrate migrate") echo "relation exists" >&2; exit 1;;
  migrate*) exit 0;;
  tokens*) echo '{"token": "al_x"}';;
  *) echo "cannot bind" >&2; exit 1;;
esac
"""


@pytest.mark.parametrize(
    ("breaks", "link", "reason"),
    [
        ("postgres", "Postgres: it did not start", "no space left"),
        ("migrate", "migrate: it ended with exit code 1", "relation exists"),
        ("serve", "server: it ended at its start", "cannot bind"),
    ],
)
async def test_what_breaks_at_the_start_is_named_with_the_end_of_its_log(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: str, link: str, reason: str
) -> None:
    script = tmp_path / "server.sh"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    monkeypatch.setenv("BREAKS", breaks)
    with pytest.raises(LinkError) as caught:
        await run(replace(plan, state_dir=tmp_path / "var", server=(str(script),)))
    assert str(caught.value).startswith(link)
    assert reason in str(caught.value)
    assert started_by(tmp_path / "var") == []
