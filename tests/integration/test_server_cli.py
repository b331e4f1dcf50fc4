"""`python -m grpc_server`: what it prints, and its exit codes."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from typer.testing import CliRunner

from grpc_server import bootstrap
from grpc_server.__main__ import app, main
from grpc_server.settings import Settings
from tests.live_server import ROOT

runner = CliRunner()


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No setting from the outside; and what `serve` makes of the process's log ends with the test."""
    for name in [name for name in os.environ if name.startswith("AGENTLOOP_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers).difference(handlers):
        root.removeHandler(handler)
    root.setLevel(level)


def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **{f"AGENTLOOP_{name.upper()}": value for name, value in settings.items()}}
    return subprocess.run(
        [sys.executable, "-m", "grpc_server", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_its_commands_are_listed_with_a_line_each() -> None:
    shown = run("--help").stdout
    for command in ("serve", "config", "migrate", "postgres", "tokens"):
        assert f" {command} " in shown
    assert "create" in run("tokens", "--help").stdout


def test_config_prints_every_setting_with_its_origin_and_masks_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AGENTLOOP_DATABASE_URL", "postgresql://u:hush@db/x")
    monkeypatch.setenv("AGENTLOOP_PARALLEL", "7")
    shown = runner.invoke(app, ["config"])
    assert shown.exit_code == 0
    lines = {line.split()[0]: line for line in shown.output.splitlines()}
    assert set(lines) == {f"AGENTLOOP_{name.upper()}" for name in Settings.model_fields}
    assert lines["AGENTLOOP_PARALLEL"].split()[1:3] == ["7", "environment"]
    assert lines["AGENTLOOP_DATABASE_URL"].split()[1] == "********"
    assert "hush" not in shown.output
    as_json = json.loads(runner.invoke(app, ["config", "--json"]).output)
    assert as_json["parallel"] == {
        "value": 7,
        "origin": "environment",
        "variable": "AGENTLOOP_PARALLEL",
        "description": "Generations at once; of each Ollama, where there are several.",
    }
    assert all(row["description"] for row in as_json.values())


@pytest.mark.parametrize("command", ["serve", "config", "migrate", "postgres"])
def test_a_wrong_setting_is_exit_code_2_and_one_line(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTLOOP_PARALLEL", "many")
    done = runner.invoke(app, [command])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: AGENTLOOP_PARALLEL is 'many': ")
    monkeypatch.setenv("AGENTLOOP_PARALLEL", "1")
    monkeypatch.setenv("AGENTLOOP_CONFIG", "/nowhere.yaml")
    done = runner.invoke(app, [command])
    assert done.exit_code == 2
    assert "AGENTLOOP_CONFIG names /nowhere.yaml" in done.stderr


def test_an_unknown_option_is_exit_code_2() -> None:
    assert runner.invoke(app, ["serve", "--fast"]).exit_code == 2


def test_serving_plaintext_beyond_this_machine_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTLOOP_GRPC_ADDRESS", "0.0.0.0:0")
    done = runner.invoke(app, ["serve"])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: grpc_address is 0.0.0.0:0, which other machines reach")


def test_being_forced_to_stop_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    async def forced(settings: Settings, *, migrate: bool) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(bootstrap, "serve", forced)
    done = runner.invoke(app, ["serve"])
    assert done.exit_code == 1
    assert "stopped by force" in done.stderr


def test_serve_passes_migrate_on_and_ends_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    async def served(settings: Settings, *, migrate: bool) -> None:
        seen.append(migrate)

    monkeypatch.setattr(bootstrap, "serve", served)
    assert runner.invoke(app, ["serve"]).exit_code == 0
    assert runner.invoke(app, ["serve", "--migrate"]).exit_code == 0
    assert seen == [False, True]


def test_migrate_says_what_it_did_or_why_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bootstrap, "migrate", lambda settings: "the database is up to date")
    assert runner.invoke(app, ["migrate"]).output == "the database is up to date\n"
    monkeypatch.undo()
    monkeypatch.setenv("AGENTLOOP_DATABASE_URL", f"postgresql://u:hush@/x?host={tmp_path}")
    done = runner.invoke(app, ["migrate"])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: the database could not be brought up to date")
    assert "hush" not in done.stderr


def test_postgres_keeps_a_database_until_it_is_told_to_stop(places: Callable[[str], Path]) -> None:
    place = places("kept by hand")
    process = subprocess.Popen(
        [sys.executable, "-m", "grpc_server", "postgres", "--data-dir", str(place)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    dsn = process.stdout.readline().strip()
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(dsn)


def test_a_postgres_that_cannot_start_is_exit_code_1(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    done = runner.invoke(app, ["postgres", "--data-dir", str(blocked / "db")])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")


def test_main_adds_tokens_and_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["grpc_server", "tokens", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "revoke" in capsys.readouterr().out
