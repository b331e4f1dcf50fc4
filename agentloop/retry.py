"""When to try again, and how long to wait before it."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import grpc

from agentloop.errors import retry_after_s

ATTEMPTS = 5
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 2.0

_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)


@dataclass(slots=True)
class Attempts:
    """The tries of one call within its deadline: exponential delays with full jitter.

    Full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """

    deadline: float  # of time.monotonic()
    safe: bool = True
    made: int = 0

    @classmethod
    def within(cls, timeout_s: float, *, safe: bool = True) -> Attempts:
        """Tries until `timeout_s` seconds from now; only one if a second is not `safe`."""
        return cls(time.monotonic() + timeout_s, safe)

    @property
    def remaining_s(self) -> float:
        """Seconds to the deadline, never below zero."""
        return max(0.0, self.deadline - time.monotonic())

    def delay_after(self, error: grpc.RpcError) -> float | None:
        """Seconds to wait before the next try, or None: give up.

        UNAVAILABLE is tried again, and RESOURCE_EXHAUSTED where the server says when; never sooner than
        it says.
        """
        self.made += 1
        if not self.safe or self.made >= ATTEMPTS or error.code() not in _PASSING:
            return None
        told = retry_after_s(error)
        if told is None and error.code() is not grpc.StatusCode.UNAVAILABLE:
            return None
        jitter = random.uniform(0, min(LONGEST_DELAY_S, FIRST_DELAY_S * 2**self.made))  # noqa: S311 (no secret)
        delay = (told or 0.0) + jitter
        return delay if delay < self.remaining_s else None
