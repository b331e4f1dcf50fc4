"""Who is evaluated: champion, candidate, the best that ever served, the untouched base held to the schema."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agentloop.client import AsyncClient
from grpc_server.domain.types import ChatRequest
from training import best_ever, bfcl, cycle, suites, unlearn


class UnknownModelError(RuntimeError):
    """There is no GGUF here for a model version, or it has other bytes."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where things are, and what serves: what differs from machine to machine."""

    state_dir: Path
    cycles_dir: Path
    base_gguf: Path
    model_name: str = "gemma-3-270m"
    engine: str = "embedded"
    server: str | None = None
    token: str | None = None
    token_file: Path | None = None
    alias: str = "default"


@dataclass(frozen=True, slots=True)
class Subject:
    """Who is asked: a GGUF under its model version's name; `prepare` makes of a question what it is asked."""

    name: suites.Subject
    model_version: str
    gguf: Path
    sha256: str
    prepare: Callable[[ChatRequest], ChatRequest] = lambda request: request

    @property
    def who(self) -> dict[str, str]:
        """Model version and sha256."""
        return {"model_version": self.model_version, "sha256": self.sha256}


def candidate(directory: Path, place: Place) -> str:
    """The model version that this cycle makes."""
    return f"{place.model_name}:{directory.resolve().name}"


async def serving(place: Place) -> tuple[str, str]:
    """The live server's champion (the stable target of its alias), and its sha256."""
    async with AsyncClient(address(place), place.token, token_file=place.token_file) as client:
        name = (await client.get_route(place.alias)).stable
        installed = {model.name: model.sha256 for model in await client.list_models()}
        return name, installed.get(name, "")


def address(place: Place) -> str | None:
    """Where the live server is: as given, as the server of this state folder wrote, or a default."""
    written = place.state_dir / "server.json"
    if place.server or os.environ.get("AGENTLOOP_SERVER") or not written.is_file():
        return place.server
    return str(cycle.read_json(written)["grpc_url"])


def subjects(
    directory: Path, place: Place, few_shot: Sequence[bfcl.Item], champion: str, sha256: str = ""
) -> list[Subject]:
    """Champion, candidate and constrained base, their GGUFs found and hashed.

    Args:
        directory: the cycle that made the candidate.
        place: where the other GGUFs are.
        few_shot: what the constrained base is shown.
        champion: the model version that serves.
        sha256: what its GGUF must have; empty if not known.

    Raises:
        UnknownModelError: if a GGUF is not there, or the champion's has other bytes.
    """
    return [
        _subject("champion", champion, _gguf(champion, place), sha256),
        _subject("candidate", candidate(directory, place), directory / "model.gguf"),
        replace(
            _subject("base_constrained", f"{place.model_name}:base", place.base_gguf),
            prepare=lambda request: suites.constrained(request, few_shot),
        ),
    ]


def best(directory: Path, place: Place, suite: str, champion: Subject) -> Subject:
    """Of all that have served, the best on a suite whose GGUF is still here; often the champion itself.

    One that was withdrawn, because it learned what was erased since, is passed over.
    """
    gone = unlearn.withdrawn(directory.resolve().parent)
    for version in best_ever.ranked(directory, suite, champion.who):
        gguf = _gguf(version.model_version, place)
        if version.sha256 == champion.sha256:
            break
        if version.model_version not in gone and gguf.is_file() and cycle.sha256(gguf) == version.sha256:
            return Subject("best_ever", version.model_version, gguf, version.sha256)
    return replace(champion, name="best_ever")


def version(model_version: str, place: Place) -> Subject:
    """Any model version whose GGUF is here, alone; the untouched base ends in `:base`.

    Raises:
        UnknownModelError: if its GGUF is not there, or it is no name of a version.
    """
    _, colon, tag = model_version.rpartition(":")
    if tag != "base":
        try:
            cycle.started_at(tag)
        except ValueError:
            colon = ""
    if not colon:
        raise UnknownModelError(
            f"{model_version!r} is no model version; it must be like {place.model_name}:base"
        )
    return _subject("candidate", model_version, _gguf(model_version, place))


def _subject(name: suites.Subject, model_version: str, gguf: Path, expected: str = "") -> Subject:
    if not gguf.is_file():
        raise UnknownModelError(f"the GGUF of {model_version} ({name}) is not there: {gguf}")
    found = cycle.sha256(gguf)
    if expected and found != expected:
        raise UnknownModelError(
            f"{gguf} has the sha256 {found}, but {model_version}, which serves, has {expected}"
        )
    return Subject(name, model_version, gguf, found)


def _gguf(model_version: str, place: Place) -> Path:
    _, _, tag = model_version.partition(":")
    return place.base_gguf if tag == "base" else place.cycles_dir / tag / "model.gguf"
