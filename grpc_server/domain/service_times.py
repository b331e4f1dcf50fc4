"""What answers took lately, and what the next is expected to take."""

from __future__ import annotations

import bisect
from collections import OrderedDict, deque
from collections.abc import Callable

WINDOW = 64
"""Answers of a model version that are remembered."""
ENOUGH = 8
"""Fewer say nothing."""
FRESH_SECONDS = 10.0
"""Without a new answer for so long nothing is known: else one slow minute could refuse everybody for ever."""
QUICK, TYPICAL = 0.1, 0.5
"""Shares of answers that were quicker."""
NEWEST_WEIGHT = 1 / 16
VERSIONS = 64
"""Model versions that are remembered; of more, the longest unused is forgotten."""


class _Window:
    """The last WINDOW values, sorted too."""

    def __init__(self) -> None:
        self._values: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float) -> None:
        if len(self._values) == WINDOW:
            del self._sorted[bisect.bisect_left(self._sorted, self._values.popleft())]
        self._values.append(value)
        bisect.insort(self._sorted, value)

    def quantile(self, share: float) -> float:
        return self._sorted[int(len(self._sorted) * share)]


class _Version:
    def __init__(self) -> None:
        self.first_token = _Window()
        self.per_token = _Window()
        self.tokens = _Window()
        self.seen_at = 0.0


class ServiceTimes:
    """Times in seconds; `monotonic` is the clock by which they grow old."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._mean: float | None = None
        self._versions: OrderedDict[str, _Version] = OrderedDict()

    @property
    def mean(self) -> float | None:
        """How long a place is held, on the average of about the last 16; None before the first."""
        return self._mean

    def held(self, seconds: float) -> None:
        """A place was given back after `seconds`, whatever became of the answer."""
        self._mean = seconds if self._mean is None else self._mean + NEWEST_WEIGHT * (seconds - self._mean)

    def answered(self, model_version: str, first_token: float, seconds: float, tokens: int) -> None:
        """A whole answer of `tokens`: how long its first took, and all of them, since it had its place."""
        version = self._versions.pop(model_version, None) or _Version()
        self._versions[model_version] = version
        if len(self._versions) > VERSIONS:
            self._versions.popitem(last=False)
        version.first_token.add(first_token)
        version.per_token.add((seconds - first_token) / max(1, tokens))
        version.tokens.add(tokens)
        version.seen_at = self._monotonic()

    def least(self, model_version: str, max_tokens: int) -> float | None:
        """Nine of ten answers of at most `max_tokens` take longer; None while too little is known.

        A quick first token, then as many as a short answer has, each quick too.
        """
        return self._expected(model_version, max_tokens, QUICK)

    def typical(self, model_version: str, max_tokens: int) -> float | None:
        """What an answer of at most `max_tokens` takes; None while too little is known."""
        return self._expected(model_version, max_tokens, TYPICAL)

    def _expected(self, model_version: str, max_tokens: int, share: float) -> float | None:
        version = self._versions.get(model_version)
        if version is None or len(version.tokens) < ENOUGH:
            return None
        if self._monotonic() - version.seen_at > FRESH_SECONDS:
            return None
        tokens = min(max_tokens, version.tokens.quantile(share))
        return version.first_token.quantile(share) + tokens * version.per_token.quantile(share)
