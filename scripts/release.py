"""Packs what a serving host runs into one file: our two wheels and, of the lock file, what they need.

`python -m scripts.release` prints the file's path, var/releases/agentloop-<id>.tar. The id names the content:
the same code and the same lock file make the same id. Inside: `wheels/`, `requirements.txt` (pinned, with
SHA-256) and `release.json` (id, version, commit). Third parties' wheels are cached outside the checkout.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

HOME = Path(__file__).resolve().parents[1]
PACKAGES = ("agentloop", "agent-loop-service")
PYTHON = "3.11"
"""Debian 12's, on which the release is installed."""
PIP = "pip@26.0"
"""uv (0.13) cannot download wheels without installing them."""
SOURCE_DATE_EPOCH = "1580601600"
"""Wheels hold times; with one for all (any after 1980) the same code makes the same wheel."""
ID_DIGITS = 12

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class ReleaseError(Exception):
    """It cannot be made; the text says why."""


@app.command()
def release(
    out: Annotated[Path, typer.Option(help="Where the file is put.")] = Path("var/releases"),
    source: Annotated[Path, typer.Option(help="The checkout that it is made of.")] = HOME,
    as_json: Annotated[bool, typer.Option("--json", help="Print id and path as JSON.")] = False,
) -> None:
    """Make the release of a checkout as it is now, committed or not, unless it is there already."""
    try:
        name, path = make(source.resolve(), out.resolve())
    except (ReleaseError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(json.dumps({"id": name, "path": str(path)}) if as_json else str(path))


def make(source: Path, out: Path) -> tuple[str, Path]:
    """The release's id, and its file in `out`.

    Raises:
        ReleaseError: if a wheel cannot be had or built.
    """
    uv = uv_program()
    pinned = run(
        [
            uv,
            "export",
            "--quiet",
            "--frozen",
            "--no-dev",
            "--no-emit-workspace",
            "--no-header",
            "--no-annotate",
        ],
        source,
    )
    with tempfile.TemporaryDirectory(prefix="agentloop-release-") as folder:
        for package in PACKAGES:
            run(
                [uv, "build", "--quiet", "--wheel", "--package", package, "--out-dir", folder],
                source,
                {"SOURCE_DATE_EPOCH": SOURCE_DATE_EPOCH},
            )
        wheels = sorted([*Path(folder).glob("*.whl"), *third_parties(uv, pinned, source).glob("*.whl")])
        return pack(wheels, _requirements(pinned, sorted(Path(folder).glob("*.whl"))), out, _commit(source))


def pack(wheels: list[Path], requirements: str, out: Path, commit: str) -> tuple[str, Path]:
    """Write the file of these wheels, whole or not at all; one that is there is left as it is."""
    digest = hashlib.sha256(requirements.encode())
    for name in sorted(wheel.name for wheel in wheels):
        digest.update(name.encode() + b"\n")
    version = next(found[1] for w in wheels if (found := re.match(r"agent_loop_service-([^-]+)-", w.name)))
    name = f"{version}-{digest.hexdigest()[:ID_DIGITS]}"
    path = out / f"agentloop-{name}.tar"
    if path.exists():
        return name, path
    about = json.dumps({"id": name, "version": version, "commit": commit}, indent=2, sort_keys=True) + "\n"
    with new_tar(path) as tar:
        add_text(tar, "release.json", about)
        add_text(tar, "requirements.txt", requirements)
        for wheel in wheels:
            tar.add(wheel, f"wheels/{wheel.name}", filter=anonymous)
    return name, path


@contextmanager
def new_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar file to fill, with its folder; it is there whole when the block ends well, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with tarfile.open(partial, "w") as tar:
            yield tar
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def content(tar: tarfile.TarFile, name: str) -> bytes:
    """What a file in a release holds.

    Raises:
        KeyError: there is none of that name.
        ValueError: it is something else than a file.
    """
    found = tar.extractfile(name)
    if found is None:
        raise ValueError(f"{name} is no file")
    return found.read()


def _requirements(pinned: str, ours: list[Path]) -> str:
    """What `pip install --no-index --require-hashes` is given: the lock file's pins, and our own wheels."""
    lines = [
        f"./wheels/{wheel.name} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}"
        for wheel in ours
    ]
    return pinned.rstrip("\n") + "\n" + "\n".join(lines) + "\n"


def third_parties(uv: str, pinned: str, source: Path) -> Path:
    """A folder with a wheel for every pin, from the cache or from the registry; the hashes are checked."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agentloop"
    folder = cache / f"wheels-{hashlib.sha256(pinned.encode()).hexdigest()[:ID_DIGITS]}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=cache))
    try:
        (partial / "requirements.txt").write_text(pinned)
        run(
            [
                *(uv, "tool", "run", "--quiet", "--python", PYTHON, PIP, "download", "--quiet", "--no-deps"),
                *("--require-hashes", "--only-binary=:all:", "--disable-pip-version-check"),
                *("--dest", str(partial), "--requirement", str(partial / "requirements.txt")),
            ],
            source,
        )
        partial.chmod(0o755)
        partial.rename(folder)
    except OSError:
        if not folder.exists():  # else somebody else was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _commit(source: Path) -> str:
    """The commit that it was made of, with `-dirty` where files differ from it; "unknown" outside of git."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def add_text(tar: tarfile.TarFile, name: str, text: str) -> None:
    """Add a file of this text, which is nobody's and of no time."""
    entry = tarfile.TarInfo(name)
    entry.size = len(text.encode())
    entry.mode = 0o644
    tar.addfile(entry, io.BytesIO(text.encode()))


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without whose file it was, and when."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o644
    return entry


def uv_program() -> str:
    """The path of uv, which is fetched if need be. Raises ReleaseError if it cannot be had."""
    return run([str(HOME / "scripts/uv.sh")], HOME).strip()


def tracked(root: Path, *under: str) -> list[str]:
    """The files of a checkout that git tracks, or would once they are added; all, or those `under`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *under]
    names = sorted(set(filter(None, run(command, root).split("\0"))))
    return [name for name in names if (root / name).is_file()]


def run(command: list[str], folder: Path, more: Mapping[str, str] | None = None) -> str:
    """What a command prints. Raises ReleaseError with what it complained of, if it fails."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | (more or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ReleaseError(f"{' '.join(command[:4])} …: {done.stderr.strip()[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    app(prog_name="python -m scripts.release")
