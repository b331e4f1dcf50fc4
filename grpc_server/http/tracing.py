"""A span for each call over HTTP, in the trace that the caller names."""

from __future__ import annotations

from collections.abc import Collection

from opentelemetry.trace import SpanKind, StatusCode, Tracer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from grpc_server.tracing import context_of

_OTHER = "/v1/{path}"
"""What else callers write into a path is theirs, and stays out of a span's name."""


class Traced:
    """The outermost middleware; health, readiness and metrics have no spans.

    `routes` are the paths that are ours, and may stand in a span's name.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer, routes: Collection[str]) -> None:
        self._app = app
        self._tracer = tracer
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer inside a span."""
        path = scope.get("path", "")
        if not path.startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        route = path if path in self._routes else _OTHER
        method = scope.get("method", "GET")  # a WebSocket is opened with GET
        known = method if method in ("GET", "POST") else "_OTHER"
        with self._tracer.start_as_current_span(
            f"{known} {route}",
            context=context_of(Headers(scope=scope).items()),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": known, "http.route": route},
            record_exception=False,
            set_status_on_exception=False,
        ) as span:

            async def watched(message: Message) -> None:
                if message["type"] in ("http.response.start", "websocket.http.response.start"):
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(StatusCode.ERROR)
                await send(message)

            await self._app(scope, receive, watched)
