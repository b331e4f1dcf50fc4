"""Each check of the gate with its numbers, from the answers and measures of an evaluation. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from training.gate_rules import Check, LengthShare, NotInferior, Ratio, RightShare, Rules, Superior
from training.statistics import PairedDifference, items_needed, paired_difference, wilson

Row = Mapping[str, Any]
Suites = Mapping[str, Sequence[Row]]
Measures = Mapping[str, Mapping[str, float]]


def checked(
    check: Check, suites: Suites, measured: Measures, best: Mapping[str, Row], champion: Row, rules: Rules
) -> dict[str, Any]:
    """One check with its numbers. Not `holds` and not `refuted` is open: the numbers show neither.

    A claim (`Superior`) has its `p_value`; whether it holds, all the night's claims decide together.
    """
    if isinstance(check, Ratio):
        numbers = _ratio(check, measured)
    elif isinstance(check, LengthShare):
        numbers = _share_cut(check, suites.get(check.suite, ()), rules.level)
    elif isinstance(check, RightShare):
        numbers = _share_right(check, suites.get(check.suite, ()), rules.level)
    else:
        numbers = _paired(check, _told_apart(check, suites, best, champion), rules)
    return {
        "name": check.name,
        "suite": "measures" if isinstance(check, Ratio) else check.suite,
        "blocking": check.blocking,
        "claim": isinstance(check, Superior),
        "passed_over": numbers["short"] and getattr(check, "may_be_short", False),
        "n": 0,
        "champion": None,
        "candidate": None,
        "difference": None,
        "ci_low": None,
        "ci_high": None,
        "p_value": None,
        "more_items": None,
        "holds": False,
        "refuted": False,
        **numbers,
    }


def _ratio(check: Ratio, measured: Measures) -> dict[str, Any]:
    rule = f"{check.measure}: candidate / {check.against} from {check.at_least:g} to {check.at_most:g}"
    base: dict[str, Any] = {"rule": rule, "against": check.against, "short": False}
    one = measured.get(check.against, {}).get(check.measure)
    other = measured.get("candidate", {}).get(check.measure)
    if not one or other is None:
        return base | {"detail": f"{check.measure} was not measured of both"}
    holds = check.at_least <= other / one <= check.at_most
    return base | {
        "n": 1,
        "champion": one,
        "candidate": other,
        "holds": holds,
        "refuted": not holds,
        "detail": f"{check.measure} is {other:g}, that of {check.against} {one:g}: {other / one:.2f} of it"
        f" ({check.at_least:g} to {check.at_most:g} may be)",
    }


def _paired(check: Superior | NotInferior, rows: Sequence[Row], rules: Rules) -> dict[str, Any]:
    margin = check.margin if isinstance(check, NotInferior) else 0.0
    level = (check.level if isinstance(check, NotInferior) else None) or rules.level
    rule = f"candidate - {check.against}: " + (
        f"the whole interval above {0.0 - margin:g}" if isinstance(check, NotInferior) else "above 0"
    )
    one, other = _by_item(rows, check.against), _by_item(rows, "candidate")
    base = {"rule": rule, "against": check.against, "short": False}
    if set(one) != set(other):
        return base | {"detail": f"{len(set(one) ^ set(other))} items were asked of only one of the two"}
    if len(one) < check.minimum_items:
        return base | _too_few(len(one), check)
    items = sorted(one)
    found = paired_difference(
        [one[item]["correct"] for item in items],
        [other[item]["correct"] for item in items],
        [one[item]["session_id"] or item for item in items],
        level,
    )
    numbers = base | _numbers(found) | {"detail": _detail(check, found, level)}
    if isinstance(check, Superior):
        return numbers | {"p_value": found.p_value}
    numbers["holds"] = found.interval.low > -margin
    if not numbers["holds"]:
        numbers |= wanting(numbers, margin, (1 - level) / 2, rules.power)
    return numbers


def _numbers(found: PairedDifference) -> dict[str, Any]:
    return {
        "n": found.n,
        "effective_n": found.effective_n,
        "champion": found.first,
        "candidate": found.second,
        "difference": found.difference,
        "discordance": found.discordance,
        "ci_low": found.interval.low,
        "ci_high": found.interval.high,
        "refuted": found.interval.high < 0,
    }


def _detail(check: Superior | NotInferior, found: PairedDifference, level: float) -> str:
    return (
        f"{found.second:.3f} against {found.first:.3f} on {found.n} items of {check.suite}, a difference of"
        f" {found.difference:+.3f} ({100 * level:g} % interval {found.interval.low:+.3f} to"
        f" {found.interval.high:+.3f})"
    )


def _share_cut(check: LengthShare, rows: Sequence[Row], level: float) -> dict[str, Any]:
    base = {
        "rule": f"share of the candidate's answers cut by max_tokens at most {check.bound:g}",
        "short": False,
    }
    found = _by_item(rows, "candidate").values()
    if len(found) < check.minimum_items:
        return base | _too_few(len(found), check)
    cut, champion = _cut(found), _by_item(rows, "champion").values()
    share, interval = cut / len(found), wilson(cut, len(found), level)
    return base | {
        "n": len(found),
        "champion": _cut(champion) / len(champion) if champion else None,
        "candidate": share,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "holds": share <= check.bound,
        "refuted": interval.low > check.bound,
        "detail": f"{cut} of {len(found)} answers are cut by max_tokens ({check.bound:.0%} may be)",
    }


def _share_right(check: RightShare, rows: Sequence[Row], level: float) -> dict[str, Any]:
    base = {
        "rule": f"share of the candidate's answers that are right at least {check.at_least:g}",
        "short": False,
    }
    found = _by_item(rows, "candidate").values()
    if len(found) < check.minimum_items:
        return base | _too_few(len(found), check)
    right, champion = _right(found), _by_item(rows, "champion").values()
    share, interval = right / len(found), wilson(right, len(found), level)
    return base | {
        "n": len(found),
        "champion": _right(champion) / len(champion) if champion else None,
        "candidate": share,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "holds": share >= check.at_least,
        "refuted": interval.high < check.at_least,
        "detail": f"{right} of {len(found)} answers are right ({check.at_least:.0%} must be)",
    }


def _by_item(rows: Sequence[Row], subject: str) -> dict[str, Row]:
    return {row["item_id"]: row for row in rows if row["subject"] == subject}


def _cut(rows: Any) -> int:
    return sum(row["finish_reason"] == "length" for row in rows)


def _right(rows: Any) -> int:
    return sum(row["correct"] for row in rows)


def _too_few(n: int, check: Superior | NotInferior | LengthShare | RightShare) -> dict[str, Any]:
    return {
        "n": n,
        "short": True,
        "more_items": check.minimum_items - n,
        "detail": f"{n} items of {check.suite}, {check.minimum_items} needed",
    }


def _told_apart(
    check: Superior | NotInferior, suites: Suites, best: Mapping[str, Row], champion: Row
) -> Sequence[Row]:
    """The suite's rows, in which the best ever, where that is the champion, has the champion's answers."""
    rows = suites.get(check.suite, ())
    if check.against != "best_ever":
        return rows
    if best.get(check.suite, champion)["sha256"] != champion["sha256"]:
        return rows
    return [*rows, *({**row, "subject": "best_ever"} for row in rows if row["subject"] == "champion")]


def wanting(check: Row, margin: float, alpha: float, power: float) -> dict[str, Any]:
    """How many more items, at tonight's difference, would show what is claimed."""
    needed = items_needed(check["difference"], check["discordance"], alpha=alpha, power=power, margin=margin)
    if math.isinf(needed):
        return {"more_items": None}
    return {"more_items": max(1, math.ceil(needed * check["n"] / check["effective_n"]) - check["n"])}
