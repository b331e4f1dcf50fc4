"""What was done of the nights: kept so that a run that was ended, however, goes on where it stood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from demo import questions
from demo.questions import Questions
from demo.traffic import Asked
from training import cycle


class OtherWeekError(ValueError):
    """The folder has nights of another length or number; the text says of which."""


@dataclass(frozen=True, slots=True)
class Diary:
    """One folder: `week.json` (what was ordered), `<night>.json` (its cycle, its end), `<night>.asked`."""

    folder: Path

    def begin(self, week: Sequence[Sequence[Asked]]) -> None:
        """Keep what is asked on which night; what was begun goes on only as it was begun.

        Raises:
            OtherWeekError: if other nights were begun here.
        """
        ordered = {"nights": [[item.id for item in night] for night in week]}
        path = self.folder / "week.json"
        if not path.is_file():
            cycle.write_json(path, ordered)
        begun = cycle.read_json(path)
        if begun != ordered:
            raise OtherWeekError(
                f"{self.folder} has {len(begun['nights'])} nights of {len(begun['nights'][0])} questions, not"
                f" {len(week)} of {len(week[0])}; go on with as many, or set another state folder"
            )

    def asks(self, night: int, items: Sequence[Asked]) -> Questions:
        """What is left to ask before that night; all of it is asked slowly while the night runs."""
        path = self.folder / f"{night}.asked"
        asked = questions.already_asked(path)
        left = tuple(item for item in items if item.id not in asked)
        return Questions(left, new=len(items), slowly=tuple(items), shown=partial(questions.remember, path))

    def cycle_of(self, night: int) -> str:
        """The id of the night's cycle, the same after a kill: now, or right after the night before."""
        record = self._night(night)
        if "cycle_id" not in record:
            before = self._night(night - 1).get("cycle_id") if night > 1 else None
            now = datetime.now(UTC)
            if before is not None:  # a clock that was set back must not put this night before that one
                now = max(now, cycle.started_at(before) + timedelta(seconds=1))
            record = {"night": night, "cycle_id": cycle.cycle_id(now), "ended": False}
            cycle.write_json(self.folder / f"{night}.json", record)
        return str(record["cycle_id"])

    def end(self, night: int) -> None:
        """The night has its verdict, and what came of it; it is not done again."""
        cycle.write_json(self.folder / f"{night}.json", self._night(night) | {"ended": True})

    def ended(self, night: int) -> bool:
        """Whether it is done."""
        return bool(self._night(night).get("ended"))

    def cycles(self) -> list[str]:
        """The cycles of the nights that are done, in their order."""
        found: list[str] = []
        while self.ended(len(found) + 1):
            found.append(str(self._night(len(found) + 1)["cycle_id"]))
        return found

    def _night(self, night: int) -> dict[str, Any]:
        path = self.folder / f"{night}.json"
        return cycle.read_json(path) if path.is_file() else {}
