"""May the candidate serve? Judges a cycle's evaluation by the rules in configs/gate.yaml, writes gate.json.

Reads only files: evaluation/evaluation.json (who was asked), evaluation/<suite>.jsonl (their answers), and
the verdicts before it, for what they spent of the error budget. A verdict, whichever it is, is the step's
success, and advances the watermark of freezing.

What is tested. A *claim* (rule `superior`): the candidate is right more often than the champion. All claims
of a night are one family: each is an exact test, one-sided, that swaps the two session by session, Holm's
correction keeps the chance of one wrong claim or more at tonight's alpha, and one claim shown is enough.
*Guards* (the other rules) must all hold, so their errors can only hold a candidate back: they need no
correction (Berger 1982, "Multiparameter hypothesis testing and acceptance sampling", Technometrics 24).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from training import ancestry, budget, cycle, regressions
from training.budget import Budget
from training.checks import Measures, Row, Suites, checked, wanting
from training.gate_rules import RULES, Rules, Verdict, read_rules
from training.statistics import detectable, holm


def run(directory: Path, rules_file: Path = RULES) -> dict[str, Any]:
    """Write `<cycle>/gate.json`, unless it is there for the same evaluation and rules; return what it holds.

    Before it, what failed tonight is added to the regressions, `<cycle>/regressions.jsonl`.

    Raises:
        FileNotFoundError: if the cycle has no evaluation.
        OtherDatasetError: if the candidate learned from another dataset than that which is there now.
    """
    evaluation = directory / "evaluation"
    subjects = cycle.read_json(evaluation / "evaluation.json")
    files = {path.name: path for path in sorted(evaluation.glob("*.jsonl"))}
    files["evaluation.json"] = evaluation / "evaluation.json"
    rules = read_rules(rules_file)
    left = budget.tonight(directory, rules.error_budget)
    inputs = cycle.inputs_of(files, {**rules.model_dump(mode="json"), "spent": left.spent})
    output = directory / "gate.json"
    if not cycle.done(output, inputs):
        with cycle.step(directory, "gate", outputs=["gate.json", regressions.FILE]):
            suites = {path.stem: read_rows(path) for path in sorted(evaluation.glob("*.jsonl"))}
            decided = judge(
                rules,
                suites,
                subjects["champion"],
                subjects["candidate"],
                left,
                subjects.get("best_ever"),
                subjects.get("measures"),
            )
            ancestry.check(directory, subjects["candidate"])  # last: of an erasure meanwhile, too
            decided["regressions"] = regressions.update(directory, suites, subjects["champion"])
            decided |= {"decided_at": datetime.now(UTC).isoformat(), "inputs": inputs}
            cycle.write_json(output, decided)
    return cycle.read_json(output)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def judge(
    rules: Rules,
    suites: Suites,
    champion: Row,
    candidate: Row,
    left: Budget | None = None,
    best_ever: Mapping[str, Row] | None = None,
    measured: Measures | None = None,
) -> dict[str, Any]:
    """The verdict, its reason in a sentence, who was judged, and every check with its numbers. Pure.

    Args:
        rules: what must be shown.
        suites: the answers of each suite, all subjects'.
        champion: who serves: model_version and sha256.
        candidate: who would.
        left: what the nights before have left of the error budget; all of it, if not given.
        best_ever: by suite, who was best of all that served; where there is none, it is the champion.
        measured: by subject its figures, as `training.measures.measure` gives them.
    """
    left = left or Budget(rules.error_budget)
    same = champion["sha256"] == candidate["sha256"]
    best = best_ever or {}
    checks = [checked(check, suites, measured or {}, best, champion, rules) for check in rules.checks]
    spends = 0.0 if same or not any(check["p_value"] is not None for check in checks) else left.alpha
    _settle_claims(checks, left.alpha, rules)
    verdict, reason = _verdict(checks, same=same)
    return {
        "verdict": verdict,
        "reason": reason,
        "champion": dict(champion),
        "candidate": dict(candidate),
        "best_ever": {suite: dict(best.get(suite, champion)) for suite in suites},
        "level": rules.level,
        "power": rules.power,
        "alpha": spends,
        "error_budget": left.as_record(spends),
        "family": [check["name"] for check in checks if check["claim"]],
        "checks": checks,
    }


# The verdict.


def _settle_claims(checks: Sequence[dict[str, Any]], alpha: float, rules: Rules) -> None:
    """Say of each claim whether it holds, all of them together keeping `alpha`."""
    claims = {check["name"]: check for check in checks if check["p_value"] is not None}
    blocking = {name: check["p_value"] for name, check in claims.items() if check["blocking"]}
    adjusted = holm(blocking) | {
        name: check["p_value"] for name, check in claims.items() if name not in blocking
    }
    for name, check in claims.items():
        check["p_adjusted"] = adjusted[name]
        check["alpha"] = alpha
        check["holds"] = 0 < alpha >= adjusted[name]
        share = alpha / max(1, len(blocking))
        if share <= 0:
            check["detail"] += "; the error budget is spent"
            continue
        check["detectable"] = detectable(
            check["effective_n"], check["discordance"], alpha=share, power=rules.power
        )
        if not check["holds"]:
            check |= wanting(check, 0.0, share, rules.power)
        check["detail"] += f", p {check['p_adjusted']:.2g}, {alpha:g} allowed" + _powered(check, rules.power)


def _powered(check: Row, power: float) -> str:
    if check["detectable"] is None:
        return f"; {check['n']} items are too few to show any difference"
    return f"; a difference of {check['detectable']:.3f} would have been shown with a chance of {power:.0%}"


def _verdict(checks: Sequence[Row], *, same: bool) -> tuple[Verdict, str]:
    if same:
        return "inconclusive", "The candidate is the champion, byte for byte, so there is nothing to promote."
    blocking = [check for check in checks if check["blocking"] and not check["passed_over"]]
    refuted = [check for check in blocking if check["refuted"]]
    if refuted:
        return "fail", f"The candidate is rejected: {_listed(refuted)}."
    claims = [check for check in blocking if check["claim"]]
    shown = any(check["holds"] for check in claims)
    # One claim is enough; the others then say nothing against the candidate.
    open_ = [check for check in blocking if not check["holds"] and not (check["claim"] and shown)]
    if open_:
        return (
            "inconclusive",
            f"Too little is shown either way, so the champion stays: {_listed(open_)}.{_would_decide(open_)}",
        )
    return "pass", f"The candidate may serve: {_listed(blocking)}."


def _would_decide(open_: Sequence[Row]) -> str:
    wanted = [check for check in open_ if check["more_items"]]
    if not wanted:
        return ""
    each = ", ".join(f"{check['more_items']:,} more items of {check['suite']}" for check in wanted)
    return f" At tonight's differences it would take about {each}."


def _listed(checks: Sequence[Row]) -> str:
    return "; ".join(f"{check['name']}: {check['detail']}" for check in checks)
