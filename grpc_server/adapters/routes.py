"""Where each alias leads, as the database said last."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpc_server.adapters.last_known import LastKnown
from grpc_server.domain.errors import Conflict, NotFound, StoreUnavailable
from grpc_server.domain.ports import RouteStore
from grpc_server.domain.types import Route, Target, TargetRole

CHANGED_APART = 0.1
"""Seconds between two reads at least, however often routes change."""


class CachedRoutes:
    """Routes from memory; a change made here acts at once, one made elsewhere within `refresh_seconds`.

    Sooner where somebody calls `changed_elsewhere`, as `postgres_changes.Watch` does.

    Args:
        route_store: all routes.
        cache_file: where they are kept for a start without the database.
        refresh_seconds: how often routes are read.
    """

    def __init__(self, route_store: RouteStore, cache_file: Path, refresh_seconds: float) -> None:
        self._store = route_store
        self._routes: dict[str, Route] = {}
        self._last_known = LastKnown(
            route_store.all_routes,
            cache_file,
            refresh_seconds,
            changed=self._take,
            encode=_encode,
            decode=_decode,
        )

    async def start(self) -> None:
        """Read the routes, and go on reading them."""
        await self._last_known.start()

    async def close(self) -> None:
        """Stop reading."""
        await self._last_known.close()

    async def changed_elsewhere(self) -> None:
        """Read them anew; returns when that is done, or cannot be done."""
        await self._last_known.refresh_soon(CHANGED_APART)

    def get(self, alias: str) -> Route:
        """The route of `alias`. Raises NotFound."""
        try:
            return self._routes[alias]
        except KeyError:
            known = ", ".join(sorted(self._routes)) or "none yet"
            raise NotFound(f"there is no alias {alias!r}; there are: {known}") from None

    def all(self) -> list[Route]:
        """Every route, by alias."""
        return [self._routes[alias] for alias in sorted(self._routes)]

    async def set(self, route: Route, changed_by: str) -> Route:
        """Compare-and-set by `route.revision`; the route with its new revision, in force here at once.

        Raises Conflict, StoreUnavailable.
        """
        try:
            changed = await self._store.set_route(route, changed_by)
        except (
            Conflict,
            StoreUnavailable,
        ):  # another revision is in force; after a lost answer, perhaps ours
            await self._last_known.refresh()
            raise
        self._routes = {**self._routes, changed.alias: changed}
        await self._last_known.refresh()
        return changed

    def _take(self, routes: Sequence[Route]) -> None:
        self._routes = {route.alias: route for route in routes}


def _encode(route: Route) -> dict[str, Any]:
    return {
        "alias": route.alias,
        "revision": route.revision,
        "targets": [
            {"model_version": target.model_version, "role": target.role.value, "weight": target.weight}
            for target in route.targets
        ],
    }


def _decode(row: dict[str, Any]) -> Route:
    targets = tuple(
        Target(target["model_version"], TargetRole(target["role"]), target["weight"])
        for target in row["targets"]
    )
    return Route(row["alias"], row["revision"], targets)
