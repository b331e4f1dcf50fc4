"""Is a question nearly one of others? Exact Jaccard similarity of 5-character shingles.

An index from each shingle to its questions keeps it quick for tens of thousands of them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable

from grpc_server.domain.types import ChatRequest, Role

NEAR = 0.6
"""Similarity from which a question is nearly another. Chosen by reading the pairs among 400 questions of the
leaderboard: from 0.6, the same request for another city or number; below, merely the same phrases."""

_SHINGLE = 5


def question(request: ChatRequest) -> str:
    """What was said in a request, without its instructions, case and punctuation."""
    said = " ".join(message.content for message in request.messages if message.role is not Role.SYSTEM)
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", said).casefold()).strip()


class Neighbours:
    """Questions, to be searched for one that is nearly another."""

    def __init__(self, questions: Iterable[str]) -> None:
        self._sizes: list[int] = []
        self._index: defaultdict[str, list[int]] = defaultdict(list)
        for number, text in enumerate(sorted(set(questions))):
            shingles = _shingles(text)
            self._sizes.append(len(shingles))
            for shingle in shingles:
                self._index[shingle].append(number)

    def near(self, text: str) -> bool:
        """Whether one of the questions is nearly `text`."""
        own = _shingles(text)
        shared = Counter(number for shingle in own for number in self._index.get(shingle, ()))
        return any(
            common / (len(own) + self._sizes[number] - common) >= NEAR for number, common in shared.items()
        )


def _shingles(text: str) -> frozenset[str]:
    return frozenset(text[start : start + _SHINGLE] for start in range(max(1, len(text) - _SHINGLE + 1)))
