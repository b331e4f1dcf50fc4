"""A release holds what it says, and is named by that."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

from scripts.release import _requirements, pack


def wheels(folder: Path, content: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    names = ("agent_loop_service-0.1.0-py3-none-any.whl", "agentloop-0.1.0-py3-none-any.whl")
    for name in names:
        (folder / name).write_text(content)
    return [folder / name for name in names]


def packed(tmp_path: Path, content: str) -> tuple[str, Path]:
    made = wheels(tmp_path / "wheels", content)
    return pack(made, _requirements("grpcio==1 --hash=sha256:0\n", made), tmp_path / "out", "abc")


def test_the_same_content_has_the_same_name_and_is_left_as_it_is(tmp_path: Path) -> None:
    name, path = packed(tmp_path, "one")
    before = path.stat().st_mtime_ns
    assert packed(tmp_path, "one") == (name, path)
    assert path.stat().st_mtime_ns == before
    other, _ = packed(tmp_path, "two")
    assert other != name


def test_it_holds_the_wheels_their_hashes_and_what_it_was_made_of(tmp_path: Path) -> None:
    name, path = packed(tmp_path, "one")
    assert path.name == f"agentloop-{name}.tar"
    with tarfile.open(path) as tar:
        assert sorted(tar.getnames())[:2] == ["release.json", "requirements.txt"]
        about = tar.extractfile("release.json")
        pins = tar.extractfile("requirements.txt")
        assert about is not None
        assert pins is not None
        assert json.loads(about.read()) == {"id": name, "version": "0.1.0", "commit": "abc"}
        lines = pins.read().decode().splitlines()
        assert all(entry.mtime == 0 and entry.uid == 0 for entry in tar.getmembers())
    assert lines[0] == "grpcio==1 --hash=sha256:0"
    assert lines[1].startswith("./wheels/agent_loop_service-0.1.0-py3-none-any.whl --hash=sha256:")
    assert list((tmp_path / "out").iterdir()) == [path]
