"""`agent-loop top` against a server on real ports."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from agentloop.cli import app
from tests.certificates import Authority
from tests.integration.grpc_bench import Bench


async def call(
    bench: Bench, *arguments: str, token: str = "al_read", tls: Sequence[str] | None = None
) -> Result:
    assert bench.running is not None
    schemes = ("", "") if tls is None else ("grpcs://", "https://")
    line = ["--server", schemes[0] + bench.running.grpc_address, "--token", token, *(tls or ()), "top"]
    line += ["--http", schemes[1] + bench.running.http_address, *arguments]
    return await asyncio.to_thread(CliRunner().invoke, app, line)


async def test_one_look_is_json_for_scripts(tmp_path: Path) -> None:
    async with Bench().run(tmp_path) as bench:
        await bench.chat()
        result = await call(bench, "--once", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["requests"] == {"ok": 1}
    assert found["models"][0]["name"] == "gemma-3-270m:base"
    assert (found["engine_up"], found["queued"], found["seconds"]) == (True, 0, None)


async def test_one_look_is_a_page_for_people(tmp_path: Path) -> None:
    async with Bench().run(tmp_path) as bench:
        await bench.chat()
        shown = (await call(bench, "--once")).stdout
        assert "first token" in shown
        assert "gemma-3-270m:base" in shown
        shown = (await call(bench, "--once", token="al_infer")).stdout
        assert "models are not shown: PERMISSION_DENIED" in shown
        assert json.loads((await call(bench, "--once", "--json", token="al_infer")).stdout)["models"] is None


def until(looks: int, between: Callable[[], None] = lambda: None) -> Callable[[float], None]:
    """A sleep that takes no time, and is Ctrl-C after as many looks."""
    left = [looks]

    def sleep(seconds: float) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        between()

    return sleep


async def test_it_looks_again_and_again_until_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Bench().run(tmp_path) as bench:
        monkeypatch.setattr("agentloop.cli_top.time.sleep", until(2))
        result = await call(bench, "--json")
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        assert (result.exit_code, len(lines)) == (0, 2)
        assert all(line["requests_per_second"] == 0 for line in lines)
        monkeypatch.setattr("agentloop.cli_top.time.sleep", until(2))
        assert (await call(bench)).exit_code == 2, "there is no terminal"
        monkeypatch.setenv("FORCE_COLOR", "1")
        result = await call(bench)
        assert result.exit_code == 0
        assert "requests/s" in result.stdout


async def test_a_server_that_goes_away_is_waited_for_on_the_screen_and_ends_a_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Bench().run(tmp_path) as bench:
        loop = asyncio.get_running_loop()

        def close() -> None:
            asyncio.run_coroutine_threadsafe(bench.close_listeners(), loop).result()

        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setattr("agentloop.cli_top.time.sleep", until(1, close))
        result = await call(bench)
        assert result.exit_code == 0
        assert "trying again" in result.stdout
        result = await call(bench, "--once", "--json")
        assert result.exit_code == 5
        assert json.loads(result.stderr)["error"]["status"] == "ScrapeError"


async def test_over_tls_both_ports_are_trusted_by_the_same_ca_and_shown_the_same_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, callers = Authority("ours"), Authority("callers")
    names = ("tls_cert_file", "tls_key_file")
    settings = dict(zip(names, ours.sign("server").write(tmp_path, "server"), strict=True))
    certificate, key = callers.sign("operator").write(tmp_path, "operator")
    for name, content in (("ours", ours.pem), ("callers", callers.pem)):
        (tmp_path / f"{name}.pem").write_bytes(content)
    settings["tls_client_ca_file"] = tmp_path / "callers.pem"
    trust = ("--ca-file", str(tmp_path / "ours.pem"))
    async with Bench(settings=dict(settings)).run(tmp_path) as bench:
        assert (await call(bench, "--once", "--json", tls=trust)).exit_code == 5
        monkeypatch.setenv("AGENTLOOP_CLIENT_CERT_FILE", str(certificate))
        monkeypatch.setenv("AGENTLOOP_CLIENT_KEY_FILE", str(key))
        result = await call(bench, "--once", "--json", tls=trust)
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["models"]
        assert (await call(bench, "--once", "--json", tls=())).exit_code == 5
