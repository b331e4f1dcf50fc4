"""Which JSON Schemas an answer can be held to, and how it is laid out; the same for both engines.

llama.cpp does not say so when it cannot hold an answer to a schema: it logs the fact, or drops a keyword, and
goes on. So schemas are compiled here first, with the library (llguidance) that the embedded engine has
inside; and as Ollama's llama.cpp has another inside, which drops other keywords, its answers are checked at
their end. Both are done in a process of its own, as neither is sure to end: see `json_schema_child`.
"""

from __future__ import annotations

import json
from typing import Any, Protocol

from grpc_server.adapters.json_schema_process import SchemaProcess, TooComplexError
from grpc_server.domain.errors import EngineFailed, InvalidArgument
from grpc_server.domain.types import JsonObject

_FIELD = "response_format.json_schema"
_GUIDANCE = "x-guidance"
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As Python's `json.dumps` writes it, which is how `chat_format.render_answer` teaches it."""


class Judge(Protocol):
    """`SchemaProcess`, or what stands in for it."""

    async def ask(self, schema: str, answer: str | None = None) -> str:
        """What is wrong with a schema or an answer; empty if nothing. Raises TooComplexError."""

    async def close(self) -> None:
        """Stop what was started."""


class Schemas:
    """Checks callers' schemas, and answers by them."""

    def __init__(self, judge: Judge | None = None) -> None:
        self._judge = judge or SchemaProcess()

    async def checked(self, schema: JsonObject) -> dict[str, Any]:
        """`schema`, if an answer can be held to it. Raises InvalidArgument, which says what cannot."""
        if _GUIDANCE in schema:
            raise InvalidArgument(f"{_GUIDANCE!r} is not a keyword of JSON Schema", _FIELD)
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"the JSON Schema is not JSON: {error}", _FIELD) from error
        try:
            problem = await self._judge.ask(text)
        except TooComplexError:
            problem = "too complex"
        if problem:
            raise InvalidArgument(f"answers cannot be held to this JSON Schema: {problem}", _FIELD)
        return dict(schema)

    async def check_answer(self, text: str, schema: JsonObject) -> None:
        """Raises EngineFailed if a whole answer does not fit the schema that it should have been held to."""
        try:
            problem = await self._judge.ask(json.dumps(schema), text)
        except TooComplexError:
            problem = "too complex"
        if problem:
            raise EngineFailed(
                f"the engine did not hold the answer to the JSON Schema ({problem}); use simpler keywords"
                " (patterns from ^ to $, no bounds on numbers, no patternProperties)"
            )

    async def close(self) -> None:
        """Stop the process that checks, if one runs."""
        await self._judge.close()


def laid_out(schema: JsonObject) -> dict[str, Any]:
    """The schema with the embedded engine's own keyword for how the JSON is laid out."""
    return {**schema, _GUIDANCE: _LAYOUT}
