"""An audit without its database is no audit, and says so."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from datetime import date
from typing import Any

import pytest
from typer.testing import CliRunner

from scripts import vulnerabilities as audit
from scripts.vulnerabilities import NotAuditedError, known, see_that_it_answers

TODAY = date(2026, 11, 24)


def advisory(name: str) -> dict[str, Any]:
    return {"id": name, "aliases": ["CVE-1"], "fix_versions": ["2"], "description": ""}


def saying(*packages: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    return lambda requirements, *options: {"dependencies": list(packages)}


VULNERABLE = {"name": "a", "version": "1", "vulns": [advisory("PYSEC-1")]}
SOUND = {"name": "b", "version": "1", "vulns": []}


def test_a_mirror_without_advisories_is_not_taken_for_their_absence() -> None:
    see_that_it_answers(saying(VULNERABLE))
    for answer in (saying(SOUND), saying()):
        with pytest.raises(NotAuditedError, match="has no advisories"):
            see_that_it_answers(answer)


def test_vulnerabilities_are_told_unless_a_reason_excepts_them_for_now() -> None:
    line = "a 1: PYSEC-1, mended in 2"
    assert known(saying(VULNERABLE, SOUND), "", [], TODAY) == (2, [line])
    for excepted in ("PYSEC-1", "CVE-1"):
        one = {"id": excepted, "reason": "not reached by us", "until": date(2027, 1, 1)}
        assert known(saying(VULNERABLE), "", [one], TODAY) == (1, [])
        assert known(saying(VULNERABLE), "", [one | {"until": date(2026, 1, 1)}], TODAY) == (1, [line])
        assert known(saying(VULNERABLE), "", [one | {"reason": ""}], TODAY) == (1, [line])


def test_a_package_that_was_not_looked_up_is_no_sound_one() -> None:
    with pytest.raises(NotAuditedError, match=r"not looked up: c \(not on PyPI\)"):
        known(saying(SOUND, {"name": "c", "skip_reason": "not on PyPI"}), "", [], TODAY)


def test_the_auditors_own_failure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert "--strict" in command
        return subprocess.CompletedProcess(command, 1, "", "traceback\nConnectionError: no route")

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(NotAuditedError, match="pip-audit: ConnectionError: no route"):
        audit.pip_audit("a==1\n")


def test_the_command_fails_loudly_where_nothing_was_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "pip_audit", saying(SOUND))
    done = CliRunner().invoke(audit.app, [])
    assert done.exit_code == audit.NOT_AUDITED
    assert done.stderr.startswith("NOT AUDITED: asked of jinja2 2.10")
    assert done.stdout == ""


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_the_command_tells_what_it_found_in_what_is_locked(
    monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setattr(audit, "pip_audit", saying(VULNERABLE, SOUND))
    monkeypatch.setattr(audit, "locked", lambda: "a==1\n")
    done = CliRunner().invoke(audit.app, options)
    assert done.exit_code == audit.VULNERABLE
    assert "PYSEC-1, mended in 2" in done.stdout


def test_everything_that_is_locked_is_asked_for_with_its_hash() -> None:
    listed = audit.locked()
    for name in ("grpcio", "torch", "apache-airflow", "ruff", "pyspark"):
        assert f"\n{name}==" in f"\n{listed}"
    assert listed.count("--hash=sha256:") > listed.count("==")
