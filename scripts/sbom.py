"""Bills of materials in CycloneDX 1.6: what is in a release, by its wheels, and what is in an image.

`release FILE` reads the wheels of a release; `image NAME` asks the image itself, in a container without
network: its Python packages and its Debian packages. Both print the document, checked against CycloneDX's
own schema.
"""

from __future__ import annotations

import email.parser
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from zipfile import ZipFile

import typer
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

from scripts.containers import Containers, ContainersError
from scripts.release import content

# Runs in the image, with its own Python.
_ASK = """
import json, subprocess
from importlib.metadata import distributions
python = [[d.name, d.version, d.metadata.get("License-Expression") or ""] for d in distributions()]
form = "${Package}\\t${Version}\\t${Architecture}\\n"
debian = subprocess.run(["dpkg-query", "-W", "-f", form], capture_output=True, text=True, check=True).stdout
print(json.dumps({"python": python, "debian": [line.split("\\t") for line in debian.splitlines()]}))
"""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class SbomError(Exception):
    """No bill can be written; the text says why."""


@dataclass(frozen=True, slots=True)
class Part:
    """One package; `kind` and `qualifiers` are those of its package URL, `sha256` of the file it came in."""

    kind: str
    name: str
    version: str
    namespace: str | None = None
    qualifiers: str = ""
    licence: str = ""
    sha256: str = ""

    def component(self) -> Component:
        """As CycloneDX has it."""
        purl = PackageURL(self.kind, self.namespace, self.name, self.version, self.qualifiers or None)
        component = Component(
            name=self.name, version=self.version, purl=purl, bom_ref=str(purl), type=ComponentType.LIBRARY
        )
        if self.sha256:
            component.hashes.add(HashType(alg=HashAlgorithm.SHA_256, content=self.sha256))
        if self.licence:
            component.licenses.add(LicenseExpression(self.licence))
        return component


def of_release(file: Path) -> str:
    """The bill of a release's wheels.

    Raises:
        SbomError: it is none, or holds a wheel that cannot be read.
    """
    try:
        with tarfile.open(file) as tar:
            about = json.loads(content(tar, "release.json"))
            names = sorted(each for each in tar.getnames() if each.endswith(".whl"))
            parts = [_wheel(content(tar, name)) for name in names]
    except (OSError, ValueError, KeyError, tarfile.TarError) as error:
        raise SbomError(f"{file} is no release: {type(error).__name__}: {error}") from error
    return written("agentloop", about["id"], parts)


def _wheel(content: bytes) -> Part:
    with ZipFile(io.BytesIO(content)) as wheel:
        inside = [each for each in wheel.namelist() if each.endswith(".dist-info/METADATA")]
        if len(inside) != 1:
            raise ValueError("a wheel has one METADATA")
        metadata = email.parser.HeaderParser().parsestr(wheel.read(inside[0]).decode(errors="replace"))
    return Part(
        "pypi",
        metadata["Name"],
        metadata["Version"],
        licence=metadata.get("License-Expression", ""),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def of_image(containers: Containers, image: str) -> str:
    """The bill of an image, by what it says of itself.

    Raises:
        ContainersError: it does not run.
        SbomError: it says something else.
    """
    said = containers.output("run", "--rm", "--network", "none", "--entrypoint", "python3", image, "-c", _ASK)
    try:
        found: dict[str, Any] = json.loads(said)
        python = [Part("pypi", name, version, licence=licence) for name, version, licence in found["python"]]
        debian = [
            Part("deb", name, version, "debian", f"arch={arch}&distro=debian-12")
            for name, version, arch in found["debian"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise SbomError(f"{image} did not tell what it holds: {said[:200]!r}") from error
    return written(image.rpartition("/")[2], "", [*python, *debian])


def written(name: str, version: str, parts: Iterable[Part]) -> str:
    """The document, each package once, in order; the same parts make the same document.

    Raises:
        SbomError: CycloneDX's schema refuses it.
    """
    bom = Bom()
    whole = Component(name=name, version=version or None, bom_ref="whole", type=ComponentType.APPLICATION)
    bom.metadata.component = whole
    bom.components.update(part.component() for part in set(parts))
    bom.register_dependency(whole, bom.components)
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    # When and as which document it was written says nothing about what it holds.
    document.pop("serialNumber", None)
    document["metadata"].pop("timestamp", None)
    text = json.dumps(document, indent=2, sort_keys=True) + "\n"
    if wrong := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise SbomError(f"the bill of {name} is not CycloneDX 1.6: {wrong}")
    return text


@app.command("release")
def release_command(
    file: Annotated[Path, typer.Argument(help="A release.", exists=True, dir_okay=False)],
) -> None:
    """Print the bill of a release."""
    try:
        typer.echo(of_release(file), nl=False)
    except SbomError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


@app.command("image")
def image_command(name: Annotated[str, typer.Argument(help="An image that is here.")]) -> None:
    """Print the bill of an image."""
    try:
        typer.echo(of_image(Containers.found(), name), nl=False)
    except (SbomError, ContainersError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app(prog_name="python -m scripts.sbom")
