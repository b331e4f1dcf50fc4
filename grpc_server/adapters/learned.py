"""Up to where the nights have learned the log: the files of the cycles say it.

A cycle that has a verdict (`gate.json`) has learned what its snapshot holds: all that transactions below
`watermark_to` of `snapshot/snapshot.json` had stored. What a cycle without a verdict froze is frozen again,
so it counts for nothing.
"""

from __future__ import annotations

import json
import re
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
    """What the cycles in a folder have learned; None where no cycle has a verdict.

    Raises:
        Precondition: if a cycle's record cannot be read; to guess would delete what nobody has learned.
    """
    latest: Learned | None = None
    for cycle in cycles_dir.iterdir() if cycles_dir.is_dir() else ():
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
