"""Holds uv.lock against infra/pipeline/dependencies.yaml: where packages come from, hashes, age, licences.

`python -m scripts.dependency_policy` prints what breaks a rule, one a line. Exit: 0 nothing does, 1 something
does, 2 a file cannot be read. Licences are read from what is installed here; what is not (another platform's,
Spark's) is named, and its licence was not read.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from importlib.metadata import Distribution, PackageMetadata, distributions
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from license_expression import ExpressionError, get_spdx_licensing
from packaging.utils import canonicalize_name

HOME = Path(__file__).resolve().parents[1]
OURS = ("agent-loop-service", "agentloop")
UNREADABLE = 2
_SPDX = get_spdx_licensing()
_LONGEST_NAME = 100  # a longer License field holds the licence's whole text

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class Breach:
    """A package that breaks a rule: registry, hash, age, licence, or exception (it is over, or idle)."""

    package: str
    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.package}: {self.text}"


@app.command()
def check(
    lock: Annotated[Path, typer.Option(help="The lock file.")] = HOME / "uv.lock",
    policy: Annotated[Path, typer.Option(help="The rules.")] = HOME / "infra/pipeline/dependencies.yaml",
    as_json: Annotated[bool, typer.Option("--json", help="Print the breaches as JSON.")] = False,
) -> None:
    """Print what breaks a rule."""
    try:
        packages: list[dict[str, Any]] = tomllib.loads(lock.read_text(encoding="utf-8"))["package"]
        rules: dict[str, Any] = yaml.safe_load(policy.read_text(encoding="utf-8"))
        installed = installed_here()
        found = breaches(packages, rules, installed, datetime.now(UTC))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        typer.echo(f"error: {lock} or {policy} cannot be used: {type(error).__name__}: {error}", err=True)
        raise typer.Exit(UNREADABLE) from error
    absent = sorted(p["name"] for p in packages if p["name"] not in installed and p["name"] not in OURS)
    if as_json:
        typer.echo(json.dumps({"breaches": [str(each) for each in found], "licence_not_read": absent}))
    else:
        for each in found:
            typer.echo(str(each))
        typer.echo(
            f"{len(packages)} packages, {len(found)} breaches of {policy.name}."
            f" Not installed here, so their licences were not read: {', '.join(absent) or 'none'}.",
            err=True,
        )
    raise typer.Exit(1 if found else 0)


def installed_here() -> dict[str, Distribution]:
    """Packages of this environment, by their normal names."""
    return {canonicalize_name(each.name): each for each in distributions()}


def breaches(
    packages: list[dict[str, Any]],
    rules: Mapping[str, Any],
    installed: Mapping[str, Distribution],
    now: datetime,
) -> list[Breach]:
    """Every breach that no exception in force allows, and every exception that is over or allows nothing."""
    shipped = closure(packages, OURS)
    found: list[Breach] = []
    for package in packages:
        if package["name"] in OURS:
            continue
        found += [*_origin(package, rules), *_age(package, rules["age"], now)]
        if package["name"] in installed:
            found += _licence(package["name"], installed[package["name"]], rules, package["name"] in shipped)
    return _without_exceptions(found, rules["exceptions"], now.date(), set(installed))


def closure(packages: Iterable[Mapping[str, Any]], roots: Iterable[str]) -> set[str]:
    """Names of all that `roots` need, without their own extras, on whichever platform."""
    by_name = {package["name"]: package for package in packages}
    wanted = [(name, "") for name in roots if name in by_name]
    seen: set[tuple[str, str]] = set()
    while wanted:
        name, extra = each = wanted.pop()
        if each in seen:
            continue
        seen.add(each)
        package = by_name[name]
        needed = package.get("optional-dependencies", {}).get(extra, []) if extra else []
        for need in [*package.get("dependencies", []), *needed]:
            wanted += [(need["name"], also) for also in ("", *need.get("extra", ()))]
    return {name for name, _ in seen}


def _origin(package: Mapping[str, Any], rules: Mapping[str, Any]) -> Iterator[Breach]:
    name, source = package["name"], package["source"]
    if source.get("registry") not in rules["registries"]:
        yield Breach(name, "registry", f"comes from {source}, not from {' or '.join(rules['registries'])}")
    files = _files(package)
    if not files:
        yield Breach(name, "hash", "the lock file names no file of it")
    for file in files:
        if not str(file.get("hash", "")).startswith("sha256:"):
            yield Breach(name, "hash", f"{file.get('url')} has no sha256 in the lock file")


def _age(package: Mapping[str, Any], limits: Mapping[str, int], now: datetime) -> Iterator[Breach]:
    name, version = package["name"], package["version"]
    times = [file["upload-time"] for file in _files(package) if "upload-time" in file]
    if not times:
        yield Breach(name, "age", f"{version} has no upload time in the lock file; `uv lock` writes them")
        return
    days = (now - min(map(_moment, times))).days
    if days < limits["at_least"]:
        yield Breach(name, "age", f"{version} is {days} days old; it must be at least {limits['at_least']}")
    if days > limits["at_most"]:
        yield Breach(name, "age", f"{version} is {days} days old; it may be {limits['at_most']}")


def _files(package: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]


def _moment(written: datetime | str) -> datetime:
    return written if isinstance(written, datetime) else datetime.fromisoformat(written)


def _licence(name: str, found: Distribution, rules: Mapping[str, Any], shipped: bool) -> Iterator[Breach]:
    licence = licence_of(name, found, rules)
    lists = rules["licences"]
    allowed = {*lists["shipped"], *(() if shipped else lists["beside"])}
    where = "shipped" if shipped else "used beside"
    if not licence:
        yield Breach(name, "licence", "its metadata names no licence; read it, and add it to read_by_hand")
        return
    try:
        if not allows(licence, allowed):
            yield Breach(name, "licence", f"its licence, {licence}, is none of those that may be {where}")
    except ExpressionError:
        yield Breach(name, "licence", f"its licence, {licence!r}, is no SPDX name; add it to spelled")


def licence_of(name: str, found: Distribution, rules: Mapping[str, Any]) -> str:
    """An SPDX expression, if its metadata has one or the rules know what its words mean; else those words."""
    if name in rules["read_by_hand"]:
        return str(rules["read_by_hand"][name]["licence"])
    metadata = found.metadata
    if expression := _said(metadata, "License-Expression"):
        return expression
    endings = [
        each.rpartition(" :: ")[2]
        for each in metadata.get_all("Classifier") or ()
        if each.startswith("License :: ") and each != "License :: OSI Approved"
    ]
    text = _said(metadata, "License").strip()
    names = endings or ([text] if 0 < len(text) <= _LONGEST_NAME else [])
    return " AND ".join(rules["spelled"].get(each, each) for each in names if each != "DFSG approved")


def _said(metadata: PackageMetadata, field: str) -> str:
    return str(metadata[field]) if field in metadata else ""


def allows(expression: str, allowed: set[str]) -> bool:
    """Whether a licence expression can be kept with these licences alone.

    Raises:
        ExpressionError: it is not one (SPDX 2.3, annex D).
    """

    def kept(node: Any) -> bool:
        if isinstance(node, _SPDX.AND):
            return all(kept(each) for each in node.args)
        if isinstance(node, _SPDX.OR):
            return any(kept(each) for each in node.args)
        return str(node.render()) in allowed

    return kept(_SPDX.parse(expression, validate=False))


def _without_exceptions(
    found: list[Breach], exceptions: Iterable[Mapping[str, Any]], today: date, installed: set[str]
) -> list[Breach]:
    left = list(found)
    broken = {(each.package, each.rule) for each in found}
    for each in exceptions:
        name, rule = each["package"], each["rule"]
        if not each.get("reason"):
            left.append(Breach(name, "exception", f"its exception from {rule} has no reason"))
        elif each["until"] < today:
            left.append(Breach(name, "exception", f"its exception from {rule} was until {each['until']}"))
        elif (name, rule) not in broken and (rule != "licence" or name in installed):
            left.append(Breach(name, "exception", f"its exception from {rule} allows nothing: remove it"))
        else:
            left = [one for one in left if (one.package, one.rule) != (name, rule)]
    return left


if __name__ == "__main__":
    app(prog_name="python -m scripts.dependency_policy")
