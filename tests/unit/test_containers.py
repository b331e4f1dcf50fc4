"""Images are built from one file, by whichever program is here."""

from __future__ import annotations

import json
import re
import resource
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from scripts import build, containers, images, sbom
from scripts.containers import Containers, ContainersError
from tests.hosts import ROOT

FILE = (ROOT / "infra/containers/Containerfile").read_text()


def which(*names: str) -> Any:
    return lambda name: f"/usr/bin/{name}" if name in names else None


def ending(code: int, ran: list[list[str]] | None = None) -> Any:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if ran is not None:
            ran.append(command)
        return subprocess.CompletedProcess(command, code, "", "no daemon")

    return run


def test_podman_is_taken_where_it_is_with_what_a_machine_without_systemd_needs(tmp_path: Path) -> None:
    bare = Containers.found("", which("podman", "runc", "docker"), ending(1), tmp_path / "none")
    assert bare.always == ("--runtime", "runc", "--cgroup-manager", "cgroupfs")
    assert bare.build == ("--format", "docker", "--isolation", "chroot")
    whole = Containers.found("", which("podman"), ending(1), tmp_path)
    assert (whole.always, whole.build) == ((), ("--format", "docker"))
    assert bare.command("run", "x")[:5] == ["podman", *bare.always]
    assert bare.command("image", "inspect", "x")[-3:] == ["image", "inspect", "x"]


def test_docker_is_taken_where_its_daemon_answers(tmp_path: Path) -> None:
    assert Containers.found("", which("docker"), ending(0), tmp_path) == Containers("docker")
    assert Containers.found("docker", which("docker", "podman"), ending(0), tmp_path).program == "docker"
    with pytest.raises(ContainersError, match="daemon does not answer"):
        Containers.found("docker", which("docker"), ending(1), tmp_path)


def test_where_there_is_none_podman_is_installed_or_the_reason_told(tmp_path: Path) -> None:
    ran: list[list[str]] = []
    assert Containers.found("", which(), ending(0, ran), tmp_path).program == "podman"
    assert ran[-1][1:] == ["podman", "runc"]
    with pytest.raises(ContainersError, match="neither podman nor"):
        Containers.found("", which("docker"), ending(1), tmp_path)
    with pytest.raises(ContainersError, match="'lxc'; it must be"):
        Containers.found("lxc")


def test_limits_are_enough_or_this_machines_where_they_are_lower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hard = {resource.RLIMIT_NOFILE: 5000, resource.RLIMIT_NPROC: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda number: (1, hard[number]))
    assert containers._limits() == ("--ulimit", "nofile=5000:5000", "--ulimit", "nproc=10000:10000")


def test_what_a_program_says_is_told_when_it_fails(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text(
        '#!/bin/sh\n[ "$1" = good ] && echo "[{\\"Id\\": \\"$2\\"}]" && exit\necho why >&2; exit 3\n'
    )
    program.chmod(0o755)
    made = Containers(str(program))
    assert made.output("good", "x") == '[{"Id": "x"}]\n'
    assert made.call("good") == 0
    with pytest.raises(ContainersError, match="bad: why"):
        made.output("bad")
    with pytest.raises(ContainersError, match="bad ended with 3"):
        made.call("bad")
    assert made.call("bad", ok=[3]) == 3
    with pytest.raises(ContainersError):
        made.inspected("bad")


def test_images_have_no_root_no_floating_base_and_say_whether_they_are_well() -> None:
    stages = re.split(r"(?m)^FROM ", FILE)[1:]
    made = {stage.split("\n")[0].split(" AS ")[1]: stage for stage in stages}
    sources = {stage.split(" AS ")[0] for stage in stages}
    assert sources - set(made) == {"${BASE}"}
    for target in images.TARGETS:
        assert re.search(r"^USER (10001:10001|postgres)$", made[target], re.MULTILINE), target
        assert re.search(r"^HEALTHCHECK ", made[target], re.MULTILINE), target
        assert "uv " not in made[target]
    assert "ARG BASE\n" in FILE
    assert ":latest" not in FILE


@pytest.mark.parametrize(("base", "kept"), [("", True), ("debian@sha256:00", True), ("debian:12", False)])
def test_a_base_is_named_by_its_digest(base: str, kept: bool) -> None:
    if kept:
        assert images.checked_base(base) == base
    else:
        with pytest.raises(ContainersError, match="name it by its digest"):
            images.checked_base(base)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is asked of a program for containers; nothing is built, and every image holds the same."""
    asked: list[list[str]] = []
    holds = {"python": [["b", "2", "MIT"], ["a", "1", ""]], "debian": [["bash", "5.2-15", "amd64"]]}
    image = {"Id": "1f", "RootFS": {"Layers": ["sha256:00"]}, "Size": 7}

    class Program(Containers):
        def call(self, verb: str, *words: str, ok: Any = (0,)) -> int:
            asked.append([verb, *words])
            return 0

        def output(self, verb: str, *words: str) -> str:
            asked.append([verb, *words])
            return json.dumps([image] if verb == "image" else holds)

    release = tmp_path / "agentloop-0.1.0-abc.tar"
    release.touch()
    for module in (images, build):
        monkeypatch.setattr(module, "make", lambda *_: ("0.1.0-abc", release))
        monkeypatch.setattr(module.Containers, "found", classmethod(lambda cls: Program("podman")))
    monkeypatch.setattr(images, "_own_base", lambda _: "localhost/agentloop-base:1")
    monkeypatch.setattr(images, "context", lambda _: __import__("contextlib").nullcontext(tmp_path))
    return asked


def test_an_image_is_tagged_with_the_release_and_known_by_its_layers(
    programs: list[list[str]], tmp_path: Path
) -> None:
    done = CliRunner().invoke(images.app, ["server", "postgres"])
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert made["server"]["name"] == "localhost/agentloop-server:0.1.0-abc"
    assert made["postgres"]["layers"] == ["sha256:00"]
    assert json.loads((tmp_path / "agentloop-0.1.0-abc.images.json").read_text()) == made
    builds = [each for each in programs if each[0] == "build"]
    assert [each[each.index("--target") + 1] for each in builds] == ["server", "postgres"]
    assert all("BASE=localhost/agentloop-base:1" in each for each in builds)
    assert CliRunner().invoke(images.app, ["nginx"]).exit_code == 1


def test_a_build_lists_what_each_part_holds_and_says_that_it_is_not_signed(
    programs: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sbom, "of_release", lambda release: "{}\n")
    monkeypatch.delenv("AGENTLOOP_SIGNING_KEY", raising=False)
    done = CliRunner().invoke(build.app, ["--image", "server", "--json"])
    assert done.exit_code == 0, done.output
    assert "NOT SIGNED" in done.stderr
    names = [Path(each).name.removeprefix("agentloop-0.1.0-abc") for each in json.loads(done.stdout)["files"]]
    assert names == [".tar", ".cdx.json", ".images.json", ".server.cdx.json"]
    bill = json.loads((tmp_path / "agentloop-0.1.0-abc.server.cdx.json").read_text())
    assert [each["purl"] for each in bill["components"]] == [
        "pkg:pypi/a@1",
        "pkg:pypi/b@2",
        "pkg:deb/debian/bash@5.2-15?arch=amd64&distro=debian-12",
    ]


def test_a_build_signs_everything(
    programs: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sbom, "of_release", lambda release: "{}\n")
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    done = CliRunner().invoke(build.app, ["--key", str(key)])
    assert done.exit_code == 0, done.output
    files = done.stdout.split()
    assert [f"{each}.sig" for each in files[:2]] == files[2:]
    assert all(Path(each).is_file() for each in files)
    key.write_text("broken")
    assert CliRunner().invoke(build.app, ["--key", str(key)]).exit_code == 1


def test_an_image_that_says_something_else_has_no_bill() -> None:
    class Odd(Containers):
        def output(self, verb: str, *words: str) -> str:
            return "hello"

    with pytest.raises(sbom.SbomError, match="did not tell what it holds: 'hello'"):
        sbom.of_image(Odd("podman"), "x")
