"""POST /v1/chat/completions: one answer, whole or as server-sent events, through the pipeline."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from grpc_server.domain import types
from grpc_server.domain.ports import Authenticator
from grpc_server.domain.types import ChatEvent
from grpc_server.http.access import (
    UNREAD_SECONDS,
    caller_of,
    deadline_of,
    read_body,
    taken,
    understood,
    unless_gone,
)
from grpc_server.http.completion_answer import CompletionAnswer
from grpc_server.http.completion_request import Asked, completion_request
from grpc_server.http.refusal import Refusal, refusal
from grpc_server.inference import Inference
from grpc_server.priority import priority_of

ID_HEADER = "x-request-id"
"""Holds the inference's id, where OpenAI's clients look for an id; it is in the body too."""
FAREWELL_SECONDS = 5.0
"""What a caller that reads slowly gets to take the last words on why its answer ends."""

_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # a proxy must not hold pieces back
}


class ChatCompletions:
    """The ASGI endpoint."""

    def __init__(
        self, inference: Inference, authenticator: Authenticator, unread_seconds: float = UNREAD_SECONDS
    ) -> None:
        self._inference = inference
        self._authenticator = authenticator
        self._unread_seconds = unread_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; a caller who goes away meanwhile cancels it."""
        request = Request(scope, receive)
        out = _Out(send, self._unread_seconds)
        try:
            caller = await caller_of(request.headers, self._authenticator, types.Scope.INFER)
            seconds = deadline_of(request.headers)
            asked = await understood("the body", await read_body(request), completion_request)
            out.asked(asked)
            priority = priority_of(request.headers.items())
            chat = self._inference.chat(caller, asked.request, out.emit, seconds=seconds, priority=priority)
            if await unless_gone(receive, chat):
                await out.end()
        except ClientDisconnect:
            return
        except Exception as error:
            await out.fail(refusal(error))


class _Out:
    """Writes the response: its head when the first event comes, as until then it may still be an error."""

    def __init__(self, send: Send, unread_seconds: float) -> None:
        self._send = send
        self._unread_seconds = unread_seconds
        self._answer = CompletionAnswer()
        self._stream = False
        self._begun = False

    def asked(self, asked: Asked) -> None:
        """Whether to stream."""
        self._stream = asked.stream
        self._answer = CompletionAnswer(include_usage=asked.include_usage)

    async def emit(self, event: ChatEvent) -> None:
        """Take one event, and if it is a stream send it; waits for a slow reader, but not for ever."""
        chunks = self._answer.take(event)
        if self._stream:
            await taken(self._chunks(chunks), self._unread_seconds)

    async def _chunks(self, chunks: Sequence[Any]) -> None:
        if not self._begun:
            await self._head(200, _STREAM_HEADERS)
        await self._body(b"".join(_event(chunk) for chunk in chunks), more=True)

    async def end(self) -> None:
        """Send what is left: the last mark of the stream, or the whole answer."""
        if self._stream:
            await self._body(b"data: [DONE]\n\n")
        else:
            await self._whole(200, _json(self._answer.whole()))

    async def fail(self, told: Refusal) -> None:
        """Say what went wrong, in the stream if it has begun; a reader that is stuck is not waited for."""
        try:
            async with asyncio.timeout(FAREWELL_SECONDS):
                if self._begun:
                    await self._body(_event({"error": {**told.error, "status": told.status}}))
                else:
                    await self._whole(told.status, told.body(), told.headers)
        except TimeoutError:
            return

    async def _whole(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        length = {"content-type": "application/json", "content-length": str(len(body))}
        await self._head(status, {**length, **(headers or {})})
        await self._body(body)

    async def _head(self, status: int, headers: dict[str, str]) -> None:
        self._begun = True
        if self._answer.started is not None:
            headers = {**headers, ID_HEADER: str(self._answer.started.inference_id)}
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def _body(self, body: bytes, *, more: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


def _event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + _json(value) + b"\n\n"


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(errors="replace")
