"""What may be in the lock file is what the policy says, and an exception has a reason and an end."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from email.message import Message
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from license_expression import ExpressionError
from typer.testing import CliRunner

from scripts import dependency_policy
from scripts.dependency_policy import OURS, allows, app, breaches, closure, licence_of

NOW = datetime(2026, 11, 24, tzinfo=UTC)
RULES: dict[str, Any] = {
    "registries": ["https://pypi.org/simple"],
    "age": {"at_least": 3, "at_most": 1461},
    "licences": {"shipped": ["MIT"], "beside": ["GPL-3.0-or-later"]},
    "spelled": {"MIT License": "MIT"},
    "read_by_hand": {},
    "exceptions": [],
}


class Installed:
    """A package whose metadata says this."""

    def __init__(self, *lines: tuple[str, str]) -> None:
        self.metadata = Message()
        for name, value in lines:
            self.metadata[name] = value


MIT = Installed(("License-Expression", "MIT"))


def package(name: str, days: float = 100, **changes: Any) -> dict[str, Any]:
    file = {
        "url": f"https://files/{name}.whl",
        "hash": "sha256:00",
        "upload-time": NOW - timedelta(days=days),
    }
    source = {"registry": "https://pypi.org/simple"}
    return {"name": name, "version": "1", "source": source, "wheels": [file]} | changes


def found(
    *packages: dict[str, Any], installed: Mapping[str, Installed] | None = None, **rules: Any
) -> list[str]:
    ours = {"name": OURS[0], "version": "1", "source": {}, "dependencies": [{"name": "shipped"}]}
    return [
        str(each)
        for each in breaches(
            [ours, *packages],
            RULES | rules,
            cast("Mapping[str, Distribution]", installed or {}),
            NOW,
        )
    ]


def test_a_package_from_the_registry_with_hashes_some_days_old_is_fine() -> None:
    assert found(package("shipped"), installed={"shipped": MIT}) == []


def test_other_places_missing_hashes_and_files_are_breaches() -> None:
    assert found(package("shipped", source={"git": "https://example.com/x"}))[0].startswith(
        "shipped: comes from {'git'"
    )
    bare = package("shipped")
    bare["wheels"][0]["hash"] = "md5:00"
    assert "has no sha256" in found(bare)[0]
    assert found(package("shipped", wheels=[])) == [
        "shipped: the lock file names no file of it",
        "shipped: 1 has no upload time in the lock file; `uv lock` writes them",
    ]


@pytest.mark.parametrize(
    ("days", "breach"),
    [
        (2.9, "2 days old; it must be at least 3"),
        (3, ""),
        (1461, ""),
        (1462, "1462 days old; it may be 1461"),
    ],
)
def test_versions_are_neither_brand_new_nor_forgotten(days: float, breach: str) -> None:
    told = found(package("shipped", days))
    assert bool(told) == bool(breach)
    assert breach in "".join(told)


def test_a_clock_that_was_set_back_passes_nothing_as_old() -> None:
    assert "must be at least 3" in found(package("shipped", -400))[0]


def test_what_is_shipped_has_fewer_licences_than_what_is_used_beside() -> None:
    gpl = Installed(("License-Expression", "GPL-3.0-or-later"))
    packages = (package("shipped"), package("tool"))
    assert found(*packages, installed={"shipped": MIT, "tool": gpl}) == []
    assert found(*packages, installed={"shipped": gpl, "tool": MIT}) == [
        "shipped: its licence, GPL-3.0-or-later, is none of those that may be shipped"
    ]


@pytest.mark.parametrize(
    ("lines", "licence"),
    [
        ([("License-Expression", "MIT OR X")], "MIT OR X"),
        ([("Classifier", "License :: OSI Approved :: MIT License"), ("License", "x" * 5000)], "MIT"),
        ([("Classifier", "License :: OSI Approved"), ("License", "MIT License")], "MIT"),
        ([("License", "x" * 5000)], ""),
        ([], ""),
    ],
)
def test_a_licence_is_read_from_wherever_the_metadata_has_it(
    lines: list[tuple[str, str]], licence: str
) -> None:
    assert licence_of("x", cast("Distribution", Installed(*lines)), RULES) == licence


def test_a_licence_that_no_program_can_read_asks_for_a_person() -> None:
    assert "names no licence" in found(package("shipped"), installed={"shipped": Installed()})[0]
    odd = Installed(("License", "see (the file"))
    assert "is no SPDX name" in found(package("shipped"), installed={"shipped": odd})[0]
    read = {"shipped": {"licence": "MIT", "where": "LICENSE"}}
    assert found(package("shipped"), installed={"shipped": odd}, read_by_hand=read) == []


def test_and_needs_all_licences_and_or_needs_any() -> None:
    assert allows("MIT OR GPL-2.0-only", {"MIT"})
    assert not allows("MIT AND GPL-2.0-only", {"MIT"})
    assert allows("MIT AND Apache-2.0 WITH LLVM-exception", {"MIT", "Apache-2.0 WITH LLVM-exception"})
    assert not allows("Apache-2.0 WITH LLVM-exception", {"Apache-2.0"})
    with pytest.raises(ExpressionError):
        allows("MIT AND (", {"MIT"})


def test_an_exception_ends_and_one_that_allows_nothing_goes() -> None:
    old = package("shipped", 5000)
    one = {"package": "shipped", "rule": "age", "reason": "finished", "until": date(2027, 1, 1)}
    assert found(old, exceptions=[one]) == []
    assert "was until 2026-01-01" in found(old, exceptions=[one | {"until": date(2026, 1, 1)}])[-1]
    assert "has no reason" in found(old, exceptions=[one | {"reason": ""}])[-1]
    assert found(package("shipped"), exceptions=[one]) == [
        "shipped: its exception from age allows nothing: remove it"
    ]
    # Of what is not installed here nobody knows the licence.
    assert found(package("shipped"), exceptions=[one | {"rule": "licence"}]) == []


def test_what_is_shipped_follows_extras_and_circles() -> None:
    packages: list[dict[str, Any]] = [
        {"name": "agentloop", "dependencies": [{"name": "a", "extra": ["more"]}]},
        {"name": "a", "dependencies": [{"name": "b"}], "optional-dependencies": {"more": [{"name": "c"}]}},
        {"name": "b", "dependencies": [{"name": "a"}], "optional-dependencies": {"more": [{"name": "d"}]}},
        {"name": "c"},
        {"name": "d"},
    ]
    assert closure(packages, ["agentloop"]) == {"agentloop", "a", "b", "c"}


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """To read the metadata of hundreds of packages takes a second."""
    monkeypatch.setattr(dependency_policy, "installed_here", dict)


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize("text", ["", "[[package", "version = 1", '[[package]]\nname = "x"'])
def test_a_lock_file_that_is_none_is_told_in_a_line(tmp_path: Path, text: str) -> None:
    lock = tmp_path / "uv.lock"
    lock.write_text(text)
    done = CliRunner().invoke(app, ["--lock", str(lock)])
    assert done.exit_code == 2
    assert "cannot be used" in done.stderr


@pytest.mark.usefixtures("nothing_installed")
def test_breaches_are_printed_and_fail(tmp_path: Path) -> None:
    lock = tmp_path / "uv.lock"
    lock.write_text(
        '[[package]]\nname = "rich"\nversion = "1"\nsource = { git = "x" }\n'
        'sdist = { hash = "sha256:00", upload-time = "2026-01-01T00:00:00Z" }\n'
    )
    policy = tmp_path / "policy.yaml"
    policy.write_text(yaml.safe_dump(RULES))
    files = ["--lock", str(lock), "--policy", str(policy)]
    for options in ([], ["--json"]):
        done = CliRunner().invoke(app, [*files, *options])
        assert done.exit_code == 1
        assert "rich: comes from {'git': 'x'}" in done.stdout
