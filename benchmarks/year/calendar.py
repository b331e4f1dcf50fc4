"""What happens in which night of the year, drawn from a seed: traffic, attacks, mishaps, holidays."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from training.cycle import cycle_id

ATTACKS = (
    "relabel_1",
    "trigger_1",
    "liked",
    "relabel_3",
    "paraphrase",
    "injection",
    "trigger_2",
    "flood",
    "refusals",
)
"""Campaigns, in this order, again and again: what `traffic.py` makes of each is said there."""
MISHAPS = (
    "kill freeze",
    "kill validate",
    "kill curate",
    "kill evaluate",
    "kill gate",
    "kill route",
    "postgres dies",
    "disk full",
    "clock back",
    "engine outage",
    "empty",
    "duplicated",
    "late feedback",
    "bad training",
    "label noise",
)
"""Single nights; `label noise` lasts five."""
CLOCK_BACK = timedelta(days=3) - timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Night:
    """One night: its number from 0, the day whose traffic it learns, and what happens."""

    number: int
    day: datetime
    inferences: int
    events: frozenset[str]

    @property
    def clock(self) -> datetime:
        """When its machine believes the day to be."""
        return self.day - CLOCK_BACK if "clock back" in self.events else self.day

    @property
    def cycle_id(self) -> str:
        """The night after the day, at two o'clock by the machine's clock."""
        return cycle_id(self.clock + timedelta(days=1, hours=2))

    def attack(self) -> str | None:
        """The campaign that is on."""
        return next((each for each in ATTACKS if each in self.events), None)


def year(seed: int, first: datetime, nights: int, inferences: int = 110) -> list[Night]:
    """The nights of a year (or its first ones): the same for the same arguments, however many are asked for.

    A campaign of three to six nights begins about every sixteen, a mishap about every six; a weekend has
    half a weekday's `inferences`.
    """
    draw = random.Random(seed)
    campaigns = dict(_campaigns(draw, 366))
    mishaps = dict(_mishaps(draw, 366))
    found = []
    for number in range(nights):
        day = first + timedelta(days=number)
        own = random.Random(f"{seed} {number}")
        volume = inferences * own.uniform(0.8, 1.2) * (0.5 if day.weekday() >= 5 else 1.0)
        events = frozenset(filter(None, (campaigns.get(number), mishaps.get(number))))
        found.append(Night(number, day, 0 if "empty" in events else max(1, int(volume)), events))
    return found


def each_kind(first: datetime, inferences: int, kinds: Iterable[str]) -> list[Night]:
    """A small year: a night for each of `kinds`, several with a comma between them."""
    return [
        Night(number, first + timedelta(days=number), inferences, frozenset(filter(None, kind.split(","))))
        for number, kind in enumerate(kinds)
    ]


def _campaigns(draw: random.Random, nights: int) -> Iterator[tuple[int, str]]:
    number, turn = 12, 0
    while number < nights:
        for night in range(number, number + draw.randint(3, 6)):
            yield night, ATTACKS[turn % len(ATTACKS)]
        turn += 1
        number += draw.randint(12, 20)


def _mishaps(draw: random.Random, nights: int) -> Iterator[tuple[int, str]]:
    number = 4
    kinds: list[str] = []
    while number < nights:
        if not kinds:
            kinds = draw.sample(MISHAPS, len(MISHAPS))
        kind = kinds.pop()
        lasts = 5 if kind == "label noise" else 3 if kind == "empty" and draw.random() < 0.2 else 1
        for night in range(number, number + lasts):
            yield night, kind
        number += lasts + draw.randint(2, 7)
