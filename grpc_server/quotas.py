"""What each caller may use: requests and tokens in a minute, and streams at once.

A request's tokens are reserved before it runs, from its prompt's size and its max_tokens, and settled with
what it really used. Nothing waits here: a request that does not fit is refused, and told when it will.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from grpc_server.domain.errors import Exhausted
from grpc_server.domain.types import Caller

WINDOW_SECONDS = 60
MAX_CALLERS = 50_000
"""Callers with a quota whose use of the last minute is kept: about 1 KiB each."""
STREAM_SECONDS = 1.0
"""What one is advised to wait for one of one's own streams to end."""


class Window:
    """Amounts of the last minute, added up in slots of a second.

    A slot counts until it is wholly older than a minute, so that no minute, wherever it begins, ever has more
    than the limit; what is used comes free at most a second late. A bucket that is filled all the while would
    let twice the limit through in its first minute.
    """

    def __init__(self) -> None:
        self._slots: deque[list[int]] = deque()  # [second, amount], the oldest first: at most 61
        self.total = 0

    def drop_old(self, second: int) -> None:
        """Forget what is over a minute old."""
        while self._slots and self._slots[0][0] < second - WINDOW_SECONDS:
            self.total -= self._slots.popleft()[1]

    def add(self, second: int, amount: int) -> None:
        """Count `amount` in the slot of `second`, which is not before that of any other."""
        if self._slots and self._slots[-1][0] == second:
            self._slots[-1][1] += amount
        else:
            self._slots.append([second, amount])
        self.total += amount

    def give_back(self, second: int, amount: int) -> None:
        """Take `amount` out of the slot of `second` again, if that still counts."""
        for slot in reversed(self._slots):
            if slot[0] == second:
                slot[1] -= amount
                self.total -= amount
                return

    def free_at(self, room: int) -> int:
        """The second from which on at most `room` is in use, if nothing is added meanwhile."""
        left, second = self.total, 0
        for begun, amount in self._slots:
            if left <= room:
                break
            left -= amount
            second = begun + WINDOW_SECONDS + 1
        return second


class _Use:
    """What one caller uses."""

    __slots__ = ("requests", "streams", "tokens")

    def __init__(self) -> None:
        self.requests = Window()
        self.tokens = Window()
        self.streams = 0

    def idle(self, second: int) -> bool:
        self.requests.drop_old(second)
        self.tokens.drop_old(second)
        return not (self.streams or self.requests.total or self.tokens.total)


class Held:
    """A request's part of its caller's quotas; `used` is settled when the block ends, 0 where nothing was."""

    def __init__(self, settle: Callable[[int], None]) -> None:
        self._settle = settle
        self.used = 0

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *error: object) -> None:
        self._settle(self.used)


class Quotas:
    """The quotas of one server; with several servers each keeps its own.

    Args:
        monotonic: seconds; a step back is taken for no step.
        max_callers: for how many callers use is kept. Of more, the new ones are refused.
        servers: how many share what a caller may use; an equal part holds here, rounded down, at least 1.
    """

    def __init__(
        self,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        max_callers: int = MAX_CALLERS,
        servers: int = 1,
    ) -> None:
        self._monotonic = monotonic
        self._servers = servers
        self._max_callers = max_callers
        self._latest = float("-inf")
        self._uses: OrderedDict[str, _Use] = OrderedDict()  # whose last request is longest ago, first

    @property
    def callers(self) -> int:
        """Of how many callers the use is kept."""
        return len(self._uses)

    def hold(self, caller: Caller, tokens: int) -> Held:
        """Count a request that may use `tokens`, and hold a stream, until the block ends.

        A request that is refused counts for nothing; one that runs and fails counts as a request.

        Raises:
            Exhausted: what is used up, its limit, and after how many seconds there is room.
        """
        limits = caller.limits
        if (limits.requests_per_minute, limits.tokens_per_minute, limits.concurrent_streams) == (None,) * 3:
            return Held(lambda _: None)
        now = self._now()
        second = math.floor(now)
        use = self._use(caller.key_id, second)
        self._check_streams(caller, use)
        self._check(caller, "requests_per_minute", limits.requests_per_minute, use.requests, 1, now)
        self._check(caller, "tokens_per_minute", limits.tokens_per_minute, use.tokens, tokens, now)
        use.streams += 1
        use.requests.add(second, 1)
        use.tokens.add(second, tokens)

        def settle(used: int) -> None:
            use.streams -= 1
            if used <= tokens:
                use.tokens.give_back(second, tokens - used)
            else:  # the prompt had more tokens than its size told: later requests wait for them
                use.tokens.add(math.floor(self._now()), used - tokens)

        return Held(settle)

    def _now(self) -> float:
        self._latest = max(self._latest, self._monotonic())
        return self._latest

    def _use(self, key_id: str, second: int) -> _Use:
        """The caller's use, without what is over a minute old; drops that of two others which are idle."""
        for _ in range(2):
            first = next(iter(self._uses), None)
            if first is None:
                break
            if self._uses[first].idle(second):
                del self._uses[first]
            elif self._uses[first].streams:
                self._uses.move_to_end(first)
        if key_id not in self._uses and len(self._uses) >= self._max_callers:
            raise Exhausted(
                f"this server has quotas of {self._max_callers} callers to keep; try again later",
                retry_after_seconds=WINDOW_SECONDS,
            )
        use = self._uses.setdefault(key_id, _Use())
        self._uses.move_to_end(key_id)
        use.idle(second)
        return use

    def _part(self, limit: int) -> int:
        """What of a caller's limit holds here."""
        return max(min(limit, 1), limit // self._servers)

    def _told(self, limit: int) -> str:
        if self._servers == 1:
            return str(limit)
        return f"{limit}, of which {self._part(limit)} on each of {self._servers} servers"

    def _check_streams(self, caller: Caller, use: _Use) -> None:
        limit = caller.limits.concurrent_streams
        if limit is not None and use.streams >= self._part(limit):
            raise Exhausted(
                f"concurrent_streams of this caller is {self._told(limit)}, and as many run; try again when"
                " one has ended",
                retry_after_seconds=STREAM_SECONDS,
                subject=f"caller:{caller.name}",
            )

    def _check(
        self, caller: Caller, name: str, limit: int | None, window: Window, amount: int, now: float
    ) -> None:
        if limit is None or window.total + amount <= self._part(limit):
            return
        subject, here = f"caller:{caller.name}", self._part(limit)
        if amount > here:
            raise Exhausted(
                f"this request may use {amount} tokens, and {name} of this caller is {self._told(limit)};"
                " shorten the prompt, or lower max_tokens",
                retry_after_seconds=None,
                subject=subject,
            )
        seconds = window.free_at(here - amount) - now
        raise Exhausted(
            f"{name} of this caller is {self._told(limit)}, {window.total} are in use, and this request needs"
            f" {amount}; try again in {math.ceil(seconds)} s",
            retry_after_seconds=seconds,
            subject=subject,
        )
