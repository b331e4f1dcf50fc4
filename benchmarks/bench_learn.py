"""Does it learn? A week of `make learn`, night by night, and its score on items that nothing had read before.

Seven nights of public questions (Berkeley leaderboard v4) through the real DAG, Gemma 3 270M base, on two
cores. `right_night_N` is the share of `simple_python` 200-299 that the version in service answers right after
night N, by the gate's own scorer. Nothing is trained on these items, but the gate asks them, and the recipe
was chosen on them. `no_call_night_N` is the share of questions that no function fits (`irrelevance`) and that
it answers without a call; `lost_at_a_promotion` the most that the former fell at one promotion.

`sealed_right` is the share right of `simple_python` 300-399, scored once, at the end, by the leaderboard's
own checker; `sealed_low` and `sealed_high` are its 95 % interval (Wilson). Beside it stands what Google
reports for FunctionGemma 270M on BFCL Simple. That is no race on level ground: FunctionGemma had not seen the
benchmark's neighbours, as ours does every night (what shares a question or a function with 200-399 is barred;
the style of questions and answers is theirs), and BFCL's Simple is more than these 100 items.

`make learn` takes hours and leaves learn.json in var/learn (`AGENTLOOP_LEARN_DIR`); this reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.line import Line

PEER = "FunctionGemma 270M, as reported"


def run() -> Iterator[Line]:
    """The lines of the week that is in the learn folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not scored yet.
    """
    path = Path(os.environ.get("AGENTLOOP_LEARN_DIR") or "var/learn") / "learn.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: run `make learn` first, which takes hours")
    week = json.loads(path.read_text(encoding="utf-8"))
    if week["sealed"] is None:
        raise ValueError(f"{path} has no score yet: run `make learn` again, it goes on where it stood")
    return lines(week)


def lines(week: Mapping[str, Any]) -> Iterator[Line]:
    """The lines of one learn.json."""
    served = [(night["night"], night["served"]) for night in week["nights"]]
    right = [(number, each["simple_python"]["accuracy"]) for number, each in served if each["simple_python"]]
    for number, share in right:
        yield _line(f"right_night_{number}", share)
    for number, each in served:
        if each["irrelevance"]:
            yield _line(f"no_call_night_{number}", each["irrelevance"]["accuracy"])
    falls = [max(0.0, before - after) for (_, before), (_, after) in pairwise(right)]
    yield _line("lost_at_a_promotion", max(falls, default=0.0), goal="<= 0")
    score = week["sealed"]
    yield _line("sealed_right", score["accuracy"], PEER, week["goal"], f">= {week['goal']}")
    yield _line("sealed_low", score["ci_low"])
    yield _line("sealed_high", score["ci_high"])


def _line(metric: str, value: float, peer: str = "", peer_value: float | None = None, goal: str = "") -> Line:
    return Line("learn", metric, value, "share", peer, peer_value, goal)
