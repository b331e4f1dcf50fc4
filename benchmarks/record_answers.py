"""Makes `data/answers.jsonl`: what real models answered, right or wrong, for `make bench-gate` to replay.

    python -m benchmarks.record_answers cycles/<cycle id> >benchmarks/data/answers.jsonl

The recordings are that evaluation's champion, candidate and constrained base. Of an item only what the gate
reads is kept: no text.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

SUITES = ("simple_python", "gate")


def recorded(directory: Path) -> list[dict[str, Any]]:
    """One row an item: suite, item, session, and by subject whether it was right, and who was cut."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for suite in SUITES:
        for line in (directory / "evaluation" / f"{suite}.jsonl").read_text("utf-8").splitlines():
            answer = json.loads(line)
            row = rows.setdefault(
                (suite, answer["item_id"]),
                {
                    "suite": suite,
                    "item_id": _short(answer["item_id"]),
                    "session_id": _short(answer["session_id"]),
                    "right": {},
                    "cut": [],
                },
            )
            row["right"][answer["subject"]] = answer["correct"]
            if answer["finish_reason"] == "length":
                row["cut"].append(answer["subject"])
    return list(rows.values())


def _short(identity: str) -> str:
    """A public item's id as it is; a caller's, which is nobody's business, as a hash."""
    if identity.startswith("simple_python_"):
        return identity
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def main(cycle: Annotated[Path, typer.Argument(help="A cycle whose champion was a promoted model.")]) -> None:
    """Print the recorded answers as JSON Lines."""
    for row in recorded(cycle):
        sys.stdout.write(json.dumps(row, sort_keys=True) + "\n")


if __name__ == "__main__":
    typer.run(main)
