"""Whom each server has lent its GPU to, for a server that starts anew while a training runs."""

from __future__ import annotations

from uuid import UUID

from grpc_server.adapters.postgres import PostgresStore
from grpc_server.adapters.postgres_text import from_text, to_text
from grpc_server.domain.types import KeptLease

_KEEP = (
    "INSERT INTO gpu_lease (server_id, id, holder, expires_at, ends_at) VALUES"
    " (%(server_id)s, %(id)s, %(holder)s, now() + make_interval(secs => %(expires)s),"
    " now() + make_interval(secs => %(ends)s))"
    " ON CONFLICT (server_id) DO UPDATE SET id = excluded.id, holder = excluded.holder,"
    " expires_at = excluded.expires_at, ends_at = excluded.ends_at"
)
_FIND = (
    "SELECT id, holder, extract(epoch FROM expires_at - now()), extract(epoch FROM ends_at - now())"
    " FROM gpu_lease WHERE server_id = %s"
)


class PostgresLeases:
    """`LeaseStore` over one database, for one server."""

    def __init__(self, store: PostgresStore, server_id: str) -> None:
        self._store = store
        self._server_id = to_text(server_id)

    async def keep(self, lease: KeptLease) -> None:
        """See `LeaseStore.keep`."""
        values = {
            "server_id": self._server_id,
            "id": lease.id,
            "holder": to_text(lease.holder),
            "expires": lease.expires_in_seconds,
            "ends": lease.remaining_seconds,
        }
        async with self._store.reading() as connection:
            await connection.execute(_KEEP, values)

    async def find(self) -> KeptLease | None:
        """See `LeaseStore.find`."""
        async with self._store.reading() as connection:
            row = await (await connection.execute(_FIND, (self._server_id,))).fetchone()
        return None if row is None else KeptLease(row[0], from_text(row[1]), float(row[2]), float(row[3]))

    async def forget(self, lease_id: UUID) -> None:
        """See `LeaseStore.forget`."""
        async with self._store.reading() as connection:
            await connection.execute(
                "DELETE FROM gpu_lease WHERE server_id = %s AND id = %s", (self._server_id, lease_id)
            )
