"""How one engine of several fares: well, ejected for its failures, or down; and how much it is given.

That an engine answers its checks does not say that it generates: requests tell. The numbers are those that
Envoy begins with, where it has them
(https://www.envoyproxy.io/docs/envoy/latest/intro/arch_overview/upstream/outlier).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from enum import IntEnum

from grpc_server.domain.ports import Engine
from grpc_server.domain.types import ModelVersion

CHECKS_TO_BE_DOWN = 2
"""Failed checks in a row; one that passes brings a host back."""
FAILURES_TO_EJECT = 5
"""Failed requests in a row."""
STALLED_SECONDS = 30.0
"""A host that has written nothing, for anybody, for so long has failed at what waits for its first token.

A prompt of 4,096 tokens is read in 10 s on two cores, and a model is loaded in less than this from a disk.
"""
GIVEN_UP_SECONDS = 1.0
"""The same for a request that its caller gives up, or whose deadline passes, before its first token.

So a dead host is noticed where no caller waits for as long as that; and a caller who ends many requests at
once makes one failure of them, not many.
"""
EJECTION_SECONDS = 10.0
LONGEST_EJECTION_SECONDS = 300.0
"""An ejection takes twice as long as the one before it, up to this."""
CALM_SECONDS = 300.0
"""Who was not ejected for so long begins anew with the shortest ejection."""
SLOW_START_SECONDS = 30.0
SLOW_START_LEAST = 0.1
"""Who is back is given this share at first, and all after so many seconds: its models must be read first."""

log = logging.getLogger(__name__)


class Standing(IntEnum):
    """The lower the better: whoever is worse is asked only if nobody better has the model version."""

    WELL = 0
    EJECTED = 1
    DOWN = 2


class Host:
    """One engine, `name` as operators know it; `now` in seconds of a clock that is never set back."""

    def __init__(self, name: str, engine: Engine, now: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.engine = engine
        self.models: dict[str, ModelVersion] = {}
        self.in_flight = 0
        self.asked_last = 0
        self.now = now
        self._down = False
        self._failed_checks = 0
        self._failures = 0
        self._failed_at = self._heard_at = float("-inf")
        self._ejections = 0
        self._back_at = float("-inf")

    @property
    def standing(self) -> Standing:
        """How it fares now."""
        if self._down:
            return Standing.DOWN
        return Standing.EJECTED if self.now() < self._back_at else Standing.WELL

    @property
    def load(self) -> float:
        """How full it would be with one request more; who is just back seems fuller."""
        share = (self.now() - self._back_at) / SLOW_START_SECONDS
        return (self.in_flight + 1) / (self.engine.parallel * min(1.0, max(SLOW_START_LEAST, share)))

    def seen(self, models: Iterable[ModelVersion]) -> None:
        """A check has passed; these are its model versions."""
        self.models = {model.name: model for model in models}
        self._failed_checks = 0
        if self._down:
            self._down, self._failures = False, 0
            self._back_at = max(self._back_at, self.now())
            log.info("an engine is back", extra={"host": self.name})

    def unseen(self) -> None:
        """A check has failed."""
        self._failed_checks += 1
        if self._failed_checks >= CHECKS_TO_BE_DOWN and not self._down:
            self._down = True
            log.warning("an engine does not answer its checks", extra={"host": self.name})

    def heard(self) -> None:
        """It has written something, for whomever."""
        self._heard_at = self.now()

    def silent_seconds(self, asked_at: float) -> float:
        """For how long a request that was made then has waited, without a word to it or to others."""
        return self.now() - max(asked_at, self._heard_at)

    def is_given_up(self, asked_at: float) -> bool:
        """Whether a request made then, and given up now without a token, has failed by its fault."""
        return self.silent_seconds(max(asked_at, self._failed_at)) >= GIVEN_UP_SECONDS

    def answered(self) -> None:
        """A request was answered to its end."""
        self._failures = 0

    def failed(self, *, may_be_ejected: bool) -> None:
        """A request failed by this engine's fault."""
        self._failures += 1
        self._failed_at = self.now()
        if self._failures < FAILURES_TO_EJECT or not may_be_ejected or self.standing is not Standing.WELL:
            return
        if self.now() - self._back_at > CALM_SECONDS:
            self._ejections = 0
        seconds = min(LONGEST_EJECTION_SECONDS, EJECTION_SECONDS * 2**self._ejections)
        self._ejections = min(self._ejections + 1, 16)
        self._failures = 0
        self._back_at = self.now() + seconds
        log.warning("an engine is ejected for its failures", extra={"host": self.name, "seconds": seconds})
