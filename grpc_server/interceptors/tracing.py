"""A span for each call over gRPC, in the trace that the caller names."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from opentelemetry.trace import SpanKind, StatusCode, Tracer

from grpc_server.interceptors.auth import OPEN
from grpc_server.interceptors.wrap import Call, Interceptor, wrap
from grpc_server.tracing import KEY, context_of, records

_OURS = frozenset(
    code.value[0]
    for code in (
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    )
)
"""Statuses that are the server's failure, by OpenTelemetry's conventions for gRPC (docs/rpc/grpc.md)."""


class TraceInterceptor(Interceptor):
    """The outermost interceptor: it sees which status the others made of an error."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """The method's handler, inside a span; health checks have none.

        Where nothing is recorded, only a caller's own trace is of interest: log lines name it.
        """
        handler = await continuation(handler_call_details)
        method, metadata = handler_call_details.method, handler_call_details.invocation_metadata
        if handler is None or method in OPEN:
            return handler
        if not records(self._tracer) and all(key != KEY for key, _ in metadata or ()):
            return handler
        parent = context_of(metadata)
        service, _, name = method.removeprefix("/").partition("/")

        async def around(context: grpc.aio.ServicerContext[Any, Any], call: Call) -> Any:
            with self._tracer.start_as_current_span(
                f"{service}/{name}",
                context=parent,
                kind=SpanKind.SERVER,
                attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
                record_exception=False,
                set_status_on_exception=False,
            ) as span:
                try:
                    return await call()
                finally:
                    code = _number(context.code())
                    span.set_attribute("rpc.grpc.status_code", code)
                    if code in _OURS:
                        span.set_status(StatusCode.ERROR)

        return wrap(handler, around)


def _number(code: Any) -> int:
    """Of a status; gRPC has 0 until one is set, and then what it was set to."""
    return int(code.value[0]) if isinstance(code, grpc.StatusCode) else int(code or 0)
