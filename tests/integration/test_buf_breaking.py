"""`scripts/buf_breaking.sh` in repositories of its own: what breaks callers of the landed main is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.live_server import ROOT

INFERENCE = Path("protos/agentloop/v1/inference.proto")


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def run(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [folder / "scripts" / "buf_breaking.sh"],
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def landed(tmp_path: Path) -> Path:
    """A repository whose main has our protos."""
    folder = tmp_path / "landed & é"
    shutil.copytree(ROOT / "protos", folder / "protos")
    (folder / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "buf_breaking.sh", folder / "scripts")
    git(folder, "init", "--quiet", "--initial-branch", "main")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "landed")
    return folder


def edit(folder: Path, old: str, new: str) -> None:
    path = folder / INFERENCE
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def breaks(folder: Path) -> None:
    edit(folder, "string session_id = 8;", "string session_id = 9;")


def adds(folder: Path) -> None:
    edit(folder, "string session_id = 8;", "string session_id = 8;\n\n  // New.\n  string more = 99;")


def test_what_only_adds_is_taken_and_what_breaks_is_refused(landed: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(landed), str(clone))
    git(clone, "checkout", "--quiet", "-b", "change")
    assert run(clone).returncode == 0
    adds(clone)
    assert run(clone).returncode == 0
    breaks(clone)
    git(clone, "branch", "--quiet", "-D", "main")  # as where CI has only fetched it
    git(clone, "commit", "--quiet", "-a", "-m", "breaks")
    done = run(clone)
    assert done.returncode == 1
    assert "session_id" in done.stdout + done.stderr
    assert "protos breaks callers of origin/main" in done.stderr


def test_without_a_remote_main_itself_is_what_landed(landed: Path) -> None:
    breaks(landed)
    done = run(landed)
    assert (done.returncode, "breaks callers of main" in done.stderr) == (1, True)


def test_where_nothing_has_landed_it_says_so_and_a_wrong_name_is_an_error(landed: Path) -> None:
    git(landed, "branch", "--quiet", "-m", "change")
    breaks(landed)
    done = run(landed)
    assert done.returncode == 0
    assert done.stderr.startswith("buf breaking: there is nothing to compare with")
    assert run(landed, AGAINST="nowhere").returncode == 1
    assert run(landed, AGAINST="change").returncode == 1
