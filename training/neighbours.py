"""Which questions are nearly others? Jaccard similarity of 5-character shingles, found by MinHash LSH.

The library `rensa` finds who may be near; how near is then computed exactly. Of two questions whose
similarity is 0.6, one pair in 7,000 is missed, of 0.5 one in 60 (256 hashes in 64 bands: 1 - (1 - s^4)^64;
Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from rensa import RMinHash, RMinHashLSH

from grpc_server.domain.types import ChatRequest, Role

NEAR = 0.6
"""Similarity from which a question is nearly another. Chosen by reading the pairs among 400 questions of the
leaderboard: from 0.6, the same request for another city or number; below, merely the same phrases."""

CROWD = 24
"""With so many of its like, a question is compared, and none more: what takes part in a flood of questions
from one template is found beside 24 of them as well as beside 100,000, in time that grows with their number
and not with its square."""

_SHINGLE = 5
_HASHES, _BANDS, _SEED = 256, 64, 7
_AT_ONCE = 1000
_ESTIMATE_OFF = 0.12  # four standard deviations of an estimate from 256 hashes


def question(request: ChatRequest) -> str:
    """What was said in a request, without its instructions, case and punctuation."""
    return normalised(message.content for message in request.messages if message.role is not Role.SYSTEM)


def normalised(texts: Iterable[str]) -> str:
    """Texts without case, punctuation and how their characters are encoded: words, with one blank between."""
    said = unicodedata.normalize("NFKC", " ".join(texts)).casefold()
    return re.sub(r"[\W_]+", " ", said).strip()


class Neighbours:
    """Questions, to be searched for one that is nearly another."""

    def __init__(self, questions: Iterable[str]) -> None:
        self._questions = sorted(set(questions))
        self._hashes = list(_hashed(self._questions))
        self._index = RMinHashLSH(NEAR, _HASHES, _BANDS)
        self._index.insert_many(self._hashes)

    def near(self, text: str) -> bool:
        """Whether one of the questions is nearly `text`."""
        (own,) = _hashed([text])
        return any(
            own.jaccard(self._hashes[number]) >= NEAR - _ESTIMATE_OFF
            and similarity(text, self._questions[number]) >= NEAR
            for number in self._index.query(own)
        )


def near_pairs(questions: Sequence[str], least: float = NEAR) -> Iterator[tuple[int, int, float]]:
    """Pairs of questions, by number, the lower one first, and their similarity, of `least` or more.

    A question that has CROWD of its like before it is compared with these, and not kept for later ones.
    """
    index = RMinHashLSH(NEAR, _HASHES, _BANDS)
    kept: dict[int, RMinHash] = {}
    for number, own in enumerate(_hashed(questions)):
        like = [
            other
            for other in sorted(index.query(own))
            if own.jaccard(kept[other]) >= min(least, NEAR) - _ESTIMATE_OFF
        ][:CROWD]
        for other in like:
            found = similarity(questions[other], questions[number])
            if found >= least:
                yield other, number, found
        if len(like) < CROWD:
            index.insert(number, own)
            kept[number] = own


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of two questions' shingles, 0 to 1."""
    if one == other:
        return 1.0
    first, second = _shingles(one), _shingles(other)
    common = len(first & second)
    return common / (len(first) + len(second) - common)


def _hashed(questions: Sequence[str]) -> Iterator[RMinHash]:
    """MinHashes of questions, some at a time: their shingles take far more memory."""
    for start in range(0, len(questions), _AT_ONCE):
        some = questions[start : start + _AT_ONCE]
        yield from RMinHash.from_token_sets([_pieces(text) for text in some], _HASHES, _SEED)


@lru_cache(maxsize=16_384)
def _shingles(text: str) -> frozenset[str]:
    return frozenset(_pieces(text))


def _pieces(text: str) -> list[str]:
    return [text[start : start + _SHINGLE] for start in range(max(1, len(text) - _SHINGLE + 1))]
