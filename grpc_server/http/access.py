"""Who calls over HTTP, within which deadline, and how much of a body is read for them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.requests import Request

from grpc_server.bearer import KEY, token_in
from grpc_server.cancellation import CallerGone
from grpc_server.domain.errors import InvalidArgument, PermissionDenied, Unauthenticated
from grpc_server.domain.ports import Authenticator
from grpc_server.domain.types import Caller, JsonObject, Scope
from grpc_server.http.refusal import BodyTooLarge, BodyTooSlow
from grpc_server.json_text import json_object

MAX_BODY_BYTES = 4 * 1024 * 1024
"""As gRPC's messages: above the API's 1 MiB of text, so that what is too large is refused with a sentence."""
BODY_SECONDS = 30.0
"""What a body gets to arrive."""
LARGE_BYTES = 8192
"""A body from here on is read in a thread, as that may take long enough for other streams to notice."""
UNREAD_SECONDS = 30.0
"""How long a caller may leave a piece of its answer unread, where the settings say nothing else."""
DEADLINE_HEADER = "x-deadline-seconds"
MAX_DEADLINE_SECONDS = 86400.0

Made = TypeVar("Made")
Receive = Callable[[], Awaitable[Mapping[str, Any]]]


async def caller_of(headers: Headers, authenticator: Authenticator, scope: Scope, *others: Scope) -> Caller:
    """Whose token `authorization: Bearer …` holds, if it allows `scope`, or one of the others.

    Raises:
        Unauthenticated: without exactly one such header, or if its token is not valid.
        PermissionDenied: if the token allows none of them.
    """
    return await admitted(headers.getlist(KEY), authenticator, scope, *others)


async def admitted(
    values: Sequence[str], authenticator: Authenticator, scope: Scope, *others: Scope
) -> Caller:
    """Whose token the one of `values`, `Bearer al_…`, holds; raises as `caller_of`."""
    token = token_in(values)
    if not token:
        raise Unauthenticated
    who = await authenticator.authenticate(token)
    if not any(who.may(each) for each in (scope, *others)):
        raise PermissionDenied(f"this call needs the scope {scope}")
    return who


def deadline_of(headers: Headers) -> float | None:
    """The seconds that the caller gives the answer; None if it does not say. Raises InvalidArgument."""
    value = headers.get(DEADLINE_HEADER)
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    return checked_deadline(DEADLINE_HEADER, seconds)


def checked_deadline(field: str, seconds: float) -> float:
    """`seconds`, if a deadline can be that far away. Raises InvalidArgument."""
    if not 0 < seconds <= MAX_DEADLINE_SECONDS:
        raise InvalidArgument(
            f"{field} is {seconds:g}; it must be seconds above 0, to {MAX_DEADLINE_SECONDS:g}", field
        )
    return seconds


async def read_body(request: Request) -> bytes:
    """The body.

    Raises:
        BodyTooLarge, BodyTooSlow: if it is.
        ClientDisconnect: if the caller goes away meanwhile.
    """
    told = request.headers.get("content-length", "")
    if told.isascii() and told.isdigit() and int(told[:20]) > MAX_BODY_BYTES:
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large()
    except TimeoutError as error:
        raise BodyTooSlow(f"the body did not arrive within {BODY_SECONDS:g} s") from error
    return bytes(body)


async def understood(what: str, text: bytes | str, make: Callable[[JsonObject], Made]) -> Made:
    """What `make` makes of the JSON object that `text` is. Raises InvalidArgument."""
    if len(text) < LARGE_BYTES:
        return make(_parse(what, text))
    return await asyncio.to_thread(lambda: make(_parse(what, text)))


def _parse(what: str, text: bytes | str) -> JsonObject:
    try:
        decoded = text if isinstance(text, str) else text.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{what} is not UTF-8") from error
    try:
        return json_object(what, decoded)
    except InvalidArgument as error:
        raise InvalidArgument(str(error)) from error  # it is no field


def _too_large() -> BodyTooLarge:
    return BodyTooLarge(f"the body has more than {MAX_BODY_BYTES} bytes; send less text")


async def taken(send: Awaitable[None], seconds: float) -> None:
    """Await a `send`. Raises CallerGone if the caller takes nothing for so long."""
    try:
        async with asyncio.timeout(seconds):
            await send
    except TimeoutError as error:
        raise CallerGone from error


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Run `work`, and cancel it when the caller goes away before its end. Whether it came to its end.

    What `work` raises by itself is raised.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watch.cancel()
        task.cancel()  # which a task that has ended does not notice
        await asyncio.wait({task, watch})
    if task.cancelled():
        return False
    task.result()
    return True


async def _gone(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] in ("http.disconnect", "websocket.disconnect"):
            return
