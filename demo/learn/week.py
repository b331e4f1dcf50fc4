"""What is asked on which night."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from operator import itemgetter

from demo.questions import playable
from demo.traffic import Asked
from grpc_server.domain.chat_format import render
from grpc_server.domain.types import ChatRequest
from training import bfcl_calls
from training.examples import read_barred

NIGHTS = 7
CALLS_TO_ONE_WITHOUT = 5
# Rendered. What is longer is a tenth of the traffic that takes a third of the training's time: long lists of
# functions, which the target never has.
LONGEST_PROMPT = 2000


def week(nights: int = NIGHTS, most: int | None = None) -> list[tuple[Asked, ...]]:
    """The questions of each night, shorter ones on earlier nights; at most `most` a night.

    A night has `CALLS_TO_ONE_WITHOUT` questions that a function answers to one that none does: of
    `live_irrelevance`, as the gate asks `irrelevance`. Nothing shares a question or a function with
    `simple_python` 200-399.

    Raises:
        demo.failure.LinkError: if the leaderboard is not installed.
        ValueError: if there are fewer questions than nights.
    """
    barred = read_barred()
    calls = _shorter_first(playable())
    without = _shorter_first(
        item
        for item in bfcl_calls.items("live_irrelevance")
        if ChatRequest(item.messages, tools=item.tools) not in barred
    )
    share = len(calls) // nights if most is None else min(len(calls) // nights, most)
    if share < 1:
        raise ValueError(f"{nights} nights have {len(calls)} questions; ask for at most as many nights")
    return [
        tuple(_mixed(calls[night * share : (night + 1) * share], without, night * share))
        for night in range(nights)
    ]


def _shorter_first(items: Iterable[Asked]) -> list[Asked]:
    measured = [(len(render(item.messages, item.tools)), item.id, item) for item in items]
    return [item for length, _, item in sorted(measured, key=itemgetter(0, 1)) if length <= LONGEST_PROMPT]


def _mixed(calls: Sequence[Asked], without: Sequence[Asked], before: int) -> Iterator[Asked]:
    """`calls`, and after so many of all nights' the next of `without`, until there is none."""
    for number, item in enumerate(calls, start=before + 1):
        yield item
        if number % CALLS_TO_ONE_WITHOUT == 0:
            yield from islice(without, number // CALLS_TO_ONE_WITHOUT - 1, number // CALLS_TO_ONE_WITHOUT)
