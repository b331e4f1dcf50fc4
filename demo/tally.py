"""How the traffic went: every request and what became of it."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["request", "cancelled", "timed out", "malformed"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request. `status` is a gRPC status; `ttft_ms` is measured at the client."""

    kind: Kind
    service: str
    status: str
    expected: bool
    inference_id: str = ""
    model_version: str = ""
    ttft_ms: float | None = None
    detail: str = ""


@dataclass(slots=True)
class Tally:
    """All outcomes so far."""

    outcomes: list[Outcome] = field(default_factory=list)
    feedbacks: int = 0

    def add(self, outcome: Outcome) -> None:
        """Count one more."""
        self.outcomes.append(outcome)

    @property
    def requests(self) -> int:
        """Requests that were meant to be answered."""
        return sum(outcome.kind == "request" for outcome in self.outcomes)

    @property
    def failures(self) -> list[Outcome]:
        """What failed and should not have, and what should have been refused and was not."""
        return [outcome for outcome in self.outcomes if not outcome.expected]

    @property
    def inference_ids(self) -> set[str]:
        """The inferences that a service was told of: each must be in the log."""
        return {outcome.inference_id for outcome in self.outcomes if outcome.inference_id}

    def apart(self) -> dict[str, int]:
        """What went wrong on purpose, by kind."""
        kinds = Counter(outcome.kind for outcome in self.outcomes if outcome.kind != "request")
        return dict(sorted(kinds.items()))

    def by_version(self) -> dict[str, int]:
        """Answered requests by model version."""
        versions = Counter(
            outcome.model_version
            for outcome in self.outcomes
            if outcome.kind == "request" and outcome.status == "OK"
        )
        return dict(sorted(versions.items()))

    def ttft_ms(self, percent: int) -> float | None:
        """That percentile (1 to 99) of the time to first token, or None if nothing was answered."""
        measured = [outcome.ttft_ms for outcome in self.outcomes if outcome.ttft_ms is not None]
        if len(measured) < 2:
            return measured[0] if measured else None
        return statistics.quantiles(measured, n=100, method="inclusive")[percent - 1]
