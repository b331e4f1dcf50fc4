"""Routes in Postgres; each change with its event, in one transaction."""

from __future__ import annotations

from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from grpc_server.adapters.postgres_events import note
from grpc_server.adapters.postgres_text import from_text, to_text
from grpc_server.domain.errors import Conflict
from grpc_server.domain.types import Route, Target, TargetRole


async def read_routes(connection: AsyncConnection[TupleRow]) -> list[Route]:
    """Every route, by alias."""
    cursor = await connection.execute(
        "SELECT r.alias, r.revision, t.model_version, t.role, t.weight "
        "FROM route r LEFT JOIN route_target t USING (alias) ORDER BY r.alias, t.position"
    )
    routes: dict[str, Route] = {}
    for alias, revision, model_version, role, weight in await cursor.fetchall():
        before = routes.get(alias, Route(from_text(alias), revision, ()))
        found: tuple[Target, ...] = ()
        if model_version is not None:
            found = (Target(from_text(model_version), TargetRole(role), weight),)
        routes[alias] = Route(before.alias, revision, (*before.targets, *found))
    return list(routes.values())


async def change_route(connection: AsyncConnection[TupleRow], route: Route, changed_by: str) -> Route:
    """Compare-and-set by `route.revision`; returns it with its new one. Raises Conflict."""
    alias = to_text(route.alias)
    if route.revision == 0:
        cursor = await connection.execute(
            "INSERT INTO route (alias, revision, changed_by) VALUES (%s, 1, %s) ON CONFLICT DO NOTHING",
            (alias, to_text(changed_by)),
        )
    else:
        cursor = await connection.execute(
            "UPDATE route SET revision = revision + 1, changed_at = now(), changed_by = %s "
            "WHERE alias = %s AND revision = %s",
            (to_text(changed_by), alias, route.revision),
        )
    if cursor.rowcount == 0:
        raise Conflict(await _conflict_text(connection, alias, route.revision))
    await connection.execute("DELETE FROM route_target WHERE alias = %s", (alias,))
    targets = [
        (alias, position, to_text(target.model_version), target.role.value, target.weight)
        for position, target in enumerate(route.targets)
    ]
    async with connection.cursor() as many:
        await many.executemany("INSERT INTO route_target VALUES (%s, %s, %s, %s, %s)", targets)
    changed = Route(route.alias, route.revision + 1, route.targets)
    await note(
        connection,
        "route_set",
        changed_by,
        route.alias,
        {"revision": changed.revision, "targets": [list(target[2:]) for target in targets]},
    )
    return changed


async def _conflict_text(connection: AsyncConnection[TupleRow], alias: str, revision: int) -> str:
    cursor = await connection.execute("SELECT revision FROM route WHERE alias = %s", (alias,))
    row = await cursor.fetchone()
    now = "there is no such route" if row is None else f"it is at revision {row[0]}"
    return f"route {alias}: {now}, not at {revision}; read it again, then decide"
