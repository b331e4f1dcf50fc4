"""One night from the terminal: where Airflow's database is, what is shown, what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

HOME = Path(__file__).resolve().parents[2]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM)
PYTHON = (sys.executable, "-S", "-c")  # without site-packages: nothing in it traces the process
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "


@pytest.fixture(scope="module")
def night() -> ModuleType:
    spec = importlib.util.spec_from_file_location("night", HOME / "scripts" / "night.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def url(night: ModuleType, *arguments: Any) -> str:
    return str(night.database_url(*arguments).render_as_string(hide_password=False))


def test_airflows_own_address_comes_first(night: ModuleType) -> None:
    own = "postgresql+psycopg://u:p@db:5433/af"
    assert url(night, own, "postgresql://x@y/z", Path("/nowhere")) == own


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://postgres@/agentloop?host=/run/a%20b&port=5433",
        "host='/run/a b' port=5433 user=postgres dbname=agentloop",
    ],
)
def test_else_it_is_the_database_beside_the_services(night: ModuleType, dsn: str) -> None:
    found = night.database_url("", dsn, Path("/nowhere"))
    assert (found.drivername, found.database, found.username) == ("postgresql+psycopg", "airflow", "postgres")
    assert (found.host, found.port, found.query["host"]) == (None, 5433, "/run/a b")


def test_a_cluster_over_the_network_keeps_its_host_password_and_options(night: ModuleType) -> None:
    found = url(night, "", "postgresql://me:s%40cret@db.internal/agentloop?sslmode=require", Path("/nowhere"))
    assert found == "postgresql+psycopg://me:s%40cret@db.internal/airflow?sslmode=require"


def test_else_it_is_the_postgres_in_the_state_folder(night: ModuleType, tmp_path: Path) -> None:
    cluster = tmp_path / "postgres" / "cluster"
    cluster.mkdir(parents=True)
    (cluster / "postmaster.pid").write_text("12\n/data\n1700000000\n5432\n/run/sockets\n\n 1 2\nready\n")
    found = night.database_url("", "", tmp_path)
    assert (found.database, found.port, found.query["host"]) == ("airflow", 5432, "/run/sockets")


@pytest.mark.parametrize(
    ("airflow_url", "dsn", "message"),
    [
        ("", "", "no Postgres runs in"),
        ("not a url", "", "cannot be read"),
        ("", "nonsense here", "cannot be read"),
    ],
)
def test_an_address_that_leads_nowhere_is_told(
    night: ModuleType, tmp_path: Path, airflow_url: str, dsn: str, message: str
) -> None:
    with pytest.raises(night.NightError, match=message):
        night.database_url(airflow_url, dsn, tmp_path)


def test_a_cluster_that_does_not_answer_is_told_without_its_password(night: ModuleType) -> None:
    address = night.database_url("postgresql+psycopg://u:secret@127.0.0.1:1/af", "", Path())
    with pytest.raises(night.NightError, match="is of no use") as error:
        night.ensure_database(address)
    assert "secret" not in str(error.value)


def test_airflow_tells_nobody_and_keeps_its_files_in_the_state_folder(
    night: ModuleType, tmp_path: Path
) -> None:
    address = night.database_url("postgresql+psycopg://postgres@/airflow?host=/run/a b", "", tmp_path)
    environment = night.airflow_environment(address, tmp_path)
    assert environment["AIRFLOW_HOME"] == str(tmp_path / "airflow")
    assert environment["AIRFLOW__CORE__LOAD_EXAMPLES"] == "False"
    assert environment["AIRFLOW__USAGE_DATA_COLLECTION__ENABLED"] == "False"
    assert environment["SCARF_ANALYTICS"] == "false"
    assert environment["AGENTLOOP_HOME"] == str(HOME)


def test_a_server_on_a_port_of_its_own_is_found_by_what_it_announced(
    night: ModuleType, tmp_path: Path
) -> None:
    announced = {"grpc_url": "grpcs://127.0.0.1:4001", "http_url": "https://127.0.0.1:4002", "pid": 1}
    (tmp_path / "server.json").write_text(json.dumps(announced))
    assert night.server_environment(tmp_path, {"AGENTLOOP_TOKEN": "al_x"}) == {
        "AGENTLOOP_SERVER": "grpcs://127.0.0.1:4001",
        "AGENTLOOP_METRICS_URL": "https://127.0.0.1:4002/metrics",
    }
    given = {"AGENTLOOP_TOKEN": "al_x", "AGENTLOOP_SERVER": "elsewhere:1"}
    assert "AGENTLOOP_SERVER" not in night.server_environment(tmp_path, given)


def test_without_an_announcement_the_steps_use_their_own_defaults(night: ModuleType, tmp_path: Path) -> None:
    assert night.server_environment(tmp_path, {"AGENTLOOP_TOKEN_FILE": "/t"}) == {}
    (tmp_path / "server.json").write_text("{")
    assert night.server_environment(tmp_path, {"AGENTLOOP_TOKEN_FILE": "/t"}) == {}


def run(night: ModuleType, arguments: list[str], **environment: str) -> Any:
    cleared: dict[str, str | None] = {name: None for name in os.environ if name.startswith("AGENTLOOP_")}
    return CliRunner().invoke(night.app, arguments, env={**cleared, **environment})


def test_a_night_without_a_token_ends_before_it_begins(night: ModuleType, tmp_path: Path) -> None:
    result = run(night, ["--state-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "no token for the live server: set AGENTLOOP_TOKEN_FILE" in result.output


def test_a_cycle_that_is_none_is_refused(night: ModuleType, tmp_path: Path) -> None:
    result = run(night, ["--state-dir", str(tmp_path), "--cycle", "../x"], AGENTLOOP_TOKEN="t")
    assert result.exit_code == 1
    assert "it must be like 20260102T030405Z" in result.output


@pytest.mark.parametrize("code", [0, 3, -15])
def test_the_last_line_is_the_cycle_directory_and_the_exit_code_is_the_runs(
    night: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    begun: dict[str, Any] = {}

    def foreground(command: list[str], environment: dict[str, str], log: Path) -> int:
        begun.update(command=command, environment=environment, log=log)
        return code

    monkeypatch.setattr(night, "_foreground", foreground)
    monkeypatch.setattr(night, "ensure_database", lambda url: None)
    arguments = [
        "--state-dir",
        str(tmp_path),
        "--cycles-dir",
        str(tmp_path / "é & b"),
        "--cycle",
        "20260102T030405Z",
    ]
    result = run(
        night, arguments, AGENTLOOP_TOKEN="t", AGENTLOOP_AIRFLOW_DATABASE_URL="postgresql+psycopg://u@h/a"
    )
    assert result.output.splitlines()[-1] == str(tmp_path / "é & b" / "20260102T030405Z")
    assert result.exit_code == (1 if code else 0)
    assert json.loads(begun["command"][-1]) == {"cycle_id": "20260102T030405Z"}
    assert begun["environment"]["AGENTLOOP_CYCLES_DIR"] == str(tmp_path / "é & b")
    assert begun["log"] == tmp_path / "airflow" / "nights" / "20260102T030405Z.jsonl"


# What is shown.


def line(event: str, logger: str = "task", level: str = "info", **more: Any) -> str:
    return json.dumps({"event": event, "logger": logger, "level": level, **more})


def test_a_steps_own_lines_are_shown_and_airflows_are_not(night: ModuleType) -> None:
    told = night.Told()
    hook = "airflow.task.hooks.airflow.providers.standard.hooks.subprocess.SubprocessHook"
    lines = [
        line("[DAG TEST] starting task_id=freeze map_index=-1", "airflow.sdk.definitions.dag"),
        line("Running command: ['/usr/bin/bash']", hook),
        line("Output:", hook),
        line("froze 240 rows", hook),
        line("Command exited with return code 0", hook),
        line("Task instance state updated"),
        line("Skipping task.", reason="the gate says fail: no better"),
        line(
            "Task failed",
            level="error",
            error_detail=[{"exc_type": "AirflowException", "exc_value": "code 1"}],
        ),
        "a traceback of no logger",
        "3",
    ]
    assert [shown for each in lines if (shown := told.shown(each))] == [
        "── freeze",
        "   froze 240 rows",
        "   skipped: the gate says fail: no better",
        "   Task failed; AirflowException: code 1",
        "a traceback of no logger",
        "3",
    ]


def test_all_of_the_output_is_kept_and_the_exit_code_is_passed_on(
    night: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    program = "import sys; print('{\"event\": \"quiet\"}'); print('plain'); sys.exit(4)"
    log = tmp_path / "a" / "night.jsonl"
    try:
        assert night._foreground([*PYTHON, program], dict(os.environ), log) == 4
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert log.read_text() == '{"event": "quiet"}\nplain\n'
    assert capsys.readouterr().out == "plain\n"


@pytest.mark.parametrize(("program", "number"), [("", signal.SIGTERM), (DEAF, signal.SIGKILL)])
def test_the_end_of_the_command_is_the_end_of_what_it_started(
    night: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, number: signal.Signals
) -> None:
    monkeypatch.setattr(night, "GRACE_SECONDS", 1)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    log = tmp_path / "night.jsonl"

    def interrupt() -> None:
        while not (log.exists() and log.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    program += "import time; print('begun', flush=True); time.sleep(60)"
    try:
        assert night._foreground([*PYTHON, program], dict(os.environ), log) == -number
    finally:
        thread.join()
        for each, handler in before.items():
            signal.signal(each, handler)
