"""How a demo ends when a link of the loop breaks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agentloop.cli_session import printable

TAIL_LINES = 20


@dataclass(slots=True, eq=False)
class LinkError(Exception):
    """One link failed: which, how, where its log is, and what to do."""

    link: str
    what: str
    remedy: str
    log: Path | None = None

    def __str__(self) -> str:
        parts = [f"{self.link}: {self.what}"]
        if self.log is not None:
            parts += [f"the end of {self.log}:", *(f"  {line}" for line in tail(self.log))]
        return "\n".join([*parts, f"What to do: {self.remedy}"])


def tail(log: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a log; none if there is no log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 64 * 1024))
            text = file.read().decode(errors="replace")
            return [printable(line, True) for line in text.splitlines()[-lines:]]
    except OSError:
        return []
