"""What this server says over HTTP.

| path                   | is                                                 | token            |
|------------------------|----------------------------------------------------|------------------|
| `/healthz`             | this process runs                                  | none             |
| `/readyz`              | it can take work                                   | none             |
| `/metrics`             | what it counts                                     | none             |
| `/v1/chat/completions` | OpenAI's chat completions                          | infer            |
| `/v1/chat/ws`          | the same over a WebSocket                          | infer            |
| `/v1/embeddings`       | a vector for each text                             | infer            |
| `/v1/models`           | aliases; with `models:read` versions too           | infer            |

A page of another origin may not read any of it: there is no CORS header.
"""

from __future__ import annotations

from dataclasses import asdict

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from opentelemetry.trace import Tracer
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from grpc_server.domain.errors import Exhausted
from grpc_server.domain.ports import Authenticator, Engine, Routes
from grpc_server.http.access import UNREAD_SECONDS
from grpc_server.http.chat_completions import ChatCompletions
from grpc_server.http.chat_socket import ChatSocket
from grpc_server.http.embeddings import EmbeddingsEndpoint
from grpc_server.http.models import Models, refused
from grpc_server.http.tracing import Traced
from grpc_server.inference import Inference
from grpc_server.metrics import Metrics
from grpc_server.readiness import Readiness
from grpc_server.tracing import silent

MAX_OPEN = 512
"""Requests and sockets of callers at once; the listener takes more, so that health and metrics have room."""


def make_app(
    readiness: Readiness,
    metrics: Metrics,
    *,
    inference: Inference,
    engine: Engine,
    routes: Routes,
    authenticator: Authenticator,
    tracer: Tracer | None = None,
    unread_seconds: float = UNREAD_SECONDS,
) -> FastAPI:
    """The app. Its own documentation pages are off: they would load scripts from elsewhere."""
    app = FastAPI(title="agent-loop", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        state = await readiness.state()
        return JSONResponse(asdict(state), status_code=200 if state.ready else 503)

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)

    models = Models(engine, routes, authenticator)
    completions = ChatCompletions(inference, authenticator, unread_seconds)
    routed: list[Route | WebSocketRoute] = [
        Route("/v1/chat/completions", completions, methods=["POST"]),
        Route("/v1/embeddings", EmbeddingsEndpoint(inference, authenticator), methods=["POST"]),
        WebSocketRoute("/v1/chat/ws", ChatSocket(inference, authenticator, unread_seconds)),
        Route("/v1/models", models.every),
        Route("/v1/models/{name:path}", models.one),
    ]
    app.router.routes += routed
    app.add_middleware(Bounded)
    app.add_middleware(Traced, tracer=tracer or silent(), routes={route.path for route in routed})
    return app


class Bounded:
    """Refuses callers beyond MAX_OPEN at once, before anything is read of them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if not scope.get("path", "").startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        if self._open >= MAX_OPEN:
            await _refuse(scope, receive, send)
            return
        self._open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    response = refused(Exhausted(f"{MAX_OPEN} callers are connected; try again later"))
    if scope["type"] == "websocket":
        await WebSocket(scope, receive, send).send_denial_response(response)
    else:
        await response(scope, receive, send)
