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
                await context.abort(code(error), str(error))
            except grpc.aio.AbortError:
                raise
            except NotImplementedError:
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not offered")
            except Exception:
                reference = uuid.uuid4().hex[:12]
                log.exception("unexpected error", extra={"method": method, "reference": reference})
                await context.abort(
                    grpc.StatusCode.INTERNAL, f"internal error; the server's log has it as {reference}"
                )

        return wrap(handler, around)
