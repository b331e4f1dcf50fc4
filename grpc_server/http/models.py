"""GET /v1/models: the aliases that a caller may name, and for those who may read them the versions behind."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from grpc_server.domain.errors import AgentLoopError, NotFound
from grpc_server.domain.ports import Authenticator, Engine, Routes
from grpc_server.domain.types import Scope
from grpc_server.http.access import caller_of
from grpc_server.http.refusal import refusal


class Models:
    """The endpoints; both need the scope infer, or models:read."""

    def __init__(self, engine: Engine, routes: Routes, authenticator: Authenticator) -> None:
        self._engine = engine
        self._routes = routes
        self._authenticator = authenticator

    async def every(self, request: Request) -> Response:
        """Every model."""
        try:
            return JSONResponse({"object": "list", "data": await self._all(request)})
        except AgentLoopError as error:
            return refused(error)

    async def one(self, request: Request) -> Response:
        """One model."""
        name = request.path_params["name"]
        try:
            found = [model for model in await self._all(request) if model["id"] == name]
            if not found:
                raise NotFound(f"there is no model {name[:128]!a}; GET /v1/models lists them")
            return JSONResponse(found[0])
        except AgentLoopError as error:
            return refused(error)

    async def _all(self, request: Request) -> list[dict[str, Any]]:
        caller = await caller_of(request.headers, self._authenticator, Scope.INFER, Scope.MODELS_READ)
        named = caller.limits.aliases
        routes = [route for route in self._routes.all() if named is None or route.alias in named]
        models = [_model(route.alias) for route in routes]
        if caller.may(Scope.MODELS_READ):
            models += [_model(version.name) for version in await self._engine.list_models()]
        return models


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "agent-loop"}


def refused(error: BaseException) -> Response:
    """The response that tells of `error`."""
    told = refusal(error)
    return Response(told.body(), told.status, told.headers, "application/json")
