"""Podman or Docker, whichever is here, and the options that this machine needs of it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parents[1]
# Podman's own are a million and more, which a machine whose hard limits are lower refuses.
_FILES, _PROCESSES = 20_000, 10_000

Run = Callable[..., subprocess.CompletedProcess[str]]


class ContainersError(Exception):
    """No program for containers is here, or it failed; the text says what it said."""


@dataclass(frozen=True, slots=True)
class Containers:
    """The program, and the options that go before its command, with `build` and with `run`."""

    program: str
    always: tuple[str, ...] = ()
    build: tuple[str, ...] = ()
    run: tuple[str, ...] = ()

    @classmethod
    def found(
        cls,
        wanted: str = os.environ.get("AGENTLOOP_CONTAINERS", ""),
        which: Callable[[str], str | None] = shutil.which,
        run: Run = subprocess.run,
        systemd: Path = Path("/run/systemd/system"),
    ) -> Containers:
        """Podman where it is installed, Docker where its daemon answers; else Debian's podman is installed.

        Raises:
            ContainersError: none can be had.
        """
        if wanted not in ("", "podman", "docker"):
            raise ContainersError(f"AGENTLOOP_CONTAINERS is {wanted!r}; it must be podman or docker")
        if wanted != "docker" and which("podman"):
            return cls._podman(which, systemd)
        if wanted != "podman" and which("docker"):
            if run(["docker", "info"], capture_output=True, text=True, check=False).returncode == 0:
                return cls("docker")
            if wanted == "docker":
                raise ContainersError("docker's daemon does not answer: `docker info` says why")
        installed = run([str(HOME / "scripts/debian.sh"), "podman", "runc"], check=False)
        if installed.returncode != 0:
            raise ContainersError("neither podman nor a docker whose daemon answers is here")
        return cls._podman(which, systemd)

    @classmethod
    def _podman(cls, which: Callable[[str], str | None], systemd: Path) -> Containers:
        always: list[str] = ["--runtime", "runc"] if which("runc") else []
        build = ["--format", "docker"]  # OCI's format has no health check
        if not systemd.is_dir():
            # Nobody to ask for a scope, as in a container or a bare virtual machine.
            always += ["--cgroup-manager", "cgroupfs"]
            build += ["--isolation", "chroot"]
        return cls("podman", tuple(always), tuple(build), _limits())

    def command(self, verb: str, *words: str) -> list[str]:
        """The command line of one of its commands."""
        more = {"build": self.build, "run": self.run}.get(verb, ())
        return [self.program, *self.always, verb, *more, *words]

    def call(self, verb: str, *words: str, ok: Sequence[int] = (0,)) -> int:
        """Run a command that speaks for itself; its exit code.

        Raises:
            ContainersError: it is none of `ok`.
        """
        done = subprocess.run(self.command(verb, *words), stdin=subprocess.DEVNULL, check=False)
        if done.returncode not in ok:
            raise ContainersError(f"{self.program} {verb} ended with {done.returncode}")
        return done.returncode

    def output(self, verb: str, *words: str) -> str:
        """What a command prints.

        Raises:
            ContainersError: it failed.
        """
        done = subprocess.run(
            self.command(verb, *words), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise ContainersError(f"{self.program} {verb}: {done.stderr.strip()[-2000:]}")
        return done.stdout

    def inspected(self, image: str) -> dict[str, Any]:
        """What it knows of an image.

        Raises:
            ContainersError: there is none of that name.
        """
        found: list[dict[str, Any]] = json.loads(self.output("image", "inspect", image))
        return found[0]


def _limits() -> tuple[str, ...]:
    """Enough for a server and a training, or this machine's hard limits where they are lower."""
    options: list[str] = []
    for name, number, most in (
        ("nofile", resource.RLIMIT_NOFILE, _FILES),
        ("nproc", resource.RLIMIT_NPROC, _PROCESSES),
    ):
        hard = resource.getrlimit(number)[1]
        least = most if hard == resource.RLIM_INFINITY else min(hard, most)
        options += ["--ulimit", f"{name}={least}:{least}"]
    return tuple(options)
