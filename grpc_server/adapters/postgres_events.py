"""The table of events: who changed what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from grpc_server.adapters.postgres_text import to_json, to_text


async def note(
    connection: AsyncConnection[TupleRow], kind: str, actor: str, subject: str, detail: Mapping[str, Any]
) -> None:
    """Keep an event, in the transaction of what it tells: neither is stored without the other."""
    await connection.execute(
        "INSERT INTO event (kind, actor, subject, detail) VALUES (%s, %s, %s, %s)",
        (kind, to_text(actor), to_text(subject), to_json(detail)),
    )
