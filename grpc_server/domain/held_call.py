"""A tool call that has begun is held to its tools' schema.

Where a model may call or speak (`tool_choice` auto) nothing can be held before it has chosen. Once its answer
begins as a call does, and as nothing else is likely to, the engine is asked again, held to the schema as with
`tool_choice` required: it has the prompt in its cache, and from there every parameter is one of the
function's, of its type, and none that it needs is left out. What that gains: docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

from grpc_server.domain.errors import InvalidArgument
from grpc_server.domain.ports import Finished, Generation, Piece

CALL = '{"name": "'
"""How `chat_format.render_answer` begins every call, and so how a model that learned it does."""

Events = AsyncGenerator[Piece | Finished, None]


class Generates(Protocol):
    """What is needed of an engine."""

    def generate(self, generation: Generation) -> Events:
        """See `ports.Engine.generate`."""


async def held(engine: Generates, generation: Generation) -> Events:
    """The engine's answer; one that begins with CALL is held to `generation.call_schema`.

    What was generated before that was seen is dropped, and is in no usage: a few tokens. A schema that no
    answer can be held to holds nothing: the answer is then what it would have been.
    """
    plainly = replace(generation, call_schema=None)
    begun: list[Piece] = []
    async with aclosing(engine.generate(plainly)) as events:
        async for event in events:
            if isinstance(event, Piece):
                begun.append(event)
                said = "".join(piece.text for piece in begun).lstrip()
                if said.startswith(CALL):
                    break
                if CALL.startswith(said):
                    continue
            for piece in begun:
                yield piece
            if isinstance(event, Finished):
                yield event
            async for later in events:
                yield later
            return
        else:
            return  # without a last word, which whoever asked will miss
    try:
        async with aclosing(engine.generate(replace(plainly, json_schema=generation.call_schema))) as events:
            async for event in events:
                yield event
    except InvalidArgument:  # raised before anything is generated
        async with aclosing(engine.generate(plainly)) as events:
            async for event in events:
                yield event
