"""Nothing that was erased comes back: what of a batch of records may still be stored.

A spool may hold records of an erased caller for as long as the database was away. They are dropped here, in
the transaction that stores the batch, and count as stored: nothing is left to be done with them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from grpc_server.adapters.postgres_text import to_text
from grpc_server.domain.types import Feedback, InferenceEnded, InferenceStarted, LogRecord


@dataclass(frozen=True, slots=True)
class _Erasure:
    id: UUID
    kind: str
    salt: bytes
    digest: bytes
    before: datetime

    def covers(self, record: InferenceStarted | Feedback) -> bool:
        began = record.started_at if isinstance(record, InferenceStarted) else record.created_at
        if began >= self.before:
            return False
        if self.kind == "caller":
            return digest_of(self.salt, record.caller) == self.digest
        if not isinstance(record, InferenceStarted):
            return False
        name = record.session_id if self.kind == "session" else str(record.id)
        return digest_of(self.salt, name) == self.digest


def digest_of(salt: bytes, name: str) -> bytes:
    """What an erasure keeps of a name."""
    return hashlib.sha256(salt + to_text(name).encode()).digest()


async def unerased(connection: AsyncConnection[TupleRow], records: Sequence[LogRecord]) -> list[LogRecord]:
    """The records without those that were erased, in the same order."""
    kept, gone = list(records), await _begun_before(connection, records)
    if gone:
        await _remember(connection, gone)
        kept = [one for one in records if not (isinstance(one, InferenceStarted) and one.id in gone)]
    about = [found for one in kept if (found := _about(one)) is not None]
    if not about:
        return kept
    cursor = await connection.execute(
        "SELECT inference_id FROM erased WHERE whole AND inference_id = ANY(%s)", (about,)
    )
    whole = {row[0] for row in await cursor.fetchall()}
    covering = await _erasures(connection, [one for one in kept if isinstance(one, Feedback)])
    return [
        one
        for one in kept
        if _about(one) not in whole
        and not (isinstance(one, Feedback) and any(erasure.covers(one) for erasure in covering))
    ]


async def _begun_before(
    connection: AsyncConnection[TupleRow], records: Sequence[LogRecord]
) -> dict[UUID, UUID]:
    """Each start that an erasure covers, with that erasure."""
    starts = [one for one in records if isinstance(one, InferenceStarted)]
    erasures = await _erasures(connection, starts)
    return {start.id: erasure.id for start in starts for erasure in erasures if erasure.covers(start)}


async def _erasures(
    connection: AsyncConnection[TupleRow], records: Sequence[InferenceStarted | Feedback]
) -> list[_Erasure]:
    """Those that may cover one of the records: none, unless a record is older than an erasure."""
    if not records:
        return []
    oldest = min(one.started_at if isinstance(one, InferenceStarted) else one.created_at for one in records)
    cursor = await connection.execute(
        "SELECT id, kind, salt, digest, before FROM erasure WHERE before > %s", (oldest,)
    )
    return [_Erasure(*row) for row in await cursor.fetchall()]


async def _remember(connection: AsyncConnection[TupleRow], gone: dict[UUID, UUID]) -> None:
    async with connection.cursor() as cursor:
        await cursor.executemany(
            "INSERT INTO erased (inference_id, erasure, whole) VALUES (%s, %s, true) ON CONFLICT DO NOTHING",
            list(gone.items()),
        )


def _about(record: LogRecord) -> UUID | None:
    """The inference that a record adds to; None for one that begins one."""
    if isinstance(record, InferenceEnded):
        return record.id
    return record.inference_id if isinstance(record, Feedback) else None
