"""Make `barred.json`: what no traffic and no training set may hold: `simple_python` 200-399 must stay unseen.

Run: python -m training.data.make_barred

The one place that compares with the sealed items, which `training.sealed` scores. It holds their questions
and functions in memory while it compares, and writes or prints only the ids of other items, counts, and
SHA-256 fingerprints of the questions and function names: by these `training.curate` bars what came from
elsewhere than this leaderboard's files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from training import bfcl

HELD_OUT = range(200, 400)


def normalised(question: list[list[dict[str, str]]]) -> str:
    """A question's text without case, punctuation and blanks, so that only its words count."""
    said = " ".join(turn["content"] for turns in question for turn in turns if turn["role"] == "user")
    return re.sub(r"[\W_]+", "", said.lower())


def fingerprint(text: str) -> str:
    """SHA-256 of a text, in hex: it can be compared with, and not read back."""
    return hashlib.sha256(text.encode()).hexdigest()


def barred(
    rows: Iterable[str], questions: frozenset[str], functions: frozenset[str]
) -> tuple[list[str], int, int]:
    """Ids of `rows` to bar; how many share a question; how many share a function."""
    ids, by_question, by_function = [], 0, 0
    for row in map(json.loads, rows):
        same_question = normalised(row["question"]) in questions
        same_function = any(offered["name"] in functions for offered in row["function"])
        by_question += same_question
        by_function += same_function
        if same_question or same_function:
            ids.append(row["id"])
    return ids, by_question, by_function


def main(target: Path = bfcl.BARRED_FILE) -> None:
    """Write `target`, and print the counts."""
    held_out = [json.loads(line) for line in bfcl.read_lines("simple_python", HELD_OUT, unsealed=True)]
    questions = frozenset(normalised(row["question"]) for row in held_out)
    functions = frozenset(offered["name"] for row in held_out for offered in row["function"])
    ids: list[str] = []
    counts = {}
    for category in bfcl.TRAFFIC_CATEGORIES:
        numbers = bfcl.TRAFFIC_SIMPLE if category == "simple_python" else None
        found, by_question, by_function = barred(bfcl.read_lines(category, numbers), questions, functions)
        counts[category] = {
            "share_a_question": by_question,
            "share_a_function": by_function,
            "barred": len(found),
        }
        ids += found
    content = {
        "made_by": "python -m training.data.make_barred",
        "why": "each shares a question or a function name with simple_python 200-399",
        "counts": counts,
        "barred": ids,
        "fingerprints": {
            "questions": sorted(map(fingerprint, questions)),
            "functions": sorted(map(fingerprint, functions)),
        },
    }
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()
