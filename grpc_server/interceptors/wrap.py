"""Put something around a method's handler, whatever its arity."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from grpc_server.domain.errors import InvalidArgument

if TYPE_CHECKING:
    Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:  # generic only to the type checker
    Interceptor = grpc.aio.ServerInterceptor

Call = Callable[[], Awaitable[Any]]
"""Runs the method; a streaming one writes its responses and gives None."""
Around = Callable[[grpc.aio.ServicerContext[Any, Any], Call], Awaitable[Any]]
"""Runs inside the method's handler: it may refuse before `call`, and see what `call` raises."""


def wrap(handler: grpc.RpcMethodHandler[Any, Any], around: Around) -> grpc.RpcMethodHandler[Any, Any]:
    """`handler` with `around` around it, of the same arity.

    Requests are parsed inside: nobody without a token has bytes parsed, and bytes that are no message are an
    InvalidArgument like any other.
    """
    kinds: dict[tuple[bool, bool], tuple[Any, Any]] = {
        (False, False): (handler.unary_unary, grpc.unary_unary_rpc_method_handler),
        (False, True): (handler.unary_stream, grpc.unary_stream_rpc_method_handler),
        (True, False): (handler.stream_unary, grpc.stream_unary_rpc_method_handler),
        (True, True): (handler.stream_stream, grpc.stream_stream_rpc_method_handler),
    }
    method, make = kinds[bool(handler.request_streaming), bool(handler.response_streaming)]

    async def run(request: Any, context: Any) -> Any:
        if handler.request_streaming:
            result = method(_parse_each(handler, request), context)
        else:
            result = method(_parse(handler, request), context)
        if not inspect.isasyncgen(result):
            return await result
        async with aclosing(result) as responses:
            async for response in responses:
                await context.write(response)
        return None

    async def behaviour(request: Any, context: Any) -> Any:
        return await around(context, lambda: run(request, context))

    wrapped: grpc.RpcMethodHandler[Any, Any] = make(behaviour, None, handler.response_serializer)
    return wrapped


def _parse(handler: grpc.RpcMethodHandler[Any, Any], request: Any) -> Any:
    if handler.request_deserializer is None:
        return request
    try:
        return handler.request_deserializer(request)
    except DecodeError as error:
        raise InvalidArgument("the request's bytes are not the message of this method") from error


async def _parse_each(
    handler: grpc.RpcMethodHandler[Any, Any], requests: AsyncIterator[Any]
) -> AsyncIterator[Any]:
    async for request in requests:
        yield _parse(handler, request)
