"""POST /v1/embeddings: a vector for each text, through the pipeline."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from grpc_server.domain import rules, types
from grpc_server.domain.errors import InvalidArgument
from grpc_server.domain.ports import Authenticator
from grpc_server.domain.types import EmbedRequest, JsonObject
from grpc_server.http.access import caller_of, deadline_of, read_body, understood, unless_gone
from grpc_server.http.completion_request import model, refuse_left
from grpc_server.http.fields import Fields, kind
from grpc_server.http.models import refused
from grpc_server.inference import Inference
from grpc_server.priority import priority_of


@dataclass(frozen=True, slots=True)
class Asked:
    """What a caller wants, and in which form."""

    request: EmbedRequest
    base64: bool


class EmbeddingsEndpoint:
    """The ASGI endpoint."""

    def __init__(self, inference: Inference, authenticator: Authenticator) -> None:
        self._inference = inference
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; a caller who goes away meanwhile cancels it."""
        request = Request(scope, receive)
        try:
            response = await self._response(request, receive)
        except ClientDisconnect:
            return
        except Exception as error:
            response = refused(error)
        if response is not None:
            await response(scope, receive, send)

    async def _response(self, request: Request, receive: Receive) -> Response | None:
        caller = await caller_of(request.headers, self._authenticator, types.Scope.INFER)
        seconds, priority = deadline_of(request.headers), priority_of(request.headers.items())
        asked = await understood("the body", await read_body(request), embeddings_request)
        body = b""

        async def embed() -> None:
            nonlocal body
            made, version = await self._inference.embed(
                caller, asked.request, seconds=seconds, priority=priority
            )
            # In a thread: a hundred vectors as text take long enough for streams to notice.
            body = await asyncio.to_thread(_body, asked, made, version)

        if not await unless_gone(receive, embed()):
            return None
        return Response(body, media_type="application/json")


def embeddings_request(body: JsonObject) -> Asked:
    """The request, its ranges unchecked (see `rules.check_embed`). Raises InvalidArgument."""
    fields = Fields(body)
    alias, model_version = model(fields)
    form = fields.text("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise InvalidArgument(
            f"encoding_format is {form[:60]!a}; it must be float or base64", "encoding_format"
        )
    texts = fields.need("input", str, list)
    texts = (texts,) if isinstance(texts, str) else _texts(texts)
    fields.drop("user")
    refuse_left(fields)
    return Asked(EmbedRequest(texts, alias, model_version), form == "base64")


def _texts(values: Sequence[Any]) -> tuple[str, ...]:
    if len(values) > rules.MAX_EMBED_TEXTS:
        raise InvalidArgument(
            f"input has {len(values)} texts; at most {rules.MAX_EMBED_TEXTS} are taken", "input"
        )
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise InvalidArgument(
                f"input[{index}] is {kind(value)}; it must be text (token ids are another model's)",
                f"input[{index}]",
            )
    return tuple(values)


def _body(asked: Asked, made: types.Embeddings, version: str) -> bytes:
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector) if asked.base64 else vector}
        for index, vector in enumerate(made.vectors)
    ]
    usage = {"prompt_tokens": made.input_tokens, "total_tokens": made.input_tokens}
    return json.dumps({"object": "list", "data": data, "model": version, "usage": usage}).encode()


def _encoded(vector: Sequence[float]) -> str:
    """The vector as little-endian floats of 32 bits, in base64."""
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()
