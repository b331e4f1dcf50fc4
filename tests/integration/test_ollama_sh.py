"""`make ollama` takes an Ollama that is new enough, and otherwise the one that it built once."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.integration.conftest_engine import ROOT, ollama_binary

SCRIPT = str(ROOT / "scripts" / "ollama.sh")


def found(stub: Path, version: str) -> str:
    """The last line of the script where the `ollama` on PATH says that it is of `version`."""
    stub.mkdir()
    program = stub / "ollama"
    program.write_text(f"#!/bin/sh\necho 'Warning: client version is {version}' >&2\n")
    program.chmod(0o755)
    path = f"{stub}:{os.environ['PATH']}"
    done = subprocess.run(
        [SCRIPT], env={**os.environ, "PATH": path}, check=True, capture_output=True, text=True
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("version", ["0.34.0", "0.35.2", "1.0.0"])
def test_an_ollama_on_path_that_is_new_enough_is_used(tmp_path: Path, version: str) -> None:
    folder = tmp_path / "é & bin"
    assert found(folder, version) == str(folder / "ollama")


def test_an_ollama_that_is_too_old_is_not(tmp_path: Path) -> None:
    built = ollama_binary()
    for number, version in enumerate(("0.33.9", "0.9.0", "unknown")):
        assert found(tmp_path / str(number), version) == built


def test_what_is_found_runs_and_tells_its_version() -> None:
    told = subprocess.run(
        [ollama_binary(), "--version"],
        env={**os.environ, "OLLAMA_HOST": "127.0.0.1:1"},
        check=True,
        capture_output=True,
        text=True,
    )
    found = re.search(r"version is (\d+)\.(\d+)\.\d+", told.stdout + told.stderr)
    assert found is not None, told
    assert (int(found[1]), int(found[2])) >= (0, 34)
