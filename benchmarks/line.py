"""One benchmark line: a figure, what it is compared with, and whether it reaches its goal."""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass

_COMPARISONS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}


@dataclass(frozen=True, slots=True)
class Line:
    """A figure beside its peer's. `goal` reads like `<= 1.5`, or is empty where the figure only informs."""

    benchmark: str
    metric: str
    value: float
    unit: str
    peer: str
    peer_value: float | None
    goal: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether value reaches the goal; None without one. Raises ValueError for an unreadable goal."""
        if not self.goal:
            return None
        sign, _, bound = self.goal.partition(" ")
        if sign not in _COMPARISONS:
            raise ValueError(
                f"goal is {self.goal!r}; it must be one of {', '.join(_COMPARISONS)}, a space, a number"
            )
        return bool(_COMPARISONS[sign](self.value, float(bound)))

    def as_dict(self) -> dict[str, object]:
        """The line as it is printed and stored."""
        return {**asdict(self), "holds": self.holds}
