"""What a candidate must show before it may serve: what configs/gate.yaml can say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

RULES = Path(__file__).parent / "configs" / "gate.yaml"

Verdict = Literal["pass", "fail", "inconclusive"]
Peer = Literal["champion", "best_ever", "base_constrained"]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Check(_Data):
    name: str
    suite: str
    minimum_items: int = Field(ge=1)
    blocking: bool = True
    may_be_short: bool = False
    """A suite with fewer items than `minimum_items` is passed over, instead of holding the champion."""


class Superior(_Check):
    """A claim: the candidate is right more often than the champion. All claims are one family (Holm)."""

    rule: Literal["superior"]
    against: Literal["champion"]


class NotInferior(_Check):
    """A guard: the candidate's share of right answers is at most `margin` below that of `against`."""

    rule: Literal["not_inferior"]
    against: Peer
    margin: float = Field(ge=0, le=1)
    level: float | None = Field(default=None, gt=0, lt=1)
    """Confidence of its interval, where it is not that of all the others."""


class LengthShare(_Check):
    """A guard: at most `bound` of the candidate's answers are cut by max_tokens."""

    rule: Literal["length_share"]
    bound: float = Field(ge=0, le=1)


class RightShare(_Check):
    """A guard: at least `at_least` of the candidate's answers are right, whatever the champion's are.

    For what the untouched base does right by doing nothing: it calls no tool where none fits, and none else.
    """

    rule: Literal["right_share"]
    at_least: float = Field(ge=0, le=1)


class Ratio(_Data):
    """A guard: a figure of the candidate over the same of `against` is from `at_least` to `at_most`."""

    rule: Literal["ratio"]
    name: str
    measure: Literal["perplexity", "first_token_ms", "tokens_per_s"]
    against: Literal["champion", "base_constrained"]
    at_least: float = Field(default=0.0, ge=0)
    at_most: float = Field(default=math.inf, gt=0)
    blocking: bool = True


Check = Superior | NotInferior | LengthShare | RightShare | Ratio


class ErrorBudget(_Data):
    """How often a candidate may be promoted that is no better: a night, and all nights of a window.

    `alpha_a_night` is the chance of one wrong claim or more in a night in which nothing got better. A night
    never takes more than half of what the window has left.
    """

    alpha_a_night: float = Field(gt=0, lt=0.5)
    window_days: int = Field(ge=1)
    alpha_a_window: float = Field(gt=0)

    @model_validator(mode="after")
    def _a_night_fits(self) -> ErrorBudget:
        if self.alpha_a_window < 2 * self.alpha_a_night:
            raise ValueError(
                f"alpha_a_window is {self.alpha_a_window:g}; it must be at least two nights' alpha_a_night,"
                f" {2 * self.alpha_a_night:g}"
            )
        return self


class Rules(_Data):
    """What configs/gate.yaml holds."""

    level: float = Field(gt=0, lt=1)
    power: float = Field(default=0.8, gt=0, lt=1)
    error_budget: ErrorBudget
    checks: tuple[Annotated[Check, Field(discriminator="rule")], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> Rules:
        names = [check.name for check in self.checks]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two checks have the name {min(twice)!r}; each needs its own")
        return self


def read_rules(path: Path = RULES) -> Rules:
    """The rules in a YAML file.

    Raises:
        pydantic.ValidationError: naming each key that is missing, unknown or out of range.
    """
    return Rules.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
