"""How much chance of a wrong promotion is left for tonight: the gate's error budget across nights.

Every judged night that tests a claim spends the alpha it tests at; a night that tests nothing spends nothing.
Over any window the alphas add up to at most the window's, so that by Boole's inequality no more wrong
promotions than that are expected in it, however often nights are run again. What is left is never spent at
once: a night takes at most half of it, so that a claim strong enough can be shown on any night.

Online methods that pay for discoveries (alpha-investing: Foster and Stine 2008; LORD: Javanmard and Montanari
2018) were not taken: without a discovery their alpha falls for ever, and a loop that runs for years would
become unable to promote; a window forgets.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from training import cycle
from training.gate_rules import ErrorBudget

DAYS_A_YEAR = 365


@dataclass(frozen=True, slots=True)
class Budget:
    """Tonight's `alpha`, and what `nights` of the window before tonight have `spent`."""

    declared: ErrorBudget
    spent: float = 0.0
    nights: int = 0

    @property
    def alpha(self) -> float:
        """What tonight may test its claims at."""
        left = max(0.0, self.declared.alpha_a_window - self.spent)
        return min(self.declared.alpha_a_night, left / 2)

    def as_record(self, spends: float) -> dict[str, Any]:
        """For gate.json; `spends` is the alpha that tonight did test at."""
        declared = self.declared
        return {
            "alpha_a_night": declared.alpha_a_night,
            "alpha_a_window": declared.alpha_a_window,
            "window_days": declared.window_days,
            "spent_before": self.spent,
            "nights_before": self.nights,
            "left": max(0.0, declared.alpha_a_window - self.spent - spends),
            "wrong_promotions_a_year_at_most": min(
                declared.alpha_a_night * DAYS_A_YEAR,
                declared.alpha_a_window * DAYS_A_YEAR / declared.window_days,
            ),
        }


def tonight(directory: Path, declared: ErrorBudget) -> Budget:
    """The budget as the verdicts of the cycles beside `directory`, in the window before it, leave it.

    A verdict that does not say what it spent, or cannot be read, counts as a whole night's.
    """
    try:
        began = cycle.started_at(directory.resolve().name)
    except ValueError:  # a cycle by hand, of no date
        return Budget(declared)
    earliest = cycle.cycle_id(began - timedelta(days=declared.window_days))
    spent = [
        _spent(each / "gate.json", declared)
        for each in cycle.judged_before(directory)
        if each.name > earliest
    ]
    return Budget(declared, sum(spent), sum(each > 0 for each in spent))


def _spent(record: Path, declared: ErrorBudget) -> float:
    try:
        said = cycle.read_json(record).get("alpha")
    except ValueError:
        said = None
    return float(said) if isinstance(said, int | float) else declared.alpha_a_night
