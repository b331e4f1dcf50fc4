"""What the errors of httpx, on aiohttp, mean in our words; both engines are asked through it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import httpx
from aiohttp.http_exceptions import HttpProcessingError

from grpc_server.domain.errors import AgentLoopError, EngineFailed, EngineUnavailable

ERRORS: dict[type[Exception], type[AgentLoopError]] = {
    httpx.TransportError: EngineUnavailable,  # refused, reset, timed out, cut off
    httpx.HTTPError: EngineFailed,  # undecodable, or a circle of redirects
    httpx.InvalidURL: EngineFailed,
    httpx.CookieConflict: EngineFailed,
    httpx.StreamError: EngineFailed,
    # What httpx_aiohttp does not translate: an answer that is no HTTP.
    aiohttp.ClientError: EngineFailed,
    HttpProcessingError: EngineFailed,
}
"""For an error that is not named itself, the nearest of its base classes counts."""


def kind_of(error: Exception) -> type[AgentLoopError]:
    """The kind of error of ours that `error` of httpx is."""
    return next(ERRORS[kind] for kind in type(error).__mro__ if kind in ERRORS)


@contextlib.asynccontextmanager
async def translated(describe: Callable[[Exception], Awaitable[str]]) -> AsyncIterator[None]:
    """Raise every error of httpx or aiohttp as one of ours, with the text that `describe` gives it."""
    try:
        yield
    except tuple(ERRORS) as error:
        raise kind_of(error)(await describe(error)) from error
