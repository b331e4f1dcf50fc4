"""/healthz: this process runs. /readyz: it can take work. /metrics: what it counts."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from grpc_server.metrics import Metrics
from grpc_server.readiness import Readiness


def make_app(readiness: Readiness, metrics: Metrics) -> FastAPI:
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

    return app
