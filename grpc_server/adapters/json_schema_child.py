"""The child process that checks callers' schemas: `python -m grpc_server.adapters.json_schema_child SECONDS`.

It says `ready`; then it answers each line of stdin, `{"schema": …, "answer": …}`, with a line on stdout,
`{"problem": …}`, until stdin closes. Neither library that it asks is sure to end: an `allOf` of 14 `anyOf`s
(1.3 KB) took llguidance 1.9 s, one of 12 took 0.4 s, and one of 40 would take a century; `jsonschema` visits
twice what is referred to twice, and a pattern of nine characters keeps Python's `re` busy for years. So a
question that takes more than SECONDS of processor time, or too much memory, ends the process, by the kernel's
hand.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

from grpc_server.adapters.answering_child import answer_questions

REASON_CHARACTERS = 500


@functools.lru_cache(maxsize=64)
def unholdable(schema: str) -> str:
    """Why no answer can be held to `schema` (JSON); empty if one can."""
    from llguidance import LLMatcher

    problem = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema))
    if not problem:
        return ""
    reason = problem.splitlines()[0].partition("failed to compile JSON schema: ")[2]
    return reason[:REASON_CHARACTERS] or "too complex"


def unfit(answer: str, schema: str) -> str:
    """Why `answer` does not fit `schema` (both JSON); empty if it does."""
    import jsonschema
    import referencing

    # A registry of its own: what it does not hold is never fetched.
    validator = jsonschema.Draft202012Validator(json.loads(schema), registry=referencing.Registry())
    try:
        return "" if validator.is_valid(json.loads(answer)) else "it does not fit"
    except (ValueError, RecursionError, referencing.exceptions.Unresolvable):
        return "it is no JSON, or cannot be compared"


def answered(line: str) -> str:
    """The line that answers a line of stdin."""
    question = json.loads(line)
    schema, answer = question["schema"], question["answer"]
    return json.dumps({"problem": unholdable(schema) if answer is None else unfit(answer, schema)})


def _ready() -> Callable[[str], str]:
    unfit("1", "{}")
    unholdable("{}")  # both libraries are loaded now
    return answered


if __name__ == "__main__":
    answer_questions(_ready)
