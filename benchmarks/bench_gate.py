"""Is the gate honest? It judges nights that are known to be nothing, and nights that are known to be a gain.

Each simulated night draws sessions, with replacement, from what two real models answered: one night's
candidate and its champion, a promoted model (`benchmarks/data/answers.jsonl`, made by `python -m
benchmarks.record_answers`: `simple_python` 200-299, and what callers demonstrated). In each session a coin
says which of the two is the champion: so nothing changed, whatever the two models are.
`false_promotion_rate` is the share of 5,000 such nights that the rules of configs/gate.yaml promote; the
bound is Clopper and Pearson's, 95 %, one-sided. `false_claims_of_four` is the chance of a wrong claim where
four targets are claimed at once (Holm).

A gain is known where wrong answers of the candidate are made right at random until its share of right
answers is above the champion's by what the gate declares that so many items show with 80 %.
`power_at_known_gain` is the share of these nights whose claim is shown; `promotions_at_known_gain` of those
promoted, all guards included.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from benchmarks.line import Line
from training.gate import judge
from training.gate_rules import Rules, Superior, read_rules
from training.statistics import detectable

NIGHTS = 5000
RECORDED = Path(__file__).parent / "data" / "answers.jsonl"
TARGET = "simple_python"
CONSTRAINED = "base_constrained"

Row = dict[str, Any]
Suites = dict[str, list[Row]]
_CHAMPION = {"model_version": "gemma-3-270m:champion", "sha256": "c" * 64}
_CANDIDATE = {"model_version": "gemma-3-270m:candidate", "sha256": "d" * 64}


class Recordings:
    """What models answered, by suite and session."""

    def __init__(self, path: Path = RECORDED) -> None:
        by_session: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            by_session[row["suite"]][row["session_id"]].append(row)
        self.sessions = {suite: list(sessions.values()) for suite, sessions in by_session.items()}

    def night(self, draw: random.Random, suites: Sequence[str] = ()) -> Suites:
        """An evaluation in which nothing changed."""
        return {
            suite: self._suite(draw, self.sessions[suite if suite in self.sessions else TARGET])
            for suite in suites or self.sessions
        }

    def as_recorded(self) -> Suites:
        """The evaluation itself."""
        return {
            suite: [row for number, rows in enumerate(sessions) for row in _asked(rows, number)]
            for suite, sessions in self.sessions.items()
        }

    def _suite(self, draw: random.Random, sessions: list[list[Row]]) -> list[Row]:
        return [
            row
            for number in range(len(sessions))
            for row in _asked(draw.choice(sessions), number, swapped=draw.random() < 0.5)
        ]


def _asked(session: list[Row], number: int, *, swapped: bool = False) -> list[Row]:
    """The rows of one session, as an evaluation writes them."""
    who = {"champion": "champion", "candidate": "candidate", CONSTRAINED: CONSTRAINED}
    if swapped:
        who |= {"champion": "candidate", "candidate": "champion"}
    return [
        {
            "item_id": f"{number}:{row['item_id']}",
            "session_id": str(number),
            "subject": subject,
            "correct": row["right"][model],
            "finish_reason": "length" if model in row["cut"] else "stop",
        }
        for row in session
        for subject, model in who.items()
        if model in row["right"]
    ]


def with_gain(suites: Suites, gain: float, draw: random.Random) -> Suites:
    """The night, the candidate better on the target by `gain` on average."""
    rows = suites[TARGET]
    wrong = [row for row in rows if row["subject"] == "candidate" and not row["correct"]]
    items = sum(row["subject"] == "candidate" for row in rows)
    share = min(1.0, gain * items / len(wrong))
    better = {row["item_id"] for row in wrong if draw.random() < share}
    changed = [
        {**row, "correct": True} if row["subject"] == "candidate" and row["item_id"] in better else row
        for row in rows
    ]
    return {**suites, TARGET: changed}


def judged(rules: Rules, suites: Suites) -> dict[str, Any]:
    """What the gate makes of a night, whose error budget nobody has spent."""
    return judge(rules, suites, _CHAMPION, _CANDIDATE)


def known_gain(rules: Rules, recordings: Recordings, draw: random.Random) -> float:
    """What the gate declares that the target's items show: as its discordance grows with the gain itself."""
    nights = [recordings.night(draw) for _ in range(100)]
    unchanged = sum(_claim(judged(rules, night))["discordance"] for night in nights) / len(nights)
    items = len(recordings.sessions[TARGET])
    gain = 0.0
    for _ in range(20):
        shown = detectable(items, unchanged + gain, alpha=rules.error_budget.alpha_a_night, power=rules.power)
        assert shown is not None, f"{items} items are too few to show anything"
        gain = shown
    return gain


def _claim(verdict: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(check for check in verdict["checks"] if check["claim"])
    return found


def upper(successes: int, n: int) -> float:
    """Clopper and Pearson's one-sided 95 % bound of a share."""
    return float(stats.beta.ppf(0.95, successes + 1, n - successes)) if successes < n else 1.0


def four_claims(rules: Rules) -> Rules:
    """The claim on four targets at once, and nothing else."""
    claim = next(check for check in rules.checks if isinstance(check, Superior))
    four = [claim.model_copy(update={"name": f"claim {k}", "suite": f"target_{k}"}) for k in range(4)]
    return rules.model_copy(update={"checks": tuple(four)})


def run() -> list[Line]:
    """Judge the nights, in this process, on one core."""
    rules, recordings, draw = read_rules(), Recordings(), random.Random(2026)
    alpha = rules.error_budget.alpha_a_night
    nothing = [judged(rules, recordings.night(draw)) for _ in range(NIGHTS)]
    promoted = sum(each["verdict"] == "pass" for each in nothing)
    claimed = sum(_claim(each)["holds"] for each in nothing)
    four = four_claims(rules)
    targets = [check.suite for check in four.checks if isinstance(check, Superior)]
    of_four = sum(
        any(check["holds"] for check in judged(four, recordings.night(draw, targets))["checks"])
        for _ in range(NIGHTS)
    )
    gain = known_gain(rules, recordings, draw)
    gained = [judged(rules, with_gain(recordings.night(draw), gain, draw)) for _ in range(NIGHTS)]
    shown = sum(_claim(each)["holds"] for each in gained) / NIGHTS
    through = sum(each["verdict"] == "pass" for each in gained) / NIGHTS
    declared = "declared alpha"
    return [
        Line("gate", "false_promotion_rate", promoted / NIGHTS, "share", declared, alpha),
        Line(
            "gate",
            "false_promotion_rate_upper",
            upper(promoted, NIGHTS),
            "share",
            declared,
            alpha,
            f"<= {alpha}",
        ),
        Line(
            "gate", "false_claim_rate_upper", upper(claimed, NIGHTS), "share", declared, alpha, f"<= {alpha}"
        ),
        Line(
            "gate",
            "false_claims_of_four_upper",
            upper(of_four, NIGHTS),
            "share",
            declared,
            alpha,
            f"<= {alpha}",
        ),
        Line("gate", "known_gain", gain, "share of right answers", "", None),
        Line(
            "gate", "power_at_known_gain", shown, "share", "declared power", rules.power, f">= {rules.power}"
        ),
        Line("gate", "promotions_at_known_gain", through, "share", "", None),
    ]
