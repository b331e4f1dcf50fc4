"""Brings a release to staging, then to production: `make deploy-staging`, `make deploy-prod`.

Both play playbooks/deploy.yml (blue-green, docs/operations/deploy.md) with an inventory of the operator's
own. A run on staging that ended well leaves its proof beside the release: the file's SHA-256 and when.
Production takes no other file, and no proof that is older than a day: after that staging may run on
something else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from scripts import release as releases
from validation.files import sha256, write_json

HOME = Path(__file__).resolve().parents[1]
ANSIBLE = HOME / "infra" / "ansible"
PROOF = ".staging.json"
"""Is appended to the name of a release's file."""
OLDEST = timedelta(days=1)
CLOCKS_DIFFER = timedelta(minutes=5)
USAGE = 2

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Release = Annotated[
    Path | None, typer.Option("--release", envvar="RELEASE", help="A release's file, of `scripts.release`.")
]
Releases = Annotated[Path, typer.Option(help="Where releases and their proofs are.")]
# What is not known here is Ansible's: `--ask-vault-pass`, `-e server_watch_seconds=300`.
More = Annotated[list[str] | None, typer.Argument(help="Further arguments of ansible-playbook.")]
_OPEN = {"ignore_unknown_options": True}


class DeployError(Exception):
    """It must not be deployed; the text says why, and what to do."""


def inventory(named: str) -> Path:
    """The hosts' file of an environment (`staging`, `prod`) or of a path.

    Raises:
        DeployError: it is not there.
    """
    path = Path(named).absolute() if "/" in named else ANSIBLE / "inventories" / named / "hosts.yml"
    if not path.exists():
        raise DeployError(
            f"there is no inventory {path}: copy infra/ansible/inventories/site, write your hosts, and give"
            " its hosts.yml, which may lie anywhere; staging and prod are found in infra/ansible/inventories"
        )
    return path


def ansible(playbook: str, hosts: Path, more: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command that plays one of our playbooks with this checkout's Ansible, and its environment."""
    command = [sys.executable, "-m", "ansible", "playbook", str(ANSIBLE / "playbooks" / f"{playbook}.yml")]
    environment = os.environ | {"ANSIBLE_CONFIG": str(ANSIBLE / "ansible.cfg")}
    return [*command, "--inventory", str(hosts), *more], environment


def play(playbook: str, hosts: Path, more: Sequence[str]) -> int:
    """Play it; Ansible's exit code."""
    command, environment = ansible(playbook, hosts, more)
    return subprocess.run(command, env=environment, check=False).returncode


def proof_of(release: Path) -> Path:
    """Where the proof of a release is."""
    return release.with_name(release.name + PROOF)


def prove(release: Path, hosts: Path, now: datetime) -> None:
    """Write down that a release was deployed on staging, whole or not at all."""
    proof = {
        "sha256": sha256(release),
        "ended_at": now.isoformat(timespec="seconds"),
        "inventory": str(hosts),
    }
    write_json(proof_of(release), proof)


def see_that_it_is_proved(release: Path, now: datetime) -> str:
    """What was proved, in a sentence.

    Raises:
        DeployError: staging did not run this file, or not within the last day.
    """
    again = f"make deploy-staging RELEASE={release}"
    if not release.is_file():
        raise DeployError(
            f"there is no release {release}; RELEASE is the file that `python -m scripts.release` prints"
        )
    try:
        proof = json.loads(proof_of(release).read_text(encoding="utf-8"))
        proved, ended_at = str(proof["sha256"]), datetime.fromisoformat(proof["ended_at"])
        age = now - ended_at
    except FileNotFoundError:
        raise DeployError(f"staging has not run {release.name}: {again}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DeployError(f"the proof {proof_of(release)} cannot be read ({error}): {again}") from error
    if proved != (found := sha256(release)):
        raise DeployError(
            f"staging ran another file than {release.name}: {proved}, and this is {found}: {again}"
        )
    if age > OLDEST:
        raise DeployError(f"staging ran {release.name} at {ended_at}, which is more than a day ago: {again}")
    if age < -CLOCKS_DIFFER:
        raise DeployError(
            f"staging ran {release.name} at {ended_at}, and now it is {now}: set the clock, then {again}"
        )
    return f"{release.name} (SHA-256 {proved}) ran on staging at {ended_at}"


def newest_proved(folder: Path) -> Path:
    """The release that staging ran last.

    Raises:
        DeployError: there is none.
    """
    proofs = sorted(folder.glob(f"agentloop-*.tar{PROOF}"), key=lambda path: path.stat().st_mtime)
    if not proofs:
        raise DeployError(f"no release in {folder} has run on staging: make deploy-staging")
    return proofs[-1].with_name(proofs[-1].name.removesuffix(PROOF))


def commits(folder: Path, release: Path) -> str:
    """What changed since the release that production got last, as far as git knows."""
    try:
        before = json.loads((folder / "prod.json").read_text(encoding="utf-8"))["commit"]
    except (OSError, ValueError, KeyError, TypeError):
        return "What production runs was not deployed from here: the commits in between are not known."
    between = f"{_bare(before)}..{_bare(about(release)['commit'])}"
    shown = subprocess.run(
        ["git", "--no-pager", "log", "--oneline", "--stat", "--end-of-options", between, "--"],
        cwd=HOME,
        capture_output=True,
        text=True,
        check=False,
    )
    if shown.returncode != 0:
        return f"The commits of {between} are not in this checkout."
    return f"Commits since the release before, {between}:\n{shown.stdout or 'none'}"


def _bare(commit: str) -> str:
    return str(commit).removesuffix("-dirty")


def about(release: Path) -> dict[str, Any]:
    """A release's own word on itself: id, version, commit.

    Raises:
        DeployError: the file is no release.
    """
    try:
        with tarfile.open(release) as tar:
            found = json.loads(releases.content(tar, "release.json"))
        if not isinstance(found, dict) or not {"id", "commit"} <= found.keys():
            raise ValueError("release.json names no id and commit")
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise DeployError(f"{release} is no release: {error}; make deploy-staging makes one") from error
    return found


@app.command(context_settings=_OPEN)
def staging(
    more: More = None,
    release: Release = None,
    hosts: Annotated[str, typer.Option("--inventory", envvar="STAGING", help="Inventory.")] = "staging",
    folder: Releases = HOME / "var" / "releases",
) -> None:
    """Deploy this checkout, or a release, to staging, and prove it. The exit code is Ansible's."""
    try:
        where = inventory(hosts)
        file = release.absolute() if release else releases.make(HOME, folder)[1]
        about(file)
    except (DeployError, releases.ReleaseError, OSError) as error:
        _fail(error)
    proof_of(file).unlink(missing_ok=True)
    code = play("deploy", where, ["--extra-vars", json.dumps({"release": str(file)}), *(more or [])])
    if code == 0:
        prove(file, where, datetime.now(UTC))
        typer.echo(f"{file.name} runs on staging. For a day it may go on: make deploy-prod RELEASE={file}")
    raise typer.Exit(code)


@app.command(context_settings=_OPEN)
def prod(
    more: More = None,
    release: Release = None,
    hosts: Annotated[str, typer.Option("--inventory", envvar="PROD", help="Inventory.")] = "prod",
    folder: Releases = HOME / "var" / "releases",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask: somebody has agreed elsewhere.")] = False,
) -> None:
    """Deploy to production what staging ran, once it is shown and agreed to. The exit code is Ansible's."""
    try:
        where = inventory(hosts)
        file = release.absolute() if release else newest_proved(folder)
        typer.echo(see_that_it_is_proved(file, datetime.now(UTC)))
        made = about(file)
        typer.echo(commits(folder, file))
    except (DeployError, OSError) as error:
        _fail(error)
    given = ["--extra-vars", json.dumps({"release": str(file)}), *(more or [])]
    typer.echo("What would change on the hosts:")
    if code := play("deploy", where, [*given, "--check", "--diff"]):
        raise typer.Exit(code)
    if not yes:
        _ask(made["id"], where)
    try:  # the answer may have taken until tomorrow
        see_that_it_is_proved(file, datetime.now(UTC))
    except DeployError as error:
        _fail(error)
    if code := play("deploy", where, given):
        raise typer.Exit(code)
    write_json(folder / "prod.json", made)
    typer.echo(f"{file.name} serves. Back to the release before, in seconds: make rollback CODE={hosts}")


def _ask(name: str, where: Path) -> None:
    """Nothing but the release's id agrees; an empty answer, or nobody there, does not."""
    typer.echo(f"Deploy it to {where}? Type {name} to agree:")
    if sys.stdin.readline().strip() != name:
        _fail(DeployError("not agreed to; nothing was changed"))


def _fail(error: Exception) -> NoReturn:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(USAGE)


if __name__ == "__main__":
    app(prog_name="python -m scripts.deploy")
