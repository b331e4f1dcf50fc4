"""The table of events: who changed what."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from grpc_server.adapters.postgres_text import from_text, to_json, to_text
from grpc_server.domain.types import Event


async def note(
    connection: AsyncConnection[TupleRow], kind: str, actor: str, subject: str, detail: Mapping[str, Any]
) -> None:
    """Keep an event, in the transaction of what it tells: neither is stored without the other."""
    await connection.execute(
        "INSERT INTO event (kind, actor, subject, detail) VALUES (%s, %s, %s, %s)",
        (kind, to_text(actor), to_text(subject), to_json(detail)),
    )


async def read_events(
    connection: AsyncConnection[TupleRow], kind: str, since: datetime | None, limit: int
) -> list[Event]:
    """The latest ones, the last one last; those of one kind, if one is given."""
    cursor = await connection.execute(
        "SELECT at, kind, actor, subject, detail FROM event "
        "WHERE (%(kind)s = '' OR kind = %(kind)s) AND (%(since)s::timestamptz IS NULL OR at >= %(since)s) "
        "ORDER BY at DESC, id DESC LIMIT %(limit)s",
        {"kind": to_text(kind), "since": since, "limit": limit},
    )
    rows = await cursor.fetchall()
    return [
        Event(at, kind, from_text(actor), from_text(subject), detail)
        for at, kind, actor, subject, detail in reversed(rows)
    ]
