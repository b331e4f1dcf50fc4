"""What a server serves when it starts: the base model where nothing is routed, and all that is, loaded."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from grpc_server.adapters.gguf_file import in_thread, sha256_of
from grpc_server.background import in_background
from grpc_server.domain.errors import AgentLoopError, Conflict
from grpc_server.domain.ports import Engine, Routes
from grpc_server.domain.types import Route, Target, TargetRole
from grpc_server.settings import Settings

log = logging.getLogger(__name__)

ALIASES = ("default", "agent")
"""What a new installation routes to its base model."""


@contextlib.asynccontextmanager
async def routed(settings: Settings, engine: Engine, routes: Routes) -> AsyncIterator[None]:
    """Where there is no route at all yet, lead the aliases to the base model, once the database is up."""

    async def until_routed() -> None:
        while not routes.all():
            await asyncio.sleep(settings.cache_seconds)
            await route_to_base(settings, engine, routes)

    if not routes.all():
        if not settings.base_gguf.exists():
            log.warning("there is no route, and no base model", extra={"base_gguf": str(settings.base_gguf)})
            yield
            return
        await route_to_base(settings, engine, routes)
    async with in_background(until_routed(), "first route"):
        yield


async def route_to_base(settings: Settings, engine: Engine, routes: Routes) -> None:
    """Install the base model and lead the aliases to it."""
    try:
        await _install_base(settings, engine)
    except AgentLoopError as error:
        log.warning("the base model was not installed", extra={"error": str(error)})
        return
    for alias in ALIASES:
        target = Target(_base(settings), TargetRole.STABLE, 100)
        try:
            await routes.set(Route(alias, 0, (target,)), "bootstrap")
        except Conflict:
            log.info("another server has set the route", extra={"alias": alias})
        except AgentLoopError as error:
            log.warning("the first route was not set", extra={"alias": alias, "error": str(error)})


async def load_routed(settings: Settings, engine: Engine, routes: Routes) -> None:
    """Bring what routes lead to into memory, so that the first caller does not wait for it.

    The base model is installed again where this engine lacks it: the one before may have been another.
    """
    for name in sorted(routed_versions(routes)):
        try:
            if name == _base(settings) and settings.base_gguf.exists():
                await _install_base(settings, engine)
            await engine.load(name)
        except AgentLoopError as error:
            log.warning("a model version was not loaded", extra={"model_version": name, "error": str(error)})


def routed_versions(routes: Routes) -> set[str]:
    """The model versions that routes lead requests to."""
    return {target.model_version for route in routes.all() for target in route.targets if target.weight}


async def _install_base(settings: Settings, engine: Engine) -> None:
    name = _base(settings)
    if name not in [model.name for model in await engine.list_models()]:
        sha256 = await in_thread(lambda abandoned: sha256_of(settings.base_gguf, abandoned))
        await engine.install(name, settings.base_gguf, sha256)


def _base(settings: Settings) -> str:
    return f"{settings.model_name}:base"
