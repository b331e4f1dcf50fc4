"""A host that AWS takes has drained first, and took no accepted record with it."""

from __future__ import annotations

import argparse
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from infra.ansible.roles.aws_host.files import agentloop_drain as drain
from tests.imds import Answers, imds

GIVEN = [
    "--region=us-east-1",
    "--bucket=b",
    "--group=stage-servers",
    "--hook=stage-drain",
    "--look-seconds=0",
]
STORED = b"%d 00000000\n"


class Ran:
    """Runs nothing: it remembers, and fails as often as it is told."""

    def __init__(self, failures: int = 0) -> None:
        self.commands: list[list[str]] = []
        self.failures = failures

    def __call__(self, command: Sequence[str]) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError("no")
        self.commands.append(list(command))
        if command[0] == "tar":
            drain.command(command)
            packed = command[command.index("--file") + 1]
            with tarfile.open(packed) as tar:
                self.commands[-1] = [
                    "tar",
                    *sorted(name for name in tar.getnames() if name.endswith("/spool")),
                ]


def spool(state: Path, colour: str, stored: bytes | None, segments: dict[int, bytes]) -> Path:
    folder = state / colour / "spool"
    folder.mkdir(parents=True)
    if stored is not None:
        (folder / "position").write_bytes(stored)
    for base, written in segments.items():
        (folder / f"{base:020}.log").write_bytes(written)
    return folder


def test_what_was_stored_is_not_left(tmp_path: Path) -> None:
    assert not drain.left(spool(tmp_path, "blue", STORED % 7, {0: b"record\n" + bytes(100)}))
    assert not drain.left(spool(tmp_path, "green", STORED % 107, {100: b"record\n" + bytes(100)}))
    assert not drain.left(tmp_path / "none")


@pytest.mark.parametrize(
    ("stored", "segments"),
    [
        (STORED % 7, {0: b"record\nanother\n" + bytes(50)}),
        (STORED % 7, {0: b"record\n", 7: b"another\n" + bytes(50)}),
        (None, {0: b"record\n" + bytes(50)}),
        (b"", {0: b"record\n"}),
        (b"\0\0", {0: bytes(9)}),
    ],
)
def test_what_was_not_stored_or_cannot_be_read_is_left(
    tmp_path: Path, stored: bytes | None, segments: dict[int, bytes]
) -> None:
    assert drain.left(spool(tmp_path, "blue", stored, segments))


def test_dead_letters_are_left(tmp_path: Path) -> None:
    folder = spool(tmp_path, "blue", STORED % 7, {0: b"record\n"})
    (folder / "dead").mkdir()
    (folder / "dead/0.json").write_text("{}")
    assert drain.left(folder)


def test_only_spools_in_which_something_is_left_are_saved(tmp_path: Path) -> None:
    spool(tmp_path, "blue", STORED % 7, {0: b"record\n" + bytes(9)})
    kept = spool(tmp_path, "green", STORED % 0, {0: b"record\n" + bytes(9)})
    ran = Ran()
    assert drain.save(tmp_path, "s3://b/x.tar.gz", ran) == [kept]
    assert ran.commands[0] == ["tar", "green/spool"]
    assert ran.commands[1][:4] == ["aws", "s3", "cp", "--only-show-errors"]
    assert ran.commands[1][-1] == "s3://b/x.tar.gz"


def test_aws_is_told_after_the_service_has_stopped_and_its_records_are_safe(tmp_path: Path) -> None:
    spool(tmp_path, "blue", None, {0: b"record\n"})
    ran, slept = Ran(failures=2), list[float]()
    drain.drain(_arguments(tmp_path), "i-1", ran, slept.append)
    assert [command[:3] for command in ran.commands] == [
        ["systemctl", "stop", "agentloop@blue.service"],
        ["tar", "blue/spool"],
        ["aws", "s3", "cp"],
        ["aws", "autoscaling", "complete-lifecycle-action"],
    ]
    assert ran.commands[2][-1] == "s3://b/backups/spools/i-1.tar.gz"
    assert "--instance-id i-1 --lifecycle-hook-name stage-drain" in " ".join(ran.commands[3])
    assert len(slept) == 2, "what failed was tried again"


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ({}, ""),
        ({"autoscaling/target-lifecycle-state": ["InService"]}, ""),
        ({"autoscaling/target-lifecycle-state": ["Terminated"]}, "scale-in"),
        ({"spot/instance-action": ['{"action": "terminate"}']}, "spot"),
        ({"autoscaling/target-lifecycle-state": [500]}, ""),
    ],
)
def test_the_end_is_told_by_the_group_and_by_spot(answers: Answers, why: str) -> None:
    with imds(answers) as url:
        assert drain.ending(drain.Metadata(url)) == why


def test_nobody_who_answers_is_no_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert drain.ending(drain.Metadata("http://127.0.0.1:1")) == ""
    assert "does not answer" in capsys.readouterr().err


def test_it_waits_for_the_end_and_drains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("systemctl", "aws"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/ran\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    states = {"autoscaling/target-lifecycle-state": ["InService", "Terminated"], "instance-id": ["i-9"]}
    with imds(states) as url:
        given = [*GIVEN, f"--state={tmp_path}", "agentloop@blue.service"]
        assert drain.main(given, drain.Metadata(url)) == 0
    assert (tmp_path / "ran").read_text().splitlines()[0] == "systemctl stop agentloop@blue.service"
    assert "--instance-id i-9" in (tmp_path / "ran").read_text()
    assert "AWS takes this host (scale-in): draining" in capsys.readouterr().out


def test_a_command_that_fails_says_what_it_said() -> None:
    with pytest.raises(OSError, match=r"sh -c echo.* failed \(3\): why"):
        drain.command(["sh", "-c", "echo why >&2; exit 3"])


def _arguments(state: Path) -> argparse.Namespace:
    return argparse.Namespace(
        region="us-east-1",
        bucket="b",
        group="g",
        hook="stage-drain",
        state=str(state),
        units=["agentloop@blue.service"],
    )
