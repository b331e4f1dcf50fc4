"""`python -m grpc_server events`: what was done, by whom, for a person and for a script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from grpc_server import store_cli
from grpc_server.events_cli import app
from grpc_server.tokens_cli import app as tokens
from tests.integration.conftest_log import dsn, empty_dsn, postgres

__all__ = ["dsn", "empty_dsn", "postgres"]


@pytest.fixture(autouse=True)
def settings(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTLOOP_DATABASE_URL", dsn)
    monkeypatch.setenv("AGENTLOOP_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["list", *arguments])


def test_what_was_done_to_tokens_is_listed_with_who_did_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "[bold]root")
    made = CliRunner().invoke(tokens, ["create", "--name", "billing", "--scopes", "infer", "--json"])
    token = json.loads(made.stdout)
    key_id = token["key_id"]
    CliRunner().invoke(tokens, ["limit", key_id, "--requests-per-minute", "7"])
    CliRunner().invoke(tokens, ["revoke", key_id])
    events = json.loads(run("--json").stdout)
    assert [(event["kind"], event["actor"], event["subject"]) for event in events] == [
        ("token_created", "[bold]root", key_id),
        ("token_limited", "[bold]root", key_id),
        ("token_revoked", "[bold]root", key_id),
    ]
    assert events[0]["detail"]["name"] == "billing"
    assert events[1]["detail"]["limits"]["requests_per_minute"] == 7
    assert token["token"][16:] not in run("--json").stdout
    table = run("--since", "1h").stdout
    assert "token_revoked" in table
    assert "[bold]root" in table
    assert [e["kind"] for e in json.loads(run("--kind", "token_limited", "--json").stdout)] == [
        "token_limited"
    ]
    assert [e["kind"] for e in json.loads(run("--limit", "1", "--json").stdout)] == ["token_revoked"]


def test_a_user_without_a_name_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert store_cli.operator() == "unknown"


@pytest.mark.parametrize("since", ["yesterday", "999999w"])
def test_a_wrong_time_says_what_is_wrong(since: str) -> None:
    result = run("--since", since)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
