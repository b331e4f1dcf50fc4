"""When backups ended, as the node exporter's text file tells it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from infra.prometheus import backup_age

# What pgBackRest 2.45 prints, as its documentation has it, shortened: one full backup and one increment.
INFO: list[dict[str, Any]] = [
    {
        "archive": [{"database": {"id": 1, "repo-key": 1}, "id": "15-1", "max": "000000010000000000000004"}],
        "backup": [
            {
                "backrest": {"format": 5, "version": "2.45"},
                "error": False,
                "label": "20261123-010000F",
                "timestamp": {"start": 1795395600, "stop": 1795395900},
                "type": "full",
            },
            {
                "backrest": {"format": 5, "version": "2.45"},
                "error": False,
                "label": "20261123-010000F_20261124-010000I",
                "timestamp": {"start": 1795482000, "stop": 1795482060},
                "type": "incr",
            },
        ],
        "cipher": "none",
        "name": "main",
        "status": {"code": 0, "lock": {"backup": {"held": False}}, "message": "ok"},
    }
]


def printed(folder: Path, text: str) -> str:
    """A command that prints it."""
    (folder / "info.json").write_text(text)
    return f"cat {shlex.quote(str(folder / 'info.json'))}"


def told(text: str) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(text)
    return {tuple(s.labels.values()): s.value for family in families for s in family.samples}


def test_the_newest_good_backup_of_each_type_is_told(tmp_path: Path) -> None:
    older = {"type": "full", "timestamp": {"stop": 1}, "error": False}
    broken = {"type": "full", "timestamp": {"stop": 1795482999}, "error": True}
    more = [{**INFO[0], "backup": [*INFO[0]["backup"], older, broken]}]
    target = tmp_path / "backup.prom"
    assert backup_age.main([str(target), "--info", printed(tmp_path, json.dumps(more))]) == 0
    assert told(target.read_text()) == {("main", "full"): 1795395900, ("main", "incr"): 1795482060}
    assert target.stat().st_mode & 0o777 == 0o644, "the exporter is another user"


def test_a_stanza_may_have_any_name_and_no_backup_yet(tmp_path: Path) -> None:
    backup = {"type": "full", "timestamp": {"stop": 7}}
    text = backup_age.figures([{"name": 'a "b"\\\n', "backup": [backup]}, {"name": "new", "backup": []}])
    assert told(text) == {('a "b"\\\n', "full"): 7}
    assert told(backup_age.figures([])) == {}


@pytest.mark.parametrize("text", ["", "{", "7", "[7]", '[{"name": "main"}]', '[{"name": 1, "backup": [{}]}]'])
def test_what_is_no_answer_leaves_the_file_as_it_was(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "backup.prom"
    target.write_text("before")
    assert backup_age.main([str(target), "--info", printed(tmp_path, text)]) == 1
    assert target.read_text() == "before"
    assert f"{target} was not written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("/no/such/program", "did not answer"),
        ("sh -c 'echo no stanza >&2; exit 82'", "failed with 82: no stanza"),
        ("sleep 60", "did not answer"),
    ],
)
def test_a_backrest_that_fails_or_hangs_is_told(
    tmp_path: Path,
    command: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backup_age, "SECONDS", 0.2)
    assert backup_age.main([str(tmp_path / "backup.prom"), "--info", command]) == 1
    assert said in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert backup_age.main([str(tmp_path / "none" / "x.prom"), "--info", printed(tmp_path, "[]")]) == 1
    assert "No such file" in capsys.readouterr().err
