"""Errors to gRPC's status codes. The text of an error that nobody expected stays here, in the log."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from grpc_server.cancellation import asked_for
from grpc_server.domain import errors
from grpc_server.interceptors import status
from grpc_server.interceptors.wrap import Call, Interceptor, wrap

log = logging.getLogger(__name__)


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
                await context.abort(*status.of_error(error))
            except grpc.aio.AbortError:
                raise
            except NotImplementedError:
                await context.abort(
                    *status.made(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not offered", "UNIMPLEMENTED")
                )
            except asyncio.CancelledError as error:
                if asked_for(error):
                    raise
                await context.abort(*_unexpected(method))
            except Exception:
                await context.abort(*_unexpected(method))

        return wrap(handler, around)


def _unexpected(method: str) -> tuple[grpc.StatusCode, str, status.Trailers]:
    """What the caller of a method is told of the error that is being handled, which the log has whole."""
    reference = uuid.uuid4().hex[:12]
    log.exception("unexpected error", extra={"method": method, "reference": reference})
    text = f"internal error; the server's log has it as {reference}"
    return status.made(grpc.StatusCode.INTERNAL, text, "INTERNAL")
