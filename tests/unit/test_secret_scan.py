"""No secret is committed unseen."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scripts.secret_scan import LOOKED_AT, app

SECRET = "AKIA" + "Q3EGXAMPLE7PLEQW"  # nothing that looks like one stands in this file


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text("var/\n")
    (tmp_path / "settings.py").write_text(f"\nkey = '{SECRET}'\n")
    (tmp_path / "var").mkdir()
    (tmp_path / "var/ignored").write_text(SECRET)
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\0\xff" * 1000)
    (tmp_path / "gone").symlink_to("nowhere")
    return tmp_path


def run(checkout: Path, *options: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["--root", str(checkout), *options])
    assert SECRET not in done.output
    return done.exit_code, done.stdout


def test_a_new_secret_is_told_by_its_place_and_never_printed(checkout: Path) -> None:
    assert run(checkout) == (1, "settings.py:2: AWS Access Key\n")
    code, out = run(checkout, "--json")
    assert (code, json.loads(out)) == (1, {"new": ["settings.py:2: AWS Access Key"], "gone": []})


def test_what_was_looked_at_may_move_but_not_be_added_to(checkout: Path) -> None:
    assert run(checkout, "--accept")[0] == 0
    assert SECRET not in (checkout / LOOKED_AT).read_text()
    assert run(checkout) == (0, "")
    settings = checkout / "settings.py"
    settings.write_text("\n" * 50 + settings.read_text())
    assert run(checkout) == (0, "")
    settings.write_text(settings.read_text() + f"other = '{SECRET[:-1]}Z'\n")
    assert run(checkout)[0] == 1


def test_the_list_holds_nothing_that_is_gone(checkout: Path) -> None:
    run(checkout, "--accept")
    (checkout / "settings.py").write_text("key = None\n")
    code, out = run(checkout)
    assert code == 1
    assert "names a text that is not there any more" in out


def test_a_list_that_was_half_written_is_no_list(checkout: Path) -> None:
    (checkout / LOOKED_AT).parent.mkdir(parents=True)
    (checkout / LOOKED_AT).write_text('{"settings.py": {')
    assert run(checkout)[0] == 2
