"""A deployment that answers too little, or too slowly, goes no further."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from agentloop.errors import Unavailable
from scripts import load
from scripts.load import Load, app, press
from tests.integration.conftest_client import ScriptedService, running


async def test_as_many_ask_at_once_as_there_are_callers_and_refusals_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load, "PAUSE", 0)
    asked: list[str] = []

    async def ask(prompt: str) -> str:
        asked.append(prompt)
        if len(asked) == 2:
            raise Unavailable(grpc.StatusCode.UNAVAILABLE, "no")
        return "yes"

    found = await press(ask, callers=3, seconds=0)
    assert (len(found.seconds), found.failed, found.requests) == (2, Counter({"Unavailable": 1}), 3)
    assert len(set(asked)) == 3


def test_a_verdict_says_what_was_not_good_enough() -> None:
    assert Load([0.1] * 999, Counter(Unavailable=1)).verdict(0.001, 1) == ""
    assert "2 of 1000 requests failed, more than 0.1%" in Load([0.1] * 998, Counter(X=2)).verdict(0.001, 1)
    assert "take up to" not in Load([9.0]).verdict(0, 1)
    assert "95 of 100 answers took up to 9.0 s; they may take 1.0 s" in Load([9.0] * 20).verdict(0, 1)
    assert "none of 3 requests was answered" in Load(failed=Counter(X=3)).verdict(1, 1)


def test_the_command_presses_a_server_and_judges_it(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("al_x\n")
    options = ["--token-file", str(tmp_path / "token"), "--callers", "2", "--seconds", "0", "--json"]
    run = CliRunner().invoke
    with running(ScriptedService()) as service:
        good = run(app, ["--server", service.address, *options])
        assert good.exit_code == 0, good.output
        assert (json.loads(good.stdout)["requests"], json.loads(good.stdout)["failed"]) == (2, {})
        assert set(service.tokens) == {"Bearer al_x"}
        service.chats = [[grpc.StatusCode.INTERNAL]]
        bad = run(app, ["--server", service.address, *options])
        assert (bad.exit_code, "1 of 2 requests failed" in bad.stderr) == (1, True)
    assert run(app, ["--server", "http://x", *options]).exit_code == load.USAGE
