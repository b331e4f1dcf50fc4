"""Errors to gRPC's status codes. The text of an error that nobody expected stays here, in the log."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from grpc_server.domain import errors
from grpc_server.interceptors.wrap import Call, Interceptor, wrap

log = logging.getLogger(__name__)

MAX_DETAILS_BYTES = 1000
"""Of a status' text, in UTF-8. It may quote the caller, and travels in a header: each byte that is not plain
ASCII takes three there, and callers refuse headers beyond 8 KiB (gRPC's default), status and all."""

CODES: dict[type[errors.AgentLoopError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.Precondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Conflict: grpc.StatusCode.ABORTED,
    errors.Exhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.EngineFailed: grpc.StatusCode.INTERNAL,
}


def code(error: errors.AgentLoopError) -> grpc.StatusCode:
    """The status of `error`: its own, or that of the nearest class above it."""
    return next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), grpc.StatusCode.INTERNAL)


def clipped(text: str) -> str:
    """`text` within MAX_DETAILS_BYTES, an ellipsis for what is left out."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= MAX_DETAILS_BYTES:
        return encoded.decode()
    return encoded[: MAX_DETAILS_BYTES - len("…".encode())].decode(errors="ignore") + "…"


class ErrorInterceptor(Interceptor):
    """Ends a call whose method raised; the outermost interceptor."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """The method's handler, inside one that translates."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method

        async def around(context: grpc.aio.ServicerContext[Any, Any], call: Call) -> Any:
            try:
                return await call()
            except errors.AgentLoopError as error:
                await context.abort(code(error), clipped(str(error)))
            except grpc.aio.AbortError:
                raise
            except NotImplementedError:
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, clipped(f"{method} is not offered"))
            except Exception:
                reference = uuid.uuid4().hex[:12]
                log.exception("unexpected error", extra={"method": method, "reference": reference})
                await context.abort(
                    grpc.StatusCode.INTERNAL, f"internal error; the server's log has it as {reference}"
                )

        return wrap(handler, around)
