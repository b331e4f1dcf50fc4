"""Packs what a host in AWS plays on itself as it comes up: Ansible's wheels, and the roles of infra/ansible.

`python -m scripts.host_bundle` prints the file's path, var/releases/agentloop-ansible-<id>.tar. The id names
the content. Inside: `ansible/` (roles, modules, playbooks, what inventories/aws says of groups; nobody's own
inventory), `wheels/` and `requirements.txt` (pinned, with SHA-256). It goes to the bucket, beside the release
of the server.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

import typer

from scripts import release

PARTS = ("ansible.cfg", "library", "module_utils", "playbooks", "roles", "inventories/aws/group_vars")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bundle(
    out: Annotated[Path, typer.Option(help="Where the file is put.")] = Path("var/releases"),
    source: Annotated[Path, typer.Option(help="The checkout that it is made of.")] = release.HOME,
    as_json: Annotated[bool, typer.Option("--json", help="Print id and path as JSON.")] = False,
) -> None:
    """Make the bundle of a checkout as it is now, unless it is there already."""
    try:
        uv = release.uv_program()
        export = [uv, "export", "--quiet", "--frozen", "--only-group", "host", "--no-header", "--no-annotate"]
        pinned = release.run(export, source)
        wheels = sorted(release.third_parties(uv, pinned, source).glob("*.whl"))
        name, path = pack(source / "infra/ansible", wheels, pinned, out.resolve())
    except (release.ReleaseError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(json.dumps({"id": name, "path": str(path)}) if as_json else str(path))


def pack(ansible: Path, wheels: list[Path], pinned: str, out: Path) -> tuple[str, Path]:
    """Write the file, whole or not at all; one that is there is left as it is."""
    files = [path for part in PARTS for path in _files(ansible / part)]
    digest = hashlib.sha256(pinned.encode())
    for path in files:
        digest.update(f"\n{path.relative_to(ansible)}\n".encode() + path.read_bytes())
    name = digest.hexdigest()[: release.ID_DIGITS]
    path = out / f"agentloop-ansible-{name}.tar"
    if path.exists():
        return name, path
    with release.new_tar(path) as tar:
        release.add_text(tar, "requirements.txt", pinned)
        for file in files:
            tar.add(file, f"ansible/{file.relative_to(ansible)}", filter=release.anonymous)
        for wheel in wheels:
            tar.add(wheel, f"wheels/{wheel.name}", filter=release.anonymous)
    return name, path


def _files(part: Path) -> list[Path]:
    if part.is_file():
        return [part]
    return sorted(path for path in part.rglob("*") if path.is_file() and path.suffix != ".pyc")


if __name__ == "__main__":
    app(prog_name="python -m scripts.host_bundle")
