"""`python -m grpc_server tokens`: made once, shown once, listed without secrets, revoked for good."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner, Result

from grpc_server.adapters import postgres as postgres_module
from grpc_server.adapters.credentials import CachedAuthenticator
from grpc_server.adapters.local_postgres import LocalPostgres
from grpc_server.adapters.postgres import PostgresStore
from grpc_server.domain.errors import Unauthenticated
from grpc_server.tokens_cli import app, duration, scopes
from tests.integration.conftest_log import dsn, empty_dsn, postgres

__all__ = ["dsn", "empty_dsn", "postgres"]


@pytest.fixture(autouse=True)
def settings(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTLOOP_DATABASE_URL", dsn)
    monkeypatch.setenv("AGENTLOOP_STATE_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def made(*more: str) -> dict[str, Any]:
    result = run("create", "--name", "billing", "--scopes", "infer,feedback", "--json", *more)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


async def is_let_in(dsn: str, token: str, tmp_path: Path) -> bool:
    store = PostgresStore(dsn)
    await store.open()
    authenticator = CachedAuthenticator(store, tmp_path / "tokens.json", 60)
    await authenticator.start()
    try:
        await authenticator.authenticate(token)
    except Unauthenticated:
        return False
    finally:
        await authenticator.close()
        await store.close()
    return True


async def test_a_token_that_was_made_is_let_in_until_it_is_revoked(dsn: str, tmp_path: Path) -> None:
    token = await asyncio.to_thread(made)
    assert await is_let_in(dsn, token["token"], tmp_path)
    result = await asyncio.to_thread(run, "revoke", token["key_id"])
    assert (result.exit_code, result.stdout) == (0, f"{token['key_id']} is revoked\n")
    assert not await is_let_in(dsn, token["token"], tmp_path)


def test_the_token_alone_is_printed_and_the_rest_is_for_the_person() -> None:
    result = run("create", "--name", "billing", "--scopes", "infer")
    assert result.stdout.strip().count("\n") == 0
    assert result.stdout.startswith("al_")
    assert "only time it is shown" in result.stderr


def test_no_secret_is_stored_or_listed(dsn: str) -> None:
    secret = made()["token"][16:]
    assert secret not in run("list", "--json").output
    assert secret not in run("list").output
    with psycopg.connect(dsn) as connection:
        assert secret not in str(connection.execute("SELECT * FROM api_token").fetchall())


def test_the_list_tells_what_is_in_force(dsn: str) -> None:
    forever, later, gone, revoked = made(), made("--expires-in", "30d"), made("--expires-in", "1s"), made()
    with psycopg.connect(dsn) as connection:
        connection.execute(
            "UPDATE api_token SET expires_at = now() - interval '1 s' WHERE key_id = %s", (gone["key_id"],)
        )
    run("revoke", revoked["key_id"])
    listed = {one["key_id"]: one for one in json.loads(run("list", "--json").stdout)}
    states = {key_id: one["state"] for key_id, one in listed.items()}
    assert states == {
        forever["key_id"]: "in force",
        later["key_id"]: "in force",
        gone["key_id"]: "expired",
        revoked["key_id"]: "revoked",
    }
    assert listed[later["key_id"]]["scopes"] == ["feedback", "infer"]
    expires = datetime.fromisoformat(listed[later["key_id"]]["expires_at"])
    assert timedelta(days=29) < expires - datetime.now(UTC) < timedelta(days=31)
    table = run("list").stdout
    for word in ("billing", "never", "in force", "expired", "revoked", forever["key_id"]):
        assert word in table


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--scopes", "infer,fly"], "'fly' is no scope; there are: infer, feedback"),
        (["--scopes", " , "], "no scope is given"),
        (["--scopes", "infer", "--expires-in", "soon"], "'soon' is not a duration"),
        (["--scopes", "infer", "--expires-in", "999999w"], "'999999w' ends after the year 9999"),
        (["--scopes", "infer", "--name", ""], "is not a name"),
        (["--scopes", "infer", "--name", "x" * 101], "is not a name"),
        (["--scopes", "infer", "--name", "a\nb"], "is not a name"),
    ],
)
def test_a_wrong_option_says_what_is_wrong(arguments: list[str], says: str) -> None:
    result = run("create", "--name", "billing", *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stdout == ""


def test_limits_are_given_listed_changed_one_by_one_and_lifted() -> None:
    token = made("--requests-per-minute", "10", "--tokens-per-minute", "2000", "--aliases", "default, agent")
    assert token["limits"] == {
        "requests_per_minute": 10,
        "tokens_per_minute": 2000,
        "concurrent_streams": None,
        "aliases": ["agent", "default"],
    }
    assert "10 requests/min, 2000 tokens/min, only agent default" in run("list").stdout
    changed = run("limit", token["key_id"], "--concurrent-streams", "2", "--tokens-per-minute", "0", "--json")
    assert json.loads(changed.stdout) == {
        "key_id": token["key_id"],
        "limits": {**token["limits"], "concurrent_streams": 2, "tokens_per_minute": None},
    }
    lifted = run("limit", token["key_id"], "--aliases", "*")
    assert lifted.stdout == f"{token['key_id']}: 10 requests/min, 2 streams\n"
    (listed,) = json.loads(run("list", "--json").stdout)
    assert (listed["limits"]["aliases"], listed["limits"]["requests_per_minute"]) == (None, 10)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nothing to change is given"),
        (["--aliases", "Default"], "alias is 'Default'; it must be"),
        (["--aliases", ""], "alias is ''; it must be"),
        (["--requests-per-minute", "-1"], "--requests-per-minute"),
        (["--tokens-per-minute", "9999999999"], "--tokens-per-minute"),
    ],
)
def test_a_wrong_limit_says_what_is_wrong(arguments: list[str], says: str) -> None:
    result = run("limit", made()["key_id"], *arguments)
    assert result.exit_code == 2
    assert says in result.stderr


def test_limiting_what_is_not_in_force_fails() -> None:
    assert run("limit", "nobody", "--requests-per-minute", "1").exit_code == 1
    token = made()
    run("revoke", token["key_id"])
    result = run("limit", token["key_id"], "--requests-per-minute", "1")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "there is no token" in result.stderr


def test_revoking_what_is_not_in_force_fails() -> None:
    assert run("revoke", "nobody").exit_code == 1
    token = made()
    assert json.loads(run("revoke", token["key_id"], "--json").stdout)["revoked"] is True
    again = run("revoke", token["key_id"], "--json")
    assert again.exit_code == 1
    assert json.loads(again.stdout)["revoked"] is False


@pytest.mark.parametrize(
    ("options", "learning", "text", "shown"),
    [
        ((), True, True, "learned"),
        (("--no-learning",), False, True, "not"),
        (("--no-text",), False, False, "no"),
    ],
)
def test_a_caller_may_be_kept_out_of_the_nights_or_without_text(
    options: tuple[str, ...], learning: bool, text: bool, shown: str
) -> None:
    token = made(*options)
    assert (token["learning"], token["text"]) == (learning, text)
    assert (json.loads(run("list", "--json").stdout)[0]["learning"]) is learning
    assert shown in run("list").stdout


def test_a_database_that_is_down_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_module, "CONNECT_SECONDS", 1)
    monkeypatch.setenv("AGENTLOOP_DATABASE_URL", "postgresql://postgres@127.0.0.1:9/agentloop")
    result = run("list")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the database does not answer")


def test_a_database_that_is_not_migrated_says_what_to_do(
    empty_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTLOOP_DATABASE_URL", empty_dsn)
    assert "grpc_server migrate" in run("list").stderr


def test_a_wrong_setting_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTLOOP_PARALLEL", "many")
    result = run("list")
    assert result.exit_code == 2
    assert "AGENTLOOP_PARALLEL" in result.stderr


def test_without_a_database_set_the_local_one_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AGENTLOOP_DATABASE_URL", "")
    monkeypatch.setenv("AGENTLOOP_STATE_DIR", str(tmp_path / "état & co"))
    token = made()
    assert json.loads(run("list", "--json").stdout)[0]["key_id"] == token["key_id"]
    assert LocalPostgres(tmp_path / "état & co" / "postgres").pid is None  # it ended with the command


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("45m", 2700), ("12h", 43200), (" 30d ", 2592000), ("2w", 1209600)]
)
def test_durations_are_a_number_and_a_unit(text: str, seconds: int) -> None:
    assert duration(text).total_seconds() == seconds


@pytest.mark.parametrize("text", ["", "d", "30", "0d", "-1d", "1.5h", "1y", "30 d", "9999999d"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        duration(text)


def test_scopes_are_names_by_commas() -> None:
    assert {str(scope) for scope in scopes("infer, models:read")} == {"infer", "models:read"}
