"""Asks the Python Packaging Advisory Database which versions of uv.lock have known vulnerabilities.

Only an answer counts: a mirror of the registry may hold no advisories, and pip-audit then finds nothing
and is content. So it is first asked of a version that has some; where it names none, nothing is audited,
and this fails.

Exit: 0 nothing known that the policy does not except, 1 something is, 3 the database was not reached.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from scripts.release import HOME, run, uv_program

CONTROL = ("jinja2", "2.10")
"""Has had known vulnerabilities since 2019 (PYSEC-2019-217 and others)."""
VULNERABLE, NOT_AUDITED = 1, 3

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class NotAuditedError(Exception):
    """The database was not reached, or not all of the packages could be looked up; the text says why."""


@app.command()
def audit(
    policy: Annotated[Path, typer.Option(help="The rules.")] = HOME / "infra/pipeline/dependencies.yaml",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Print the known vulnerabilities of what is locked."""
    exceptions = yaml.safe_load(policy.read_text(encoding="utf-8"))["vulnerabilities"]
    try:
        see_that_it_answers(pip_audit)
        count, found = known(pip_audit, locked(), exceptions, datetime.now(UTC).date())
    except NotAuditedError as error:
        typer.echo(f"NOT AUDITED: {error}", err=True)
        raise typer.Exit(NOT_AUDITED) from error
    if as_json:
        typer.echo(json.dumps({"audited": count, "vulnerabilities": found}))
    else:
        for each in found:
            typer.echo(each)
        typer.echo(f"{count} packages audited, {len(found)} vulnerabilities.", err=True)
    raise typer.Exit(VULNERABLE if found else 0)


def locked() -> str:
    """All that may be installed of the lock file, as requirements with hashes."""
    export = [uv_program(), "export", "--quiet", "--frozen", "--all-extras", "--all-groups"]
    return run([*export, "--no-emit-workspace", "--no-header", "--no-annotate"], HOME)


def pip_audit(requirements: str, *options: str) -> dict[str, Any]:
    """pip-audit's report on these requirements.

    Raises:
        NotAuditedError: it made none.
    """
    with tempfile.TemporaryDirectory(prefix="agentloop-audit-") as folder:
        listed = Path(folder, "requirements.txt")
        listed.write_text(requirements, encoding="utf-8")
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip_audit", "--strict", "--disable-pip", "--progress-spinner=off"),
                *("--format", "json", "--requirement", str(listed), *options),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        said = done.stderr.strip().splitlines()
        raise NotAuditedError(f"pip-audit: {said[-1] if said else f'exit code {done.returncode}'}") from None
    return report


def see_that_it_answers(ask: Callable[..., Mapping[str, Any]]) -> None:
    """Raises NotAuditedError unless the database knows of CONTROL's vulnerabilities."""
    name, version = CONTROL
    report = ask(f"{name}=={version}\n", "--no-deps")
    if not any(each.get("vulns") for each in report["dependencies"]):
        raise NotAuditedError(
            f"asked of {name} {version}, which has known vulnerabilities, the database named none. What"
            " stands for PyPI here has no advisories; run this where https://pypi.org itself can be reached"
        )


def known(
    ask: Callable[..., Mapping[str, Any]],
    requirements: str,
    exceptions: list[Mapping[str, Any]],
    today: date,
) -> tuple[int, list[str]]:
    """How many packages were looked up, and a line for each vulnerability that no exception in force names.

    Raises:
        NotAuditedError: a package was not looked up.
    """
    packages = ask(requirements, "--require-hashes")["dependencies"]
    if skipped := [f"{each['name']} ({each['skip_reason']})" for each in packages if "skip_reason" in each]:
        raise NotAuditedError(f"not looked up: {', '.join(skipped)}")
    excepted = {each["id"] for each in exceptions if each.get("reason") and each["until"] >= today}
    lines = []
    for package in packages:
        for one in package["vulns"]:
            if excepted.isdisjoint({one["id"], *one.get("aliases", ())}):
                mended = ", ".join(one.get("fix_versions", ())) or "no version yet"
                lines.append(f"{package['name']} {package['version']}: {one['id']}, mended in {mended}")
    return len(packages), lines


if __name__ == "__main__":
    app(prog_name="python -m scripts.vulnerabilities")
