"""Builds the images of infra/containers/Containerfile: `make images`, and for `make build`.

Their tag is the release's id, which names the content. Base and images are known by their ids: what was
built is `<release>.images.json` beside the release, with the base, the layers and the size of each.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from scripts.containers import HOME, Containers, ContainersError
from scripts.release import ReleaseError, make, tracked, uv_program
from validation.files import write_json

TARGETS = ("server", "postgres")
PREFIX = "localhost/agentloop"
TRACKED = ("pyproject.toml", "uv.lock", "agentloop/pyproject.toml", "infra/containers")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def images(
    targets: Annotated[list[str], typer.Argument(help=f"Which: {', '.join(TARGETS)}.")],
    out: Annotated[Path, typer.Option(help="Where the release lies, or is put.")] = Path("var/releases"),
    base: Annotated[str, typer.Option(envvar="BASE", help="A base image by digest; empty: our own.")] = "",
) -> None:
    """Build images of this checkout; prints what was built as JSON."""
    try:
        name, release = make(HOME, out.resolve())
        typer.echo(record(build(targets, release, name, base), release).read_text(encoding="utf-8"), nl=False)
    except (ContainersError, ReleaseError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def build(targets: Sequence[str], release: Path, name: str, base: str = "") -> dict[str, dict[str, Any]]:
    """Each target's image, and what it is.

    Raises:
        ContainersError: a target is none, or does not build.
    """
    if unknown := [each for each in targets if each not in TARGETS]:
        raise ContainersError(f"there is no image {unknown[0]!r}; there are {', '.join(TARGETS)}")
    containers = Containers.found()
    base = checked_base(base) or _own_base(containers)
    made = {}
    with context(release) as folder:
        for target in targets:
            tag = f"{PREFIX}-{target}:{name}"
            containers.call(
                *("build", "--file", str(folder / "infra/containers/Containerfile"), "--target", target),
                *("--build-arg", f"BASE={base}", "--network", "host", "--tag", tag),
                *_cache(containers),
                str(folder),
            )
            found = containers.inspected(tag)
            made[target] = {
                "name": tag,
                "id": found["Id"],
                "base": base,
                "layers": found["RootFS"]["Layers"],
                "bytes": found["Size"],
            }
    return made


def checked_base(base: str) -> str:
    """A base that somebody names must name one content.

    Raises:
        ContainersError: it may be another one tomorrow.
    """
    if base and "sha256:" not in base:
        raise ContainersError(f"BASE is {base!r}, which may be another one tomorrow: name it by its digest")
    return base


def record(made: dict[str, dict[str, Any]], release: Path) -> Path:
    """Write what was built beside the release."""
    path = release.with_suffix(".images.json")
    write_json(path, made)
    return path


@contextmanager
def context(release: Path) -> Iterator[Path]:
    """A folder with what the Containerfile copies: tracked files, the release's own wheels, uv."""
    with tempfile.TemporaryDirectory(prefix="agentloop-images-") as name:
        folder = Path(name)
        for each in tracked(HOME, *TRACKED):
            (folder / each).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(HOME / each, folder / each)
        _wheels(release, folder / "wheels")
        shutil.copy2(Path(uv_program()).resolve(), folder / "uv")
        yield folder


def _wheels(release: Path, folder: Path) -> None:
    folder.mkdir()
    with tarfile.open(release) as tar:
        for entry in tar.getmembers():
            if entry.name.startswith(("wheels/agentloop-", "wheels/agent_loop_service-")):
                entry.name = Path(entry.name).name
                tar.extract(entry, folder, filter="data")


def _own_base(containers: Containers) -> str:
    done = subprocess.run(
        [HOME / "scripts/container_base.sh", containers.program],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0 or not done.stdout.strip():
        raise ContainersError("no base image could be made: see above")
    return done.stdout.strip().splitlines()[-1]


def _cache(containers: Containers) -> tuple[str, ...]:
    """The cache of uv for the build, where the program can lend it: nothing is fetched twice."""
    if containers.program != "podman":
        return ()
    cache = (
        os.environ.get("UV_CACHE_DIR") or f"{os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'}/uv"
    )
    Path(cache).mkdir(parents=True, exist_ok=True)
    return ("--volume", f"{cache}:/cache/uv")


if __name__ == "__main__":
    app(prog_name="python -m scripts.images")
