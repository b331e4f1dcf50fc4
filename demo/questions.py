"""Which questions this demo asks: the next ones, so that each night has something new to learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from demo.failure import LinkError
from demo.traffic import Asked
from training.bfcl import DataNotInstalledError, traffic

FILE = "asked"


def _forgotten(item_id: str) -> None:
    """Nobody keeps what was asked."""


@dataclass(frozen=True, slots=True)
class Questions:
    """What one day asks. `new`: how many of it were never asked before it.

    `slowly` is asked, again and again, while the night runs (`items`, where it is empty); `shown` is told of
    each item whose answer was shown to the service.
    """

    items: tuple[Asked, ...]
    new: int
    slowly: tuple[Asked, ...] = ()
    shown: Callable[[str], None] = field(default=_forgotten, compare=False)


def choose(private_dir: Path, count: int) -> Questions:
    """The next `count` items, shorter prompts first; from the start again when all were asked.

    Raises:
        LinkError: if the package that holds them is not installed.
    """
    path = private_dir / FILE
    every = playable()
    asked = already_asked(path)
    fresh = [item for item in every if item.id not in asked][:count]
    again = [item for item in every if item.id in asked][: count - len(fresh)]
    return Questions((*fresh, *again), new=len(fresh), shown=partial(remember, path))


def playable() -> Sequence[Asked]:
    """Every item that traffic may play.

    Raises:
        LinkError: if the package that holds them is not installed.
    """
    try:
        return traffic()
    except DataNotInstalledError as error:
        raise LinkError("questions", str(error), "run `make demo`, which installs it") from error


def remember(path: Path, item_id: str) -> None:
    """Keep that an item was asked, and its answer shown."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{item_id}\n")


def already_asked(path: Path) -> set[str]:
    """Ids of the items that are kept there; of a line that a kill cut off nothing is known."""
    try:
        return set(path.read_text(encoding="utf-8").split("\n")[:-1])
    except FileNotFoundError:
        return set()
