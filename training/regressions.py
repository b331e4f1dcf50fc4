"""Past failures, kept for good: what no later candidate may get wrong again without being seen.

A gate item, so a question whose answer a caller demonstrated and that is never trained on, becomes a
regression when a model that had been promoted answered it wrongly, or when a candidate lost it that the
champion had right. `<cycle>/regressions.jsonl` is that of the last judged cycle and tonight's: lines as in
dataset/gate.jsonl, each with `why` and `since` (the cycle). None is ever dropped, but by erasure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from training import cycle

FILE = "regressions.jsonl"
MOST = 5000
"""No more than so many are kept, the first: a file that is read whole."""
SUITES = ("gate", "regressions")

Row = Mapping[str, Any]


def before(directory: Path) -> Path | None:
    """The file of the last cycle before this one that was judged, if it has one."""
    try:
        found = [each / FILE for each in cycle.judged_before(directory) if (each / FILE).is_file()]
    except ValueError:  # a cycle by hand, of no date
        return None
    return found[-1] if found else None


def update(directory: Path, suites: Mapping[str, Sequence[Row]], champion: Row) -> int:
    """Write `<cycle>/regressions.jsonl`: what failed tonight and in all nights before; how many there are."""
    earlier = before(directory)
    kept = {line["inference_id"]: line for line in (_read(earlier) if earlier else ())}
    failed = dict(_failures([row for suite in SUITES for row in suites.get(suite, ())], champion))
    for line in _read(directory / "dataset" / "gate.jsonl"):
        why = failed.get(line["inference_id"])
        if why and len(kept) < MOST:
            new = {name: line[name] for name in ("inference_id", "session_id", "request", "demonstration")}
            kept.setdefault(line["inference_id"], new | {"why": why, "since": directory.resolve().name})
    with cycle.new_file(directory / FILE) as building, building.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in kept.values())
    return len(kept)


def _failures(rows: Sequence[Row], champion: Row) -> Iterator[tuple[str, str]]:
    """Item and reason; the untouched base was never promoted, so what it does not know is no failure."""
    by_item: dict[str, dict[str, bool]] = {}
    for row in rows:
        by_item.setdefault(row["item_id"], {})[row["subject"]] = row["correct"]
    promoted = not str(champion["model_version"]).endswith(":base")
    for item, correct in by_item.items():
        was, is_now = correct.get("champion"), correct.get("candidate")
        if was is True and is_now is False:
            yield item, "a candidate lost it"
        elif was is False and promoted:
            yield item, "a promoted model got it wrong"


def _read(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)
