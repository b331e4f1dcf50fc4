"""A release's bill of materials names each wheel, its hash and its licence, the same each time."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest
from cyclonedx.validation.json import JsonStrictValidator
from typer.testing import CliRunner

from scripts import sbom
from scripts.containers import Containers, ContainersError
from scripts.sbom import Part, SbomError, app, of_release, written


def wheel(name: str, *, metadata: bool = True) -> bytes:
    content = io.BytesIO()
    with ZipFile(content, "w") as file:
        if metadata:
            text = f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\nLicense-Expression: MIT\n"
            file.writestr(f"{name}-1.0.dist-info/METADATA", text)
    return content.getvalue()


def release(path: Path, **wheels: bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in {
            "release.json": b'{"id": "1-abc"}',
            **{f"wheels/{each}-1.0-py3-none-any.whl": c for each, c in wheels.items()},
        }.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def test_each_wheel_is_a_component_with_its_hash_and_licence(tmp_path: Path) -> None:
    file = release(tmp_path / "r.tar", b=wheel("b"), a=wheel("a"))
    bill = json.loads(of_release(file))
    assert (bill["specVersion"], bill["metadata"]["component"]["version"]) == ("1.6", "1-abc")
    first, second = bill["components"]
    assert (first["purl"], second["purl"]) == ("pkg:pypi/a@1.0", "pkg:pypi/b@1.0")
    assert first["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(wheel("a")).hexdigest()}]
    assert first["licenses"] == [{"expression": "MIT"}]
    assert of_release(file) == of_release(file)
    done = CliRunner().invoke(app, ["release", str(file)])
    assert done.stdout == of_release(file)


@pytest.mark.parametrize("content", [b"", b"\0" * 2000, b"PK\x03\x04"])
def test_what_is_no_release_has_no_bill(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "r.tar"
    file.write_bytes(content)
    done = CliRunner().invoke(app, ["release", str(file)])
    assert done.exit_code == 1
    assert "is no release" in done.stderr


def test_a_wheel_that_says_nothing_of_itself_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SbomError, match="a wheel has one METADATA"):
        of_release(release(tmp_path / "r.tar", a=wheel("a", metadata=False)))


def test_a_bill_that_is_not_cyclonedx_is_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JsonStrictValidator, "validate_str", lambda *_: "wrong")
    with pytest.raises(SbomError, match=r"is not CycloneDX 1\.6: wrong"):
        written("x", "1", [Part("pypi", "a", "1")])


def test_an_image_that_is_not_here_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise ContainersError("podman run: no such image")

    monkeypatch.setattr(sbom, "of_image", none)
    monkeypatch.setattr(Containers, "found", classmethod(lambda cls: cls("podman")))
    done = CliRunner().invoke(app, ["image", "x"])
    assert (done.exit_code, done.stderr) == (1, "error: podman run: no such image\n")
