"""Which JSON Schemas an answer can be held to, and how it is laid out; the same for both engines.

llama.cpp does not say so when it cannot hold an answer to a schema: it logs the fact, or drops a keyword, and
goes on. So schemas are compiled here first, with the library (llguidance) that the embedded engine has
inside; and as Ollama's llama.cpp has another inside, which drops other keywords, its answers are checked at
their end.
"""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import referencing
from llguidance import LLMatcher

from grpc_server.domain.errors import EngineFailed, InvalidArgument
from grpc_server.domain.types import JsonObject

_FIELD = "response_format.json_schema"
_GUIDANCE = "x-guidance"
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As Python's `json.dumps` writes it, which is how `chat_format.render_answer` teaches it."""


def checked_schema(schema: JsonObject) -> dict[str, Any]:
    """`schema`, if an answer can be held to it. Raises InvalidArgument, which says what cannot."""
    if _GUIDANCE in schema:
        raise InvalidArgument(f"{_GUIDANCE!r} is not a keyword of JSON Schema", _FIELD)
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"the JSON Schema is not JSON: {error}", _FIELD) from error
    if problem := LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(text)):
        reason = problem.splitlines()[0].partition("failed to compile JSON schema: ")[2] or "too complex"
        raise InvalidArgument(f"answers cannot be held to this JSON Schema: {reason}", _FIELD)
    return dict(schema)


def check_answer(text: str, schema: JsonObject) -> None:
    """Raises EngineFailed if a whole answer does not fit the schema that it should have been held to."""
    # A registry of its own: what it does not hold is never fetched.
    validator = jsonschema.Draft202012Validator(schema, registry=referencing.Registry())
    try:
        fits = validator.is_valid(json.loads(text))
    except (ValueError, referencing.exceptions.Unresolvable):
        fits = False
    if not fits:
        raise EngineFailed(
            "the engine did not hold the answer to the JSON Schema; use simpler keywords (patterns from ^"
            " to $, no bounds on numbers, no patternProperties)"
        )


def laid_out(schema: JsonObject) -> dict[str, Any]:
    """The schema with the embedded engine's own keyword for how the JSON is laid out."""
    return {**schema, _GUIDANCE: _LAYOUT}
