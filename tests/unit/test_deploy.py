"""Production gets what staging proved within the last day, and only if somebody agrees."""

from __future__ import annotations

import io
import json
import os
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import scripts.release
from scripts import deploy, rollout

NAME = "0.1.0-abc"
NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def a_release(folder: Path, about: Any = None, name: str = NAME) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"agentloop-{name}.tar"
    text = json.dumps(about or {"id": name, "commit": "abc-dirty"}).encode()
    with tarfile.open(path, "w") as tar:
        entry = tarfile.TarInfo("release.json")
        entry.size = len(text)
        tar.addfile(entry, io.BytesIO(text))
    return path


class Ansible:
    """Notes what is played; the first plays end with these codes."""

    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)
        self.played: list[list[str]] = []

    def __call__(self, playbook: str, hosts: Path, more: Any) -> int:
        self.played.append([playbook, hosts.parent.name, *more])
        return self.codes.pop(0) if self.codes else 0


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    path = tmp_path / "ours" / "hosts.yml"
    path.parent.mkdir()
    path.write_text("servers: {}\n")
    return path


def run(
    monkeypatch: pytest.MonkeyPatch, ansible: Ansible, command: str, *more: str, said: str = ""
) -> tuple[int, str]:
    monkeypatch.setattr(deploy, "play", ansible)
    done = CliRunner().invoke(deploy.app, [command, *more], input=said)
    return done.exit_code, done.output


def options(hosts: Path, folder: Path) -> list[str]:
    return ["--inventory", str(hosts), "--folder", str(folder)]


def test_what_staging_ran_goes_to_production_once_its_id_is_typed(
    tmp_path: Path, hosts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "releases"
    file, ansible = a_release(folder), Ansible()
    given = options(hosts, folder)
    code, out = run(monkeypatch, ansible, "staging", "--release", str(file), *given, "-e", "x=1")
    assert (code, f"make deploy-prod RELEASE={file}" in out) == (0, True), out
    deployed = ["deploy", "ours", "--extra-vars", json.dumps({"release": str(file)})]
    assert ansible.played == [[*deployed, "-e", "x=1"]]

    code, out = run(monkeypatch, ansible, "prod", *given, said=f"{NAME}\n")
    assert code == 0, out
    assert ansible.played[1:] == [[*deployed, "--check", "--diff"], deployed]
    assert "ran on staging at" in out
    assert "commits in between are not known" in out
    assert json.loads((folder / "prod.json").read_text())["id"] == NAME
    code, out = run(monkeypatch, ansible, "prod", *given, "--yes")
    assert (code, "abc..abc" in out) == (0, True), out


@pytest.mark.parametrize("said", ["", "\n", "yes\n", "0.1.0\n", "\x00\n"])
def test_any_other_answer_changes_nothing(
    tmp_path: Path, hosts: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    folder, ansible = tmp_path / "releases", Ansible()
    deploy.prove(a_release(folder), hosts, datetime.now(UTC))
    code, out = run(monkeypatch, ansible, "prod", *options(hosts, folder), said=said)
    assert (code, "nothing was changed" in out) == (2, True), out
    assert [play[-1] for play in ansible.played] == ["--diff"]


def test_a_diff_that_cannot_be_shown_is_not_agreed_to(
    tmp_path: Path, hosts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ansible = tmp_path / "releases", Ansible(4)
    deploy.prove(a_release(folder), hosts, datetime.now(UTC))
    code, _ = run(monkeypatch, ansible, "prod", *options(hosts, folder), "--yes")
    assert (code, len(ansible.played)) == (4, 1)


def test_a_deployment_that_failed_is_not_written_down_as_what_serves(
    tmp_path: Path, hosts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "releases"
    deploy.prove(a_release(folder), hosts, datetime.now(UTC))
    code, _ = run(monkeypatch, Ansible(0, 2), "prod", *options(hosts, folder), "--yes")
    assert (code, (folder / "prod.json").exists()) == (2, False)


def test_a_proof_that_grew_old_while_nobody_answered_is_none(
    tmp_path: Path, hosts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ansible = tmp_path / "releases", Ansible()
    deploy.prove(a_release(folder), hosts, datetime.now(UTC))
    asked: list[str] = []

    def ask(name: str, where: Path) -> None:
        asked.append(name)
        deploy.prove(folder / f"agentloop-{NAME}.tar", where, datetime.now(UTC) - timedelta(days=2))

    monkeypatch.setattr(deploy, "_ask", ask)
    code, out = run(monkeypatch, ansible, "prod", *options(hosts, folder))
    assert (code, asked, "more than a day ago" in out) == (2, [NAME], True), out
    assert len(ansible.played) == 1


def test_a_run_on_staging_that_fails_takes_the_earlier_proof_away(
    tmp_path: Path, hosts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "releases"
    file = a_release(folder)
    deploy.prove(file, hosts, datetime.now(UTC))
    given = options(hosts, folder)
    assert run(monkeypatch, Ansible(2), "staging", "--release", str(file), *given)[0] == 2
    code, out = run(monkeypatch, Ansible(), "prod", *given, "--yes")
    assert (code, "has run on staging: make deploy-staging" in out) == (2, True), out
    code, out = run(monkeypatch, Ansible(), "prod", *given, "--yes", "--release", str(file))
    assert (code, f"staging has not run {file.name}" in out) == (2, True), out


def test_staging_gets_this_checkouts_release_where_none_is_named(
    tmp_path: Path, hosts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ansible = tmp_path / "releases", Ansible()
    monkeypatch.setattr(scripts.release, "make", lambda home, out: (NAME, a_release(out)))
    assert run(monkeypatch, ansible, "staging", *options(hosts, folder))[0] == 0
    assert deploy.newest_proved(folder).name == f"agentloop-{NAME}.tar"


def test_another_file_of_the_same_name_is_not_what_was_proved(tmp_path: Path) -> None:
    file = a_release(tmp_path)
    deploy.prove(file, tmp_path, NOW)
    a_release(tmp_path, {"id": NAME, "commit": "other"})
    with pytest.raises(deploy.DeployError, match="staging ran another file"):
        deploy.see_that_it_is_proved(file, NOW)


@pytest.mark.parametrize(
    ("later", "said"),
    [
        (timedelta(hours=24), ""),
        (timedelta(hours=24, seconds=1), "more than a day ago"),
        (timedelta(minutes=-4), ""),
        (timedelta(minutes=-6), "set the clock"),
    ],
)
def test_a_proof_holds_for_a_day_by_clocks_that_agree(tmp_path: Path, later: timedelta, said: str) -> None:
    file = a_release(tmp_path)
    deploy.prove(file, tmp_path, NOW)
    if said:
        with pytest.raises(deploy.DeployError, match=said):
            deploy.see_that_it_is_proved(file, NOW + later)
    else:
        assert file.name in deploy.see_that_it_is_proved(file, NOW + later)


@pytest.mark.parametrize(
    "proof", [b"", b"[]", b'{"sha256": "a"}', b'{"sha256": 1, "ended_at": "2026-01-01"}', b"\xff\x00"]
)
def test_a_proof_that_cannot_be_read_is_none(tmp_path: Path, proof: bytes) -> None:
    file = a_release(tmp_path)
    deploy.proof_of(file).write_bytes(proof)
    with pytest.raises(deploy.DeployError, match="cannot be read"):
        deploy.see_that_it_is_proved(file, NOW)


def test_a_release_that_is_not_there_or_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(deploy.DeployError, match="there is no release"):
        deploy.see_that_it_is_proved(tmp_path / "agentloop-x.tar", NOW)
    (tmp_path / "half.tar").write_bytes(b"\x00" * 10)
    with pytest.raises(deploy.DeployError, match="is no release"):
        deploy.about(tmp_path / "half.tar")
    with pytest.raises(deploy.DeployError, match="names no id and commit"):
        deploy.about(a_release(tmp_path, {"id": "x"}))


def test_commits_that_git_does_not_know_are_said_to_be_unknown(tmp_path: Path) -> None:
    (tmp_path / "prod.json").write_text(json.dumps({"commit": "--output=x"}))
    assert "are not in this checkout" in deploy.commits(tmp_path, a_release(tmp_path))


def test_an_inventory_that_is_not_there_is_told_how_to_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(deploy.DeployError, match="copy infra/ansible/inventories/site"):
        deploy.inventory("nowhere")
    code, out = run(monkeypatch, Ansible(), "staging", *options(tmp_path / "none", tmp_path))
    assert (code, "there is no inventory" in out) == (2, True), out


def test_ansible_is_this_checkouts_and_its_exit_code_ours(
    hosts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, environment = deploy.ansible("deploy", hosts, ["--check"])
    assert command[1:4] == ["-m", "ansible", "playbook"]
    assert command[4].endswith("playbooks/deploy.yml")
    assert command[5:] == ["--inventory", str(hosts), "--check"]
    assert environment["ANSIBLE_CONFIG"].endswith("infra/ansible/ansible.cfg")
    monkeypatch.setattr(deploy, "ansible", lambda *_: (["false"], dict(os.environ)))
    assert deploy.play("deploy", hosts, []) == 1


def test_code_goes_back_by_its_inventory_and_never_together_with_a_model(
    hosts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[list[str]] = []

    def execve(program: str, command: list[str], environment: dict[str, str]) -> None:
        played.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", execve)
    done = CliRunner().invoke(rollout.app, ["rollback", "--code", str(hosts), "--check"])
    assert done.exit_code == 0, done.output
    assert played[0][4].endswith("playbooks/rollback_code.yml")
    assert played[0][5:] == ["--inventory", str(hosts), "--check"]
    done = CliRunner().invoke(rollout.app, ["rollback", "--code", "prod", "--to", "m:base"])
    assert (done.exit_code, "name one of them" in done.output) == (2, True)
    done = CliRunner().invoke(rollout.app, ["rollback", "--code", "nowhere"])
    assert (done.exit_code, "there is no inventory" in done.output) == (2, True)
    assert len(played) == 1
