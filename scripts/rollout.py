"""Rolls a candidate out, or puts a former champion or release back: `make rollout`, `make rollback`.

For a model it plays the same playbook as the nightly DAG, in the same way: this checkout's Ansible and its
configuration, and the live server where its `server.json` says it is, unless the environment says
otherwise.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from scripts import deploy
from scripts.night import HOME, NightError, server_environment

USAGE = 2

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


# What is not known here is Ansible's: `--check --diff`, `-e model_again=true`.
@app.command(context_settings={"ignore_unknown_options": True})
def play(
    playbook: Annotated[Literal["rollout", "rollback"], typer.Argument(help="What to play.")],
    more: Annotated[list[str] | None, typer.Argument(help="Further arguments of ansible-playbook.")] = None,
    cycle: Annotated[str, typer.Option(envvar="CYCLE", help="A cycle's id, or its directory.")] = "",
    to: Annotated[
        str, typer.Option(envvar="TO", help="The model version to put back; else the one before the cycle.")
    ] = "",
    code: Annotated[
        str, typer.Option(envvar="CODE", help="Put code back, not a model: the inventory, as prod.")
    ] = "",
    state_dir: Annotated[Path, typer.Option(envvar="AGENTLOOP_STATE_DIR", help="State folder.")] = Path(
        "var"
    ),
    cycles_dir: Annotated[Path, typer.Option(envvar="AGENTLOOP_CYCLES_DIR", help="Cycles folder.")] = Path(
        "cycles"
    ),
) -> None:
    """Play `rollout` or `rollback` against the live server; the exit code is Ansible's."""
    if playbook == "rollback" and code:
        _code_back(code, cycle or to, more or [])
    if playbook == "rollout":
        to = ""
        if not cycle:
            _fail("which cycle? make rollout CYCLE=<cycle id>")
    elif not (cycle or to):
        _fail(
            "which champion? make rollback CYCLE=<cycle id> (the one before it), or TO=<model version>; the "
            "server's release before: make rollback CODE=prod"
        )
    directory = HOME / (Path(cycle) if "/" in cycle else cycles_dir / cycle)
    if cycle and not directory.is_dir():
        _fail(f"there is no cycle in {directory}: CYCLE is a cycle's id, or the path of its directory")
    try:
        server = server_environment(HOME / state_dir, os.environ)
    except NightError as error:
        _fail(str(error))
    environment = os.environ | server | _token_file()
    environment |= {
        "ANSIBLE_CONFIG": str(HOME / "infra/ansible/ansible.cfg"),
        "AGENTLOOP_CYCLE_DIR": str(directory.resolve()) if cycle else "",
        "AGENTLOOP_STATE_DIR": str((HOME / state_dir).resolve()),  # where the registry is, whose mark moves
    }
    command = [sys.executable, "-m", "ansible", "playbook", f"{HOME}/infra/ansible/playbooks/{playbook}.yml"]
    if to:
        command += ["--extra-vars", json.dumps({"to": to})]  # JSON: `to=a b` would be taken for two
    # In place of this process: an interrupt is Ansible's alone, which puts the route back before it ends.
    os.execve(command[0], [*command, *(more or [])], environment)  # noqa: S606


def _code_back(named: str, model: str, more: list[str]) -> NoReturn:
    """The hosts of an inventory return to the release before, in place of this process."""
    if model:
        _fail(f"CODE puts the server's release back, and {model} is of a model: name one of them")
    try:
        command, environment = deploy.ansible("rollback_code", deploy.inventory(named), more)
    except deploy.DeployError as error:
        _fail(str(error))
    os.execve(command[0], command, environment)  # noqa: S606


def _token_file() -> dict[str, str]:
    """The token's file, if one is named, by its absolute path: Ansible's modules run elsewhere."""
    named = os.environ.get("AGENTLOOP_TOKEN_FILE")
    if not named:
        return {}
    file = Path(named).expanduser().absolute()
    if not file.is_file():
        _fail(f"AGENTLOOP_TOKEN_FILE is {named}: there is no such file")
    return {"AGENTLOOP_TOKEN_FILE": str(file)}


def _fail(text: str) -> NoReturn:
    typer.echo(text, err=True)
    raise typer.Exit(USAGE)


if __name__ == "__main__":
    app(prog_name="python -m scripts.rollout")
