"""ModelService: which versions are installed, and where an alias leads."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc

from agentloop.v1 import model_pb2 as pb
from agentloop.v1 import model_pb2_grpc as rpc
from grpc_server.audit import Audit
from grpc_server.domain import rules
from grpc_server.domain.errors import InvalidArgument, NotFound, Precondition
from grpc_server.domain.ports import Engine, Routes
from grpc_server.domain.types import ModelVersion, Route, Target, TargetRole
from grpc_server.interceptors.auth import caller

_ROLES = {
    pb.TARGET_ROLE_STABLE: TargetRole.STABLE,
    pb.TARGET_ROLE_CANARY: TargetRole.CANARY,
    pb.TARGET_ROLE_SHADOW: TargetRole.SHADOW,
}
_ROLE_NUMBERS = {role: number for number, role in _ROLES.items()}


class ModelServicer(rpc.ModelServiceServicer):
    """Models through the engine, routes through the store; one change at a time."""

    def __init__(self, engine: Engine, routes: Routes, audit: Audit) -> None:
        self._engine = engine
        self._audit = audit
        self._routes = routes
        self._change = asyncio.Lock()  # a version must not go between a check of the route and its use

    async def ListModels(  # noqa: N802 - gRPC's name
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListModelsResponse:
        """The installed versions, by name."""
        del request, context
        return pb.ListModelsResponse(models=[_model(model) for model in await self._engine.list_models()])

    async def InstallModel(  # noqa: N802 - gRPC's name
        self, request: pb.InstallModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.InstallModelResponse:
        """Install a GGUF of this host and load it; the same again changes nothing."""
        del context
        rules.check_model_version(request.name, "name")
        rules.check_sha256(request.sha256)
        path = Path(request.path)
        if not path.is_absolute() or "\0" in request.path:
            raise InvalidArgument(
                f"path is {request.path[:200]!a}; it must be an absolute path on the server's host",
                "path",
            )
        detail = {"path": request.path, "sha256": request.sha256}
        async with self._change, self._audit.act("model_install", caller(), request.name, detail) as act:
            changed = await self._engine.install(request.name, path, request.sha256)
            act.detail["changed"] = changed
            await self._engine.load(request.name)
            return pb.InstallModelResponse(model=_model(await self._installed(request.name)), changed=changed)

    async def RemoveModel(  # noqa: N802 - gRPC's name
        self, request: pb.RemoveModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.RemoveModelResponse:
        """Remove a version that no route names."""
        del context
        rules.check_model_version(request.name, "name")
        async with self._change:
            for route in self._routes.all():
                if request.name in [target.model_version for target in route.targets]:
                    raise Precondition(f"route {route.alias} leads to {request.name}; set the route first")
            async with self._audit.act("model_remove", caller(), request.name, {}) as act:
                act.detail["changed"] = changed = await self._engine.remove(request.name)
            return pb.RemoveModelResponse(changed=changed)

    async def GetRoute(  # noqa: N802 - gRPC's name
        self, request: pb.GetRouteRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetRouteResponse:
        """The route in force on this server."""
        del context
        alias = request.alias or "default"
        rules.check_alias(alias)
        return pb.GetRouteResponse(route=_route_proto(self._routes.get(alias)))

    async def SetRoute(  # noqa: N802 - gRPC's name
        self, request: pb.SetRouteRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.SetRouteResponse:
        """Replace a route whose revision is still the one given."""
        del context
        route = _route(request.route)
        rules.check_route(route)
        async with self._change:
            installed = {model.name for model in await self._engine.list_models()}
            for target in route.targets:
                if target.model_version not in installed:
                    raise Precondition(f"{target.model_version} is not installed; install it first")
            return pb.SetRouteResponse(route=_route_proto(await self._routes.set(route, caller().name)))

    async def _installed(self, name: str) -> ModelVersion:
        for model in await self._engine.list_models():
            if model.name == name:
                return model
        raise NotFound(f"no model version {name} is installed")


def _model(model: ModelVersion) -> pb.ModelVersion:
    return pb.ModelVersion(
        name=model.name, sha256=model.sha256, size_bytes=model.size_bytes, loaded=model.loaded
    )


def _route(route: pb.Route) -> Route:
    for index, target in enumerate(route.targets):
        if target.role not in _ROLES:
            raise InvalidArgument(
                f"route.targets[{index}].role is {target.role}; it must be one of TARGET_ROLE_STABLE,"
                " TARGET_ROLE_CANARY, TARGET_ROLE_SHADOW",
                f"route.targets[{index}].role",
            )
    return Route(
        route.alias or "default",
        route.revision,
        tuple(Target(target.model_version, _ROLES[target.role], target.weight) for target in route.targets),
    )


def _route_proto(route: Route) -> pb.Route:
    return pb.Route(
        alias=route.alias,
        revision=route.revision,
        targets=[
            pb.Target(
                model_version=target.model_version, role=_ROLE_NUMBERS[target.role], weight=target.weight
            )
            for target in route.targets
        ],
    )
