"""Who deploys can tell whether one who may has signed what is deployed."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from scripts.signing import NAMESPACE, SignatureError, app, sign, verify
from tests.hosts import ROOT

WHO = "release@example.com"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return new_key(tmp_path / "key")


def new_key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path


def signers(key: Path, namespace: str = NAMESPACE) -> Path:
    listed = key.with_name(f"{key.name}.{namespace}")
    public = key.with_name(f"{key.name}.pub").read_text()
    listed.write_text(f'{WHO} namespaces="{namespace}" {public}')
    return listed


@pytest.fixture
def release(tmp_path: Path) -> Path:
    file = tmp_path / "agentloop-1 a.tar"
    file.write_bytes(b"\0release" * 1000)
    return file


def test_what_was_signed_is_known_by_whom(release: Path, key: Path) -> None:
    assert sign(release, key) == release.with_name("agentloop-1 a.tar.sig")
    assert verify(release, signers(key)) == WHO


def test_a_changed_release_is_refused(release: Path, key: Path) -> None:
    sign(release, key)
    release.write_bytes(release.read_bytes() + b"!")
    with pytest.raises(SignatureError, match=f"is not what {WHO} signed"):
        verify(release, signers(key))


def test_nobody_else_may_sign_and_nothing_else_counts(release: Path, key: Path, tmp_path: Path) -> None:
    sign(release, key)
    with pytest.raises(SignatureError, match="by nobody whom"):
        verify(release, signers(new_key(tmp_path / "other")))
    with pytest.raises(SignatureError, match="is not what"):
        verify(release, signers(key, "git"))
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(SignatureError, match="by nobody whom"):
        verify(release, empty)


@pytest.mark.parametrize("content", [b"", b"-----BEGIN SSH SIGNATURE-----\nAAAA", b"\0" * 100])
def test_a_broken_signature_is_none(release: Path, key: Path, content: bytes) -> None:
    release.with_name(f"{release.name}.sig").write_bytes(content)
    with pytest.raises(SignatureError):
        verify(release, signers(key))


def test_an_unsigned_release_and_an_unusable_key_say_what_to_do(
    release: Path, key: Path, tmp_path: Path
) -> None:
    with pytest.raises(SignatureError, match="is not signed: there is no"):
        verify(release, signers(key))
    broken = tmp_path / "broken"
    broken.write_text("no key")
    broken.chmod(0o600)
    with pytest.raises(SignatureError, match="broken cannot sign"):
        sign(release, broken)
    assert not release.with_name(f"{release.name}.sig").exists()


def test_the_commands_sign_and_verify_and_their_exit_codes_tell(release: Path, key: Path) -> None:
    run = CliRunner().invoke
    assert run(app, ["sign", str(release), "--key", str(key)]).exit_code == 0
    good = run(app, ["verify", str(release), "--signers", str(signers(key))])
    assert (good.exit_code, good.stdout) == (0, f"{WHO}\n")
    release.write_bytes(b"another")
    bad = run(app, ["verify", str(release), "--signers", str(signers(key))])
    assert bad.exit_code == 1
    assert "is not what" in bad.stderr
    assert run(app, ["sign", str(release), "--key", str(signers(key))]).exit_code == 1


def test_the_deployment_asks_before_it_touches_a_host() -> None:
    role = ROOT / "infra/ansible/roles/server"
    tasks = yaml.safe_load((role / "tasks/main.yml").read_text())
    names = [next((str(v) for k, v in task.items() if k.endswith("_tasks")), "") for task in tasks]
    assert names.index("signature.yml") < names.index("host.yml")
    (task,) = yaml.safe_load((role / "tasks/signature.yml").read_text())
    asked = [
        each.replace("{{ ", "").replace(" }}", "") for each in task["ansible.builtin.command"]["argv"][1:]
    ]
    assert shlex.join(asked) == "-m scripts.signing verify server_release --signers server_signers"
    assert task["delegate_to"] == "localhost"
