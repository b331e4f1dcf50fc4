"""May a night begin? Looks for room on the disks that it fills, and for another night that is at work.

A disk that is full stops more than the night: the log's spool and Postgres may lie on it. So a night that
would fill one does not begin, and says how much is wanted, where, and why.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentloop.night import Night, cycles_in
from grpc_server.domain.gguf_layout import layout
from training import cycle, recipe

_UNQUANTIZED = 3  # merged, converted, and what is quantized from it: at most so many copies at a time
_WHOLE_MODEL = 6  # more of them where every weight is trained: float32 masters, optimizer, the model itself
_SERVED = 2  # what evaluation installs in a server of its own: up to four quantized models
_DISTRIBUTIONS = 6 * 128 * 262_144 * 2  # bytes that llama-perplexity keeps (training.llama: six chunks)
_NIGHTS = 7


class NoRoomError(RuntimeError):
    """A disk has not the room that a night takes; the text says which, and how much is wanted."""


class NightRunningError(RuntimeError):
    """Another night of the same cycles folder is at work."""


@dataclass(frozen=True, slots=True)
class Disk:
    """One file system: the folders of a night that lie on it, what it wants there, what is free; bytes."""

    folders: tuple[Path, ...]
    wanted: int
    free: int

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        folders = [str(folder) for folder in self.folders]
        return {"folders": folders, "wanted_bytes": self.wanted, "free_bytes": self.free}


def run(
    directory: Path, base: Path, state_dir: Path, reserve: int, recipe_file: Path = recipe.DEFAULT
) -> dict[str, Any]:
    """See that a night may begin in the cycle `directory`; note it in `steps/room.json`.

    Returns `disks`, each with its folders, wanted_bytes and free_bytes.

    Args:
        directory: the cycle that is about to be made.
        base: the model that is trained, which its size follows from.
        state_dir: where the base is converted, and where evaluation's server has its models.
        reserve: bytes that must stay free on each disk.
        recipe_file: how it is trained: a whole model takes more than an adapter.

    Raises:
        FileNotFoundError: if the base is not there.
        NightRunningError: if another night of this cycles folder is at work.
        NoRoomError: if a disk is too full.
    """
    try:
        with cycle.step(directory, "room"):
            _alone(directory)
            return {
                "disks": [disk.plain() for disk in _checked(directory, base, state_dir, reserve, recipe_file)]
            }
    except OSError:  # the note found no room either: say the reason all the same
        _checked(directory, base, state_dir, reserve, recipe_file)
        raise


def _checked(directory: Path, base: Path, state_dir: Path, reserve: int, recipe_file: Path) -> list[Disk]:
    model = unquantized_bytes(base)
    copies = _UNQUANTIZED + (_WHOLE_MODEL if recipe.read(recipe_file).method == "full" else 0)
    kept = max((size_of(each) for each in _earlier(directory)[-_NIGHTS:]), default=0)
    converted = any((state_dir / "cache" / "hf").glob("*/config.json"))
    wanted = {
        directory.absolute().parent: copies * model + _DISTRIBUTIONS + kept,
        state_dir.absolute(): (_SERVED + (0 if converted else 1)) * model,
    }
    disks = list(_disks(wanted, reserve))
    for disk in disks:
        if disk.free < disk.wanted:
            raise NoRoomError(
                f"the disk of {' and '.join(map(str, disk.folders))} has {disk.free / 1e9:.1f} GB free, and a"
                f" night wants {disk.wanted / 1e9:.1f} GB ({reserve / 1e9:.1f} of them to stay free)."
                " `python -m training retain --dry-run` tells what old nights would give back"
            )
    return disks


def _disks(wanted: dict[Path, int], reserve: int) -> Iterator[Disk]:
    """The file systems of these folders, which need not be there yet."""
    by_device: dict[int, list[Path]] = {}
    for folder in wanted:
        by_device.setdefault(_there(folder).stat().st_dev, []).append(folder)
    for folders in by_device.values():
        free = shutil.disk_usage(_there(folders[0])).free
        yield Disk(tuple(folders), sum(wanted[each] for each in folders) + reserve, free)


def _there(folder: Path) -> Path:
    return next(each for each in (folder, *folder.parents) if each.exists())


def unquantized_bytes(base: Path) -> int:
    """What a base takes with two bytes a weight.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is no GGUF.
    """
    if base.is_dir():
        return sum(path.stat().st_size for path in base.glob("*.safetensors"))
    with base.open("rb") as file:
        return 2 * sum(math.prod(tensor.shape) for tensor in layout(file).tensors)


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder; what goes meanwhile counts as nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(place, name).lstat().st_size
    return total


def judged_later(directory: Path) -> str:
    """The last cycle after this one that froze the log and has a verdict; empty, if none has."""
    name = directory.resolve().name
    later = [
        each.name
        for each in cycles_in(directory.absolute().parent)
        if each.name > name
        and all((each / file).is_file() for file in ("gate.json", "snapshot/snapshot.json"))
    ]
    return max(later, default="")


def _earlier(directory: Path) -> list[Path]:
    name = directory.resolve().name
    return [each for each in cycles_in(directory.absolute().parent) if each.name < name]


def _alone(directory: Path) -> None:
    """Raise NightRunningError if a process of this host is in a step of another cycle that has no verdict."""
    for other in cycles_in(directory.absolute().parent):
        at_work = Night(other).running if not (other / "gate.json").is_file() else []
        if at_work and other.name != directory.resolve().name:
            raise NightRunningError(
                f"cycle {other.name} is at work ({', '.join(at_work)}), and two nights at once would learn"
                " the same rows and not fit into memory. Nothing is lost: clear this task when it has ended"
            )
