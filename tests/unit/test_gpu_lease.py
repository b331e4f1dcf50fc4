"""A training on a GPU that serving has lent ends in time, whatever becomes of whom."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import psutil
import pytest
from typer.testing import CliRunner

from agentloop.errors import NotFound, ResourceExhausted, Unavailable
from agentloop.types import GpuLease
from training import lease, with_gpu
from training.lease import Until

ROOT = Path(__file__).parents[2]
PYTHON = (sys.executable, "-c")
SLEEPS = "import time; time.sleep(600)"


class FakeLender:
    """Lends for `seconds` at a time; `fail` is raised by each renewal."""

    def __init__(self, seconds: float = 30.0, fail: Exception | None = None) -> None:
        self.seconds = seconds
        self.fail = fail
        self.holders: list[str] = []
        self.renewals = 0
        self.released: list[str] = []
        self.deaf = False

    def lease_gpu(self, holder: str) -> GpuLease:
        self.holders.append(holder)
        return self._lease()

    def renew_gpu_lease(self, lease_id: str, *, timeout_s: float) -> GpuLease:
        self.renewals += 1
        if self.fail is not None:
            raise self.fail
        return self._lease()

    def release_gpu_lease(self, lease_id: str, *, timeout_s: float) -> bool:
        if self.deaf:
            raise Unavailable(grpc.StatusCode.UNAVAILABLE, "no server")
        self.released.append(lease_id)
        return True

    def _lease(self) -> GpuLease:
        return GpuLease("id", "us", self.seconds, 500.0, self.seconds)


def ran(code: str, lender: FakeLender) -> tuple[int, list[str]]:
    said: list[str] = []
    return with_gpu.run([*PYTHON, code], lender, os.environ, said.append), said


def test_a_command_that_ends_gives_the_gpu_back_and_its_exit_code_is_ours() -> None:
    lender = FakeLender()
    code, said = ran("raise SystemExit(3)", lender)
    assert (code, lender.released) == (3, ["id"])
    assert f"(process {os.getpid()})" in lender.holders[0]
    assert said[0] == "the GPU is ours, for 500 s at most"
    assert said[1].startswith("the GPU is given back after ")


def test_a_lease_is_renewed_while_the_command_runs() -> None:
    lender = FakeLender(2.0)
    code, _ = ran("import time; time.sleep(1)", lender)
    assert code == 0
    assert lender.renewals >= 1


def test_a_lease_that_is_over_ends_the_command_and_all_that_it_started(tmp_path: Path) -> None:
    over = NotFound(grpc.StatusCode.NOT_FOUND, "the lease is over")
    pid = tmp_path / "pid"
    starts = (
        "import subprocess, sys, pathlib;"
        f" child = subprocess.Popen([sys.executable, '-c', {SLEEPS!r}], start_new_session=True);"
        f" pathlib.Path({str(pid)!r}).write_text(str(child.pid)); child.wait()"
    )
    code, said = ran(starts, FakeLender(2.0, over))
    assert code == lease.LOST
    assert "the GPU is serving's again: the command is ended; start it again" in said
    if pid.exists():  # it may have been ended before it came to that
        assert not psutil.pid_exists(int(pid.read_text()))


def test_a_server_that_is_away_costs_the_lease_only_when_it_would_have_ended() -> None:
    away = Unavailable(grpc.StatusCode.UNAVAILABLE, "no server there")
    lender = FakeLender(2.0, away)
    lender.deaf = True
    code, said = ran(SLEEPS, lender)
    assert code == lease.LOST
    assert any(
        re.fullmatch("the lease of the GPU was not renewed, and lasts -?[01] s more: .*", each)
        for each in said
    )
    assert said[-1] == "the GPU was not given back; serving takes it by itself: UNAVAILABLE: no server"


def test_a_command_that_does_not_listen_is_killed() -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    code, _ = ran(deaf, FakeLender(2.0, NotFound(grpc.StatusCode.NOT_FOUND, "over")))
    assert code == lease.LOST


def test_a_wish_to_end_ends_the_command_first_and_gives_the_gpu_back() -> None:
    lender = FakeLender()
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    code, _ = ran(SLEEPS, lender)
    assert (code, lender.released) == (128 + signal.SIGTERM, ["id"])


def test_a_gpu_that_somebody_has_runs_nothing() -> None:
    class Taken(FakeLender):
        def lease_gpu(self, holder: str) -> GpuLease:
            raise ResourceExhausted(grpc.StatusCode.RESOURCE_EXHAUSTED, "lent to another")

    lender = Taken()
    with pytest.raises(ResourceExhausted, match="lent to another"):
        ran("raise SystemExit(0)", lender)
    assert lender.released == []


def test_without_a_lease_a_training_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(lease.VARIABLE, raising=False)
    before = threading.active_count()
    lease.end_when_over()
    assert (lease.over(), threading.active_count()) == (False, before)


@pytest.mark.parametrize("content", [None, b"", b"12", b"a b", b"\0\0", b"1 2 3"])
def test_a_file_that_is_lost_or_damaged_is_a_lost_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    file = tmp_path / "until"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv(lease.VARIABLE, str(file))
    assert lease.over()
    Until(time.monotonic() + 60, time.monotonic() + 70).write(file)
    assert not lease.over()


def test_a_process_whose_holder_was_killed_ends_itself(tmp_path: Path) -> None:
    file = tmp_path / "until"
    Until(time.monotonic(), time.monotonic() + 0.3).write(file)
    done = subprocess.run(
        [*PYTHON, f"from training import lease; lease.end_when_over(); {SLEEPS}"],
        cwd=ROOT,
        env={**os.environ, lease.VARIABLE: str(file)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == lease.LOST
    assert done.stderr == "the lease of the GPU is over: this training ends; start it again\n"


def test_a_thread_of_it_ends_a_process_whose_step_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = threading.Event()
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    file = tmp_path / "until"
    Until(time.monotonic(), time.monotonic() + 0.05).write(file)
    monkeypatch.setenv(lease.VARIABLE, str(file))
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr("os._exit", end)
    lease.end_when_over()
    assert ended.wait(10)
    assert codes == [lease.LOST]
    assert "the lease of the GPU is over" in capsys.readouterr().err


def test_finetune_asks_for_the_gpu_where_the_setting_says_so_and_tells_why_it_cannot_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.__main__ import app

    monkeypatch.setenv("AGENTLOOP_GPU_HANDOVER", "drain")
    monkeypatch.setenv("AGENTLOOP_SERVER", "grpc://127.0.0.1:1")
    monkeypatch.setenv("AGENTLOOP_TOKEN", "al_x")
    monkeypatch.delenv(lease.VARIABLE, raising=False)
    found = CliRunner().invoke(app, ["finetune", "--cycle", str(tmp_path)])
    assert found.exit_code == 1
    assert "Unavailable: UNAVAILABLE" in found.output


def test_the_wrapper_ends_as_its_command_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from training import gpu_cli
    from training.__main__ import app

    asked: list[list[str]] = []

    def run(command: list[str], *_: object) -> int:
        asked.append(command)
        return -9

    monkeypatch.setattr(with_gpu, "run", run)
    words = [
        "with-gpu",
        "--server",
        "grpc://127.0.0.1:1",
        "--token",
        "al_x",
        "--",
        "accelerate",
        "launch",
        "-m",
    ]
    assert CliRunner().invoke(app, words).exit_code == 137
    assert asked == [["accelerate", "launch", "-m"]]
    monkeypatch.setenv(lease.VARIABLE, "a file")
    monkeypatch.setenv("AGENTLOOP_GPU_HANDOVER", "drain")
    assert not gpu_cli.wanted()
