"""/v1/chat/ws: one request of OpenAI's form over a WebSocket, then the events of its answer.

A caller that can set headers authenticates as everywhere. A browser cannot: its first message is
`{"authorization": "Bearer al_…"}`, with `deadline_seconds` if it wants to. The next one is the request. Then:

    {"type": "started", "inference_id": "…", "model_version": "…"}
    {"type": "text_delta", "text": "…"}                                any number
    {"type": "tool_call", "name": "…", "arguments": {…}}               any number
    {"type": "completed", "finish_reason": "…", "usage": {…}, "timings": {…}}   or
    {"type": "error", "error": {…, "status": 429}}                     as over HTTP

and the server closes: with 1000 after `completed`; after an error with 1008 (the caller's), 1013 (try again
later) or 1011. Closing earlier cancels. What a caller sends after its request is not read.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from grpc_server.cancellation import CallerGone
from grpc_server.domain import types
from grpc_server.domain.errors import DeadlineExceeded, InvalidArgument
from grpc_server.domain.plain import plain
from grpc_server.domain.ports import Authenticator
from grpc_server.domain.types import Caller, ChatEvent, Completed, JsonObject, Started, TextDelta, ToolCall
from grpc_server.http.access import (
    UNREAD_SECONDS,
    admitted,
    caller_of,
    checked_deadline,
    deadline_of,
    taken,
    understood,
    unless_gone,
)
from grpc_server.http.completion_request import completion_request, refuse_left
from grpc_server.http.fields import Fields
from grpc_server.http.models import refused
from grpc_server.http.refusal import refusal
from grpc_server.inference import Inference
from grpc_server.priority import priority_of

MESSAGE_SECONDS = 10.0
"""What the opening message, and then the request, get to arrive."""
FAREWELL_SECONDS = 5.0
"""What a caller that reads slowly gets to take the last words."""

Made = TypeVar("Made")


class ChatSocket:
    """The ASGI endpoint."""

    def __init__(
        self, inference: Inference, authenticator: Authenticator, unread_seconds: float = UNREAD_SECONDS
    ) -> None:
        self._inference = inference
        self._authenticator = authenticator
        self._unread_seconds = unread_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; a caller who goes away meanwhile cancels it."""
        socket = WebSocket(scope, receive, send)
        try:
            if "authorization" in socket.headers:
                try:
                    caller = await caller_of(socket.headers, self._authenticator, types.Scope.INFER)
                    seconds = deadline_of(socket.headers)
                except Exception as error:
                    await socket.send_denial_response(refused(error))
                    return
                await socket.accept()
                await self._answered(socket, caller, seconds)
            else:
                await socket.accept()
                await self._opened(socket)
        except WebSocketDisconnect:
            return

    async def _opened(self, socket: WebSocket) -> None:
        """Ask a caller without a header who it is."""
        try:
            opening = await _message(socket, "the opening message", _opening)
            caller = await admitted([opening[0]], self._authenticator, types.Scope.INFER)
        except WebSocketDisconnect:
            raise
        except Exception as error:
            await _fail(socket, error)
            return
        await self._answered(socket, caller, opening[1])

    async def _answered(self, socket: WebSocket, caller: Caller, seconds: float | None) -> None:
        async def emit(event: ChatEvent) -> None:
            try:
                text = json.dumps(event_json(event), ensure_ascii=False)
                await taken(socket.send_text(text), self._unread_seconds)
            except WebSocketDisconnect as error:  # the caller has gone, and we are not yet cancelled
                raise CallerGone from error

        try:
            asked = await _message(socket, "the request", completion_request)
            priority = priority_of(socket.headers.items())
            chat = self._inference.chat(caller, asked.request, emit, seconds=seconds, priority=priority)
            if await unless_gone(socket.receive, chat):
                await socket.close(1000)
        except WebSocketDisconnect:
            raise
        except Exception as error:
            await _fail(socket, error)


def event_json(event: ChatEvent) -> dict[str, Any]:
    """The event as callers read it."""
    match event:
        case Started():
            return {
                "type": "started",
                "inference_id": str(event.inference_id),
                "model_version": event.model_version,
            }
        case TextDelta():
            return {"type": "text_delta", "text": event.text}
        case ToolCall():
            return {"type": "tool_call", "name": event.name, "arguments": plain(event.arguments)}
        case Completed():
            return {
                "type": "completed",
                "finish_reason": event.finish_reason.value,
                "usage": asdict(event.usage),
                "timings": asdict(event.timings),
            }


async def _message(socket: WebSocket, what: str, make: Callable[[JsonObject], Made]) -> Made:
    """What `make` makes of the next message.

    Raises:
        InvalidArgument, DeadlineExceeded: if it is not what it must be, or does not come.
        WebSocketDisconnect: if the caller goes away instead.
    """
    try:
        async with asyncio.timeout(MESSAGE_SECONDS):
            message = await socket.receive()
    except TimeoutError as error:
        raise DeadlineExceeded(f"{what} did not arrive within {MESSAGE_SECONDS:g} s") from error
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1005))
    text = message.get("text")
    if text is None:
        raise InvalidArgument(f"{what} is binary; send text")
    return await understood(what, text, make)


def _opening(body: JsonObject) -> tuple[str, float | None]:
    """The value of the header that a browser cannot send, and its deadline."""
    fields = Fields(body)
    authorization, seconds = fields.text("authorization"), fields.take("deadline_seconds", float)
    refuse_left(fields)
    return authorization, None if seconds is None else checked_deadline("deadline_seconds", seconds)


async def _fail(socket: WebSocket, error: Exception) -> None:
    """Say what went wrong, and close; a reader that is stuck is not waited for."""
    told = refusal(error)
    code = {429: 1013, 503: 1013}.get(told.status, 1008 if told.status < 500 else 1011)
    try:
        async with asyncio.timeout(FAREWELL_SECONDS):
            event = {"type": "error", "error": {**told.error, "status": told.status}}
            await socket.send_text(json.dumps(event, ensure_ascii=False))
            await socket.close(code)
    except TimeoutError:
        return
