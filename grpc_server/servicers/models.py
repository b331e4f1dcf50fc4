"""ModelService: which versions are installed, and where an alias leads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import grpc

from agentloop.v1 import model_pb2 as pb
from agentloop.v1 import model_pb2_grpc as rpc
from grpc_server.audit import Audit
from grpc_server.background import in_background
from grpc_server.domain import rules
from grpc_server.domain.errors import InvalidArgument, ModelsFull, NotFound, Precondition
from grpc_server.domain.ports import Engine, Routes
from grpc_server.domain.types import (
    InstallPhase,
    InstallProgress,
    ModelVersion,
    Route,
    Target,
    TargetRole,
)
from grpc_server.interceptors.auth import caller

PATH_MAX_BYTES = 4096
"""Linux' PATH_MAX, the NUL at the end included."""

TARGET_ROLES = {
    TargetRole.STABLE: pb.TARGET_ROLE_STABLE,
    TargetRole.CANARY: pb.TARGET_ROLE_CANARY,
    TargetRole.SHADOW: pb.TARGET_ROLE_SHADOW,
}
_ROLE_OF = {number: role for role, number in TARGET_ROLES.items()}
_PHASES = {
    InstallPhase.WAITING: pb.INSTALL_PHASE_WAITING,
    InstallPhase.CHECKING: pb.INSTALL_PHASE_CHECKING,
    InstallPhase.COPYING: pb.INSTALL_PHASE_COPYING,
    InstallPhase.LOADING: pb.INSTALL_PHASE_LOADING,
}

PROGRESS_SECONDS = 0.5
"""How often an installation tells how far it is."""

Context = grpc.aio.ServicerContext[Any, Any]


class ModelServicer(rpc.ModelServiceServicer):
    """Models through the engine, routes through the store; one change at a time.

    All versions together may take `max_bytes`; 0: as many as there are. `refuse_loading` raises HandedOver
    while the GPU is lent.
    """

    def __init__(
        self,
        engine: Engine,
        routes: Routes,
        audit: Audit,
        *,
        max_bytes: int = 0,
        refuse_loading: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._refuse_loading = refuse_loading
        self._audit = audit
        self._max_bytes = max_bytes
        self._routes = routes
        self._change = asyncio.Lock()  # a version must not go between a check of the route and its use

    async def ListModels(  # noqa: N802 - gRPC's name
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """The installed versions, by name."""
        del request, context
        return pb.ListModelsResponse(models=[_model(model) for model in await self._engine.list_models()])

    async def GetModel(  # noqa: N802 - gRPC's name
        self, request: pb.GetModelRequest, context: Context
    ) -> pb.GetModelResponse:
        """One version, and what its file says."""
        del context
        rules.check_model_version(request.name, "name")
        model, details = await self._installed(request.name), await self._engine.show(request.name)
        cycle_id, base = rules.lineage(request.name)
        return pb.GetModelResponse(
            model=_model(model),
            details=pb.ModelDetails(
                architecture=details.architecture,
                parameters=details.parameters,
                quantization=details.quantization,
                context_tokens=details.context_tokens,
            ),
            cycle_id=cycle_id,
            base=base,
            aliases=self._aliases(request.name),
        )

    async def InstallModel(  # noqa: N802 - gRPC's name
        self, request: pb.InstallModelRequest, context: Context
    ) -> pb.InstallModelResponse:
        """Install a GGUF of this host and load it; the same again changes nothing."""
        del context
        return await self._install(request, InstallProgress())

    async def InstallModelStream(  # noqa: N802 - gRPC's name
        self, request: pb.InstallModelStreamRequest, context: Context
    ) -> AsyncGenerator[pb.InstallModelStreamResponse, None]:
        """The same, telling how far it is."""
        del context
        progress = InstallProgress()
        async with in_background(self._install(request.install, progress), "install") as task:
            while not (await asyncio.wait({task}, timeout=PROGRESS_SECONDS))[0]:
                yield pb.InstallModelStreamResponse(progress=_progress(progress))
            yield pb.InstallModelStreamResponse(installed=await task)

    async def LoadModel(  # noqa: N802 - gRPC's name
        self, request: pb.LoadModelRequest, context: Context
    ) -> pb.LoadModelResponse:
        """Bring a version into memory."""
        del context
        rules.check_model_version(request.name, "name")
        self._refuse_loading()
        async with self._change:
            before = await self._installed(request.name)
            detail = {"changed": not before.loaded}
            async with self._audit.act("model_load", caller(), request.name, detail):
                await self._engine.load(request.name)
            after = await self._installed(request.name)
        return pb.LoadModelResponse(model=_model(after), changed=not before.loaded)

    async def UnloadModel(  # noqa: N802 - gRPC's name
        self, request: pb.UnloadModelRequest, context: Context
    ) -> pb.UnloadModelResponse:
        """Free the memory of a version that no route needs."""
        del context
        rules.check_model_version(request.name, "name")
        async with self._change:
            before = await self._installed(request.name)
            if (aliases := self._aliases(request.name)) and not request.force:
                raise Precondition(
                    f"route {aliases[0]} leads to {request.name}; set the route first, or force it"
                )
            detail = {"force": request.force, "changed": before.loaded}
            async with self._audit.act("model_unload", caller(), request.name, detail):
                await self._engine.unload(request.name)
            after = await self._installed(request.name)
        return pb.UnloadModelResponse(model=_model(after), changed=before.loaded)

    async def RemoveModel(  # noqa: N802 - gRPC's name
        self, request: pb.RemoveModelRequest, context: Context
    ) -> pb.RemoveModelResponse:
        """Remove a version that no route names."""
        del context
        rules.check_model_version(request.name, "name")
        async with self._change:
            if aliases := self._aliases(request.name):
                raise Precondition(f"route {aliases[0]} leads to {request.name}; set the route first")
            async with self._audit.act("model_remove", caller(), request.name, {}) as act:
                act.detail["changed"] = changed = await self._engine.remove(request.name)
            return pb.RemoveModelResponse(changed=changed)

    async def GetRoute(  # noqa: N802 - gRPC's name
        self, request: pb.GetRouteRequest, context: Context
    ) -> pb.GetRouteResponse:
        """The route in force on this server."""
        del context
        alias = request.alias or "default"
        rules.check_alias(alias)
        return pb.GetRouteResponse(route=_route_proto(self._routes.get(alias)))

    async def SetRoute(  # noqa: N802 - gRPC's name
        self, request: pb.SetRouteRequest, context: Context
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

    async def _install(
        self, request: pb.InstallModelRequest, progress: InstallProgress
    ) -> pb.InstallModelResponse:
        rules.check_model_version(request.name, "name")
        rules.check_sha256(request.sha256)
        path = Path(request.path)
        if not path.is_absolute() or "\0" in request.path or len(request.path.encode()) >= PATH_MAX_BYTES:
            raise InvalidArgument(
                f"path is {request.path[:200]!a}; it must be an absolute path on the server's host, below"
                f" {PATH_MAX_BYTES} bytes",
                "path",
            )
        self._refuse_loading()
        detail = {"path": request.path, "sha256": request.sha256}
        async with self._change, self._audit.act("model_install", caller(), request.name, detail) as act:
            await self._refuse_beyond_quota(request.name, path)
            changed = await self._engine.install(request.name, path, request.sha256, progress)
            act.detail["changed"] = changed
            progress.begin(InstallPhase.LOADING)
            await self._engine.load(request.name)
            return pb.InstallModelResponse(model=_model(await self._installed(request.name)), changed=changed)

    async def _refuse_beyond_quota(self, name: str, path: Path) -> None:
        """A file that cannot be looked at is the engine's to refuse."""
        installed = await self._engine.list_models()
        if not self._max_bytes or name in [model.name for model in installed]:
            return
        try:
            size = (await asyncio.to_thread(path.stat)).st_size
        except OSError:
            return
        taken = sum(model.size_bytes for model in installed)
        if taken + size > self._max_bytes:
            raise ModelsFull(
                f"the installed versions take {taken} bytes and {name} would take {size} more; all together"
                f" may take {self._max_bytes} (AGENTLOOP_MODELS_MAX_BYTES): remove a version first"
            )

    def _aliases(self, name: str) -> list[str]:
        """The aliases whose routes name a version."""
        return [
            route.alias
            for route in self._routes.all()
            if name in [target.model_version for target in route.targets]
        ]

    async def _installed(self, name: str) -> ModelVersion:
        for model in await self._engine.list_models():
            if model.name == name:
                return model
        raise NotFound(f"no model version {name} is installed")


def _model(model: ModelVersion) -> pb.ModelVersion:
    return pb.ModelVersion(
        name=model.name, sha256=model.sha256, size_bytes=model.size_bytes, loaded=model.loaded
    )


def _progress(progress: InstallProgress) -> pb.InstallProgress:
    return pb.InstallProgress(
        phase=_PHASES[progress.phase],
        done_bytes=progress.done_bytes,
        total_bytes=progress.total_bytes,
        host=progress.host,
        hosts=progress.hosts,
    )


def _route(route: pb.Route) -> Route:
    for index, target in enumerate(route.targets):
        if target.role not in _ROLE_OF:
            raise InvalidArgument(
                f"route.targets[{index}].role is {target.role}; it must be one of TARGET_ROLE_STABLE,"
                " TARGET_ROLE_CANARY, TARGET_ROLE_SHADOW",
                f"route.targets[{index}].role",
            )
    return Route(
        route.alias or "default",
        route.revision,
        tuple(Target(target.model_version, _ROLE_OF[target.role], target.weight) for target in route.targets),
    )


def _route_proto(route: Route) -> pb.Route:
    return pb.Route(
        alias=route.alias,
        revision=route.revision,
        targets=[
            pb.Target(
                model_version=target.model_version, role=TARGET_ROLES[target.role], weight=target.weight
            )
            for target in route.targets
        ],
    )
