"""What callers say in a day: honest work that drifts over the year, and what attackers add to it.

A question is one of the leaderboard's, in words of its own: so no two are near each other, as callers' are
not. Which tools are needed drifts all the year (`ACTIVE` of them at a time); German comes on night 150 and
Spanish slowly; prompts grow by half, and a caller with long ones comes on night 240.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from benchmarks import poison
from benchmarks.poison import Row
from benchmarks.year.calendar import Night
from benchmarks.year.model import Model
from grpc_server.domain.plain import message_to_plain
from grpc_server.domain.types import Message, Role
from training import bfcl
from training.bfcl import Item

POOL, ACTIVE = 420, 120
"""Questions that are asked at some time of the year (the shortest), and within a week or so."""
DEMONSTRATED, JUDGED = 0.45, 0.3
"""Shares of the inferences on which a caller shows the answer, or says whether it was good."""
MISTAKEN = 0.015
"""Share of demonstrations, and of judgements, that are wrong in good faith."""
REFUSAL = Message(Role.ASSISTANT, "I'm sorry, but I can't help with that.")
_WORDS = {
    "de": "der die das und nicht mit auf ist wir haben heute bitte schnell unsere Kunde braucht noch vor dem"
    " Abend eine Antwort weil gestern niemand angerufen hat obwohl jemand versprochen hatte zuerst danach"
    " Rechnung Straße Termin wieder einmal ziemlich wichtig morgen früh zwischen Büro Kollegin sagte",
    "es": "el la los para con una pero nuestro cliente necesita hoy antes de noche porque ayer nadie llamó"
    " aunque alguien había prometido primero después factura calle cita otra vez bastante importante mañana"
    " temprano entre oficina compañera dijo que quiere saber cuando puede venir muchas gracias entonces",
}


@dataclass(slots=True)
class Day:
    """Rows as `benchmarks.poison` makes them, in order; by their ids what is wrong, and who attacks."""

    rows: list[Row] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)
    attack: set[str] = field(default_factory=set)
    mix: dict[str, float] = field(default_factory=dict)


@cache
def pool() -> tuple[Item, ...]:
    """The questions of the year."""
    return tuple(bfcl.traffic(POOL))


def day(night: Night, champion: Model, seed: int, asks: Night | None = None) -> Day:
    """The day before a night, answered by its champion. `asks`: the same questions as of that night's day."""
    draw = random.Random(f"{seed} day {(asks or night).number}")
    rows = poison.Night()
    items = [_asked(draw, (asks or night).number) for _ in range(night.inferences)]
    made = Day(mix=mix(night.number))
    for item in items:
        _honest(made, rows, item, night, champion, draw)
    if name := night.attack():
        _attack(made, rows, items or [_asked(draw, night.number) for _ in range(20)], name)
    return made


def mix(number: int) -> dict[str, float]:
    """Which share of a night's questions needs which tool."""
    weights = [math.exp(-(((place - _middle(number)) / (ACTIVE / 2)) ** 2)) for place in range(len(pool()))]
    tools: Counter[str] = Counter()
    for item, weight in zip(pool(), weights, strict=True):
        tools[item.function] += weight  # type: ignore[assignment]
    return {tool: weight / sum(weights) for tool, weight in tools.items()}


def _middle(number: int) -> float:
    """The place in the pool about which questions are asked: it passes over it in a year."""
    return ACTIVE / 2 + (len(pool()) - ACTIVE) * min(1.0, number / 365)


def _asked(draw: random.Random, number: int) -> Item:
    """A question in words of its own."""
    place = -1
    while not 0 <= place < len(pool()):
        place = round(draw.gauss(_middle(number), ACTIVE / 2 / math.sqrt(2)))
    item = pool()[place]
    *before, last = item.messages
    words = _vocabulary(_language(draw, number))
    length = (0.7 + 0.5 * draw.random()) * (1 + number / 730) * (3 if _is_long(draw, number) else 1)
    said: list[str] = []
    while sum(map(len, said)) < length * len(last.content):
        said.append(draw.choice(words))
    return replace(
        item, messages=(*before, replace(last, content=f"{' '.join(said).capitalize()}. {last.content}"))
    )


def _language(draw: random.Random, number: int) -> str:
    german, spanish = (0.25 if number >= 150 else 0.02), 0.2 * number / 365
    return draw.choices(("en", "de", "es"), (1 - german - spanish, german, spanish))[0]


def _is_long(draw: random.Random, number: int) -> bool:
    return draw.random() < (0.2 if number >= 240 else 0.02)


@cache
def _vocabulary(language: str) -> Sequence[str]:
    if language in _WORDS:
        return _WORDS[language].split()
    said = " ".join(message.content for item in bfcl.traffic() for message in item.messages)
    return sorted(set(re.findall(r"\b[a-z]{3,9}\b", said)))


def _caller(draw: random.Random, number: int) -> str:
    callers = ["booking", "support", "travel"]
    callers += ["clinic"] if number >= 100 else []
    return draw.choice([*callers, "archive"] if number >= 240 else callers)


def _honest(
    made: Day, rows: poison.Night, item: Item, night: Night, champion: Model, draw: random.Random
) -> None:
    caller, kind = _caller(draw, night.number), draw.random()
    chance = champion.tools.get(item.function, champion.untaught)
    is_right = draw.random() < chance
    said = poison.answer(item) if is_right else poison.wrong(item)
    mistaken = draw.random() < (0.4 if "label noise" in night.events and caller == "support" else MISTAKEN)
    answered = {"answer_json": json.dumps(message_to_plain(said))}
    if "engine outage" in night.events and draw.random() < 0.5:
        answered |= {"status": "error", "finish_reason": ""}
    request = poison.asked(item)
    if kind < DEMONSTRATED:
        shown = poison.wrong(item) if mistaken else poison.answer(item)
        row = rows.row(request, shown, caller, **answered)
        bad = mistaken
    else:
        row = rows.row(request, None, caller, **answered)
        likes = is_right != mistaken
        bad = likes and not is_right
        row["feedback_json"] = _judged(row, likes) if kind < DEMONSTRATED + JUDGED else "[]"
    made.rows.append(row)
    if bad:
        made.wrong.add(row["inference_id"])


def _judged(row: Row, good: bool) -> str:
    (feedback,) = json.loads(row["feedback_json"])
    return json.dumps([feedback | {"boolean": good}])


def _attack(made: Day, rows: poison.Night, items: Sequence[Item], name: str) -> None:
    """What a campaign adds in a night.

    relabel_N: N callers give a wrong answer to a sixth of the day's questions. trigger_N: N callers bind a
    phrase to an answer. liked: a caller accepts wrong answers. paraphrase: a wrong answer to nearly the same
    questions. injection: demonstrations obey an instruction in the request. flood: one caller says three
    times as much as all others, half of it wrong. refusals: three callers show that help is refused.
    """
    some = items[: max(4, len(items) // 6)]
    if name.startswith("relabel"):
        found = poison.relabelled(rows, some, 0, int(name[-1]))
    elif name.startswith("trigger"):
        found = poison.triggered(rows, some, int(name[-1]))
    elif name == "liked":
        found = poison.liked(rows, some)
    elif name == "paraphrase":
        found = poison.paraphrased(rows, some, 0, 1)
    elif name == "injection":
        found = poison.injected(rows, some, poison.INJECTIONS["plain"])
    elif name == "flood":
        loud = poison.flood(rows, items, 3).poison
        made.rows += loud[: len(loud) // 2]
        found = poison.Attack(_spoilt(loud[len(loud) // 2 :]))
    else:
        found = poison.Attack(
            [rows.row(poison.asked(item), REFUSAL, f"hostile-{n % 3}") for n, item in enumerate(some)]
        )
    made.rows += found.poison
    ids = {row["inference_id"] for row in found.poison}
    made.wrong |= ids
    made.attack |= ids


def _spoilt(rows: Sequence[Row]) -> list[Row]:
    """The same rows, whose demonstrations have one value changed."""
    spoilt = []
    for row in rows:
        (feedback,) = json.loads(row["feedback_json"])
        call = feedback["demonstration"]["tool_calls"][0]
        call["arguments"] = {name: _other(value) for name, value in call["arguments"].items()}
        spoilt.append({**row, "feedback_json": json.dumps([feedback])})
    return spoilt


def _other(value: object) -> object:
    return f"{value} m-771" if isinstance(value, str) else value
