"""A queue that is fair between callers: the next request is one of the caller who has been given least.

What a caller was given is counted in tokens, as in virtual token counters (Sheng et al., "Fairness in Serving
Large Language Models", OSDI 2024). Where a caller's count begins is the start tag of start-time fair queuing
(Goyal, Vin and Cheng, SIGCOMM 1996): a caller who comes back neither has saved up turns while it was away,
nor pays for what it got when nobody else asked.

Every operation costs O(log n) comparisons, n being the callers that wait, and at most one move of n pointers.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)

REMEMBERED = 1024
"""Callers without a request in the queue whose count is kept; of more, the longest away is forgotten."""


class NoRoomError(Exception):
    """The queue is full; `own` if it is so for this caller alone."""

    def __init__(self, *, own: bool) -> None:
        super().__init__()
        self.own = own


@dataclass(slots=True, eq=False)
class _Account(Generic[Item]):
    """One caller: tokens that it was given and that its running requests may take, and what of it waits."""

    caller: str
    given: float = 0.0
    running: float = 0.0
    waiting: OrderedDict[Item, float] = field(default_factory=OrderedDict)
    """In the order they came, each with its cost."""
    turn: tuple[float, int] = (0.0, -1)
    """Its place in the order, while something waits: its count, then who came to it first."""

    @property
    def count(self) -> float:
        return self.given + self.running


class FairQueue(Generic[Item]):
    """At most `size` requests, and `per_caller` of one caller.

    Where it is full, a caller with fewer requests takes the last place of the one who has most: a flood does
    not keep others out.
    """

    def __init__(self, size: int, per_caller: int) -> None:
        self._size = size
        self._per_caller = per_caller
        self._clock = 0.0  # the most that anybody had been given who was served: where newcomers begin
        self._waiting: dict[str, _Account[Item]] = {}
        self._away: OrderedDict[str, _Account[Item]] = OrderedDict()
        self._order: list[tuple[tuple[float, int], _Account[Item]]] = []
        self._numbers = itertools.count()
        self._by_length: dict[int, OrderedDict[str, None]] = {}
        self._longest = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def remembered(self) -> int:
        """Callers of whom something is kept."""
        return len(self._waiting) + len(self._away)

    def ahead_of(self, caller: str) -> int:
        """About how many requests are taken before one that `caller` would push now."""
        own = self._waiting.get(caller)
        if own is None:
            away = self._away.get(caller)
            return self._before(max(self._clock, 0.0 if away is None else away.count))
        length = len(own.waiting)
        others = self._before(own.count + length * next(reversed(own.waiting.values()))) - 1
        return min(self._length, length + (length + 1) * others)

    def push(self, caller: str, item: Item, cost: float) -> Item | None:
        """Let `item`, of about `cost` tokens, wait; returns what has lost its place to it, if anything.

        Raises:
            NoRoomError: the caller has `per_caller` requests here, or the queue is full and nobody has more.
        """
        own = self._waiting.get(caller)
        length = 0 if own is None else len(own.waiting)
        if length >= self._per_caller:
            raise NoRoomError(own=True)
        lost = None
        if self._length >= self._size:
            if self._longest <= length + 1:
                raise NoRoomError(own=False)
            lost = self._take_last(self._waiting[next(iter(self._by_length[self._longest]))])
        account = self._account(caller)
        account.waiting[item] = cost
        self._resized(account, length)
        if not length:
            self._waiting[caller] = account
            self._line_up(account)
        return lost

    def pop(self) -> Item:
        """Take the next request, whose cost counts from now on. Raises IndexError if there is none."""
        account = self._order[0][1]
        item, cost = account.waiting.popitem(last=False)
        self._resized(account, len(account.waiting) + 1)
        self._begin(account, cost)
        return item

    def discard(self, caller: str, item: Item) -> bool:
        """Forget a request that waits; False if it does not."""
        account = self._waiting.get(caller)
        if account is None or item not in account.waiting:
            return False
        del account.waiting[item]
        self._resized(account, len(account.waiting) + 1)
        if not account.waiting:
            self._leave(account)
        return True

    def begin(self, caller: str, cost: float) -> None:
        """A request runs that did not have to wait."""
        self._begin(self._account(caller), cost)

    def end(self, caller: str, cost: float, tokens: float) -> None:
        """A request that was expected to take `cost` took `tokens`."""
        account = self._waiting.get(caller) or self._away.get(caller)
        if account is not None:
            self._step_out(account)
            account.running = max(0.0, account.running - cost)
            account.given += tokens
            self._step_in(account)

    def forget(self) -> None:
        """Nobody is served any more, and nobody waits: all begin anew."""
        if not self._length:
            self._clock = 0.0
            self._away.clear()

    def _account(self, caller: str) -> _Account[Item]:
        account = self._waiting.get(caller)
        if account is None:
            account = self._away.pop(caller, None) or _Account(caller)
            account.given = max(account.given, self._clock - account.running)
        return account

    def _begin(self, account: _Account[Item], cost: float) -> None:
        self._step_out(account)
        self._clock = max(self._clock, account.given)
        account.running += cost
        self._step_in(account)

    def _before(self, count: float) -> int:
        """How many callers that wait count no more."""
        return bisect.bisect_right(self._order, (count, math.inf), key=lambda entry: entry[0])

    def _step_in(self, account: _Account[Item]) -> None:
        if account.waiting:
            self._line_up(account)
        else:
            self._leave(account)

    def _line_up(self, account: _Account[Item]) -> None:
        account.turn = (account.count, next(self._numbers))
        bisect.insort(self._order, (account.turn, account))

    def _step_out(self, account: _Account[Item]) -> None:
        at = bisect.bisect_left(self._order, account.turn, key=lambda entry: entry[0])
        if at < len(self._order) and self._order[at][1] is account:
            del self._order[at]

    def _leave(self, account: _Account[Item]) -> None:
        """Nothing of this caller waits: keep its count while that is more than a newcomer's."""
        self._step_out(account)
        self._waiting.pop(account.caller, None)
        self._away.pop(account.caller, None)
        if account.count > self._clock:
            self._away[account.caller] = account
            if len(self._away) > REMEMBERED:
                self._away.popitem(last=False)

    def _take_last(self, account: _Account[Item]) -> Item:
        """The newest request of a caller who has several."""
        item, _ = account.waiting.popitem()
        self._resized(account, len(account.waiting) + 1)
        return item

    def _resized(self, account: _Account[Item], before: int) -> None:
        """Keep who has how many, and the most that one has: it falls by one at a time."""
        after = len(account.waiting)
        self._length += after - before
        if before:
            of_length = self._by_length[before]
            del of_length[account.caller]
            if not of_length:
                del self._by_length[before]
        if after:
            self._by_length.setdefault(after, OrderedDict())[account.caller] = None
        self._longest = max(self._longest, after)
        if self._longest and self._longest not in self._by_length:
            self._longest -= 1
