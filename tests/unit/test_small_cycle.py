"""What the small cycle end to end is told is read here in a second, and not only after minutes of it."""

from __future__ import annotations

from pathlib import Path

from training import gate_rules, recipe, suites

SMALL = Path(__file__).parents[1] / "e2e" / "small"


def test_the_recipe_the_suites_and_the_rules_of_the_small_cycle_can_be_read() -> None:
    assert recipe.read(SMALL / "recipe.yaml").max_tokens < recipe.read().max_tokens
    asked = {suite.name for suite in suites.read_config(SMALL / "suites.yaml").suites}
    (check,) = gate_rules.read_rules(SMALL / "gate.yaml").checks
    assert isinstance(check, gate_rules.LengthShare) and check.suite in asked
