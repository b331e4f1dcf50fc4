"""`make build`: the release, its images, a bill of materials of each, and the deployer's signatures of all.

All lies in var/releases, named by the release's id: `agentloop-<id>.tar` (wheels), `.cdx.json`,
`.images.json`, `.<image>.cdx.json`, and with AGENTLOOP_SIGNING_KEY a `.sig` beside each. Without a key it
says that nothing is signed: a deployment that names who may sign (`server_signers`) refuses such a
release.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from scripts import images, sbom
from scripts.containers import HOME, Containers, ContainersError
from scripts.release import ReleaseError, make
from scripts.signing import SignatureError, sign

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def build(
    image: Annotated[list[str] | None, typer.Option(help="An image to build; repeatable.")] = None,
    out: Annotated[Path, typer.Option(help="Where all is put.")] = Path("var/releases"),
    key: Annotated[
        Path | None,
        typer.Option(envvar="AGENTLOOP_SIGNING_KEY", help="The deployer's key.", exists=True, dir_okay=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Build, list and sign this checkout's release."""
    try:
        name, release = make(HOME, out.resolve())
        files = [release, _bill(release, "", sbom.of_release(release))]
        if image:
            made = images.build(image, release, name)
            files.append(images.record(made, release))
            containers = Containers.found()
            files += [
                _bill(release, f".{target}", sbom.of_image(containers, found["name"]))
                for target, found in made.items()
            ]
        signatures = [sign(file, key) for file in files] if key else []
    except (ReleaseError, ContainersError, SignatureError, sbom.SbomError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if not key:
        typer.echo("NOT SIGNED: AGENTLOOP_SIGNING_KEY names no key of the deployer's.", err=True)
    paths = [str(path) for path in [*files, *signatures]]
    typer.echo(json.dumps({"id": name, "files": paths}) if as_json else "\n".join(paths))


def _bill(release: Path, of: str, text: str) -> Path:
    path = release.with_suffix(f"{of}.cdx.json")
    path.write_text(text, encoding="utf-8")
    return path


if __name__ == "__main__":
    app(prog_name="python -m scripts.build")
