"""Which questions this demo asks: the next ones, so that each night has something new to learn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.failure import LinkError
from training.bfcl import DataNotInstalledError, Item, traffic

FILE = "asked.json"


@dataclass(frozen=True, slots=True)
class Questions:
    """The items of one demo; `new`: how many of them were never asked before."""

    items: tuple[Item, ...]
    new: int


def choose(private_dir: Path, count: int) -> Questions:
    """The next `count` items, shorter prompts first; from the start again when all were asked.

    Raises:
        LinkError: if the package that holds them is not installed.
    """
    try:
        every = traffic()
    except DataNotInstalledError as error:
        raise LinkError("questions", str(error), "run `make demo`, which installs it") from error
    asked = already_asked(private_dir)
    fresh = [item for item in every if item.id not in asked][:count]
    again = [item for item in every if item.id in asked][: count - len(fresh)]
    return Questions((*fresh, *again), new=len(fresh))


def remember(private_dir: Path, items: Sequence[Item]) -> None:
    """Keep that these were asked."""
    asked = sorted(already_asked(private_dir) | {item.id for item in items})
    private_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = private_dir / f"{FILE}.partial"
    partial.write_text(json.dumps({"asked": asked}), encoding="utf-8")
    partial.replace(private_dir / FILE)


def already_asked(private_dir: Path) -> set[str]:
    """Ids of the items that earlier demos asked."""
    try:
        return set(json.loads((private_dir / FILE).read_text(encoding="utf-8"))["asked"])
    except FileNotFoundError:
        return set()
