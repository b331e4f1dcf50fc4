"""Up to where the nights have learned the log: the files of the cycles say it.

A cycle that has a verdict (`gate.json`) has learned what its snapshot holds: all that transactions below
`watermark_to` of `snapshot/snapshot.json` had stored. What a cycle without a verdict froze is frozen again,
so it counts for nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from grpc_server.domain.errors import Precondition

_CYCLE_ID = re.compile(r"\d{8}T\d{6}Z")


@dataclass(frozen=True, slots=True)
class Learned:
    """All that transactions below `xid` stored in this log: a database of a cluster, by their numbers."""

    xid: int
    system_identifier: str
    database_oid: str


def learned(cycles_dir: Path) -> Learned | None:
    """What all models have learned: the least of what the cycles of the folder, and of each one in it, have.

    None where one of them has no cycle with a verdict.

    Raises:
        Precondition: if a cycle's record cannot be read; to guess would delete what nobody has learned.
    """
    inside = sorted(cycles_dir.iterdir()) if cycles_dir.is_dir() else []
    models = [each for each in inside if each.is_dir() and _has_cycles(each)]
    alone = not models or any(_CYCLE_ID.fullmatch(each.name) for each in inside)
    found = [*([_learned(inside)] if alone else []), *(_learned(each.iterdir()) for each in models)]
    known = [each for each in found if each is not None]
    return min(known, key=lambda one: one.xid) if len(known) == len(found) else None


def _has_cycles(folder: Path) -> bool:
    """Whether it is a folder of a model's own: one of cycles, which is no cycle itself."""
    return not _CYCLE_ID.fullmatch(folder.name) and any(
        _CYCLE_ID.fullmatch(each.name) for each in folder.iterdir()
    )


def _learned(inside: Iterable[Path]) -> Learned | None:
    latest: Learned | None = None
    for cycle in inside:
        record = cycle / "snapshot" / "snapshot.json"
        judged = _CYCLE_ID.fullmatch(cycle.name) and (cycle / "gate.json").is_file() and record.is_file()
        if not judged:
            continue
        try:
            told = json.loads(record.read_text(encoding="utf-8"))
            found = Learned(
                int(told["watermark_to"]), str(told["system_identifier"]), str(told["database_oid"])
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise Precondition(
                f"{record} does not say up to where which log was learned ({type(error).__name__}): restore"
                " that file, or remove that cycle's folder"
            ) from error
        if latest is None or found.xid > latest.xid:
            latest = found
    return latest
