"""API tokens in Postgres; each change with its event, in one transaction."""

from __future__ import annotations

from datetime import datetime

from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from grpc_server.adapters.postgres_events import note
from grpc_server.adapters.postgres_text import from_text, to_text
from grpc_server.domain.errors import AlreadyExists
from grpc_server.domain.limits import limits_to_plain
from grpc_server.domain.ports import TokenRecord
from grpc_server.domain.types import Limits, Scope

_COLUMNS = (
    "key_id, name, secret_sha256, scopes, created_at, expires_at, revoked_at, requests_per_minute, "
    "tokens_per_minute, concurrent_streams, aliases, learning, text"
)


async def read_tokens(connection: AsyncConnection[TupleRow]) -> list[TokenRecord]:
    """Every token, the revoked ones too, by age."""
    cursor = await connection.execute(f"SELECT {_COLUMNS} FROM api_token ORDER BY created_at, key_id")  # noqa: S608
    return [_token(row) for row in await cursor.fetchall()]


async def add_token(connection: AsyncConnection[TupleRow], token: TokenRecord, by: str) -> None:
    """Store a new token. Raises AlreadyExists."""
    cursor = await connection.execute(
        f"INSERT INTO api_token ({_COLUMNS}) VALUES "  # noqa: S608
        "(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
        (
            token.key_id,
            to_text(token.name),
            token.secret_sha256,
            sorted(token.scopes),
            token.created_at,
            token.expires_at,
            token.revoked_at,
            *_limits_row(token.limits),
            token.learning,
            token.text,
        ),
    )
    if cursor.rowcount == 0:
        raise AlreadyExists(f"there is a token {token.key_id} already")
    detail = {
        "name": token.name,
        "scopes": sorted(token.scopes),
        "limits": limits_to_plain(token.limits),
        "expires_at": None if token.expires_at is None else token.expires_at.isoformat(),
        "learning": token.learning,
        "text": token.text,
    }
    await note(connection, "token_created", by, token.key_id, detail)


async def revoke_token(connection: AsyncConnection[TupleRow], key_id: str, at: datetime, by: str) -> bool:
    """Revoke a token; False if there is none, or it is revoked already."""
    cursor = await connection.execute(
        "UPDATE api_token SET revoked_at = %s WHERE key_id = %s AND revoked_at IS NULL",
        (at, to_text(key_id)),
    )
    if cursor.rowcount == 0:
        return False
    await note(connection, "token_revoked", by, key_id, {})
    return True


async def limit_token(connection: AsyncConnection[TupleRow], key_id: str, limits: Limits, by: str) -> bool:
    """Replace a token's limits; False if there is none, or it is revoked."""
    cursor = await connection.execute(
        "UPDATE api_token SET requests_per_minute = %s, tokens_per_minute = %s, concurrent_streams = %s, "
        "aliases = %s WHERE key_id = %s AND revoked_at IS NULL",
        (*_limits_row(limits), to_text(key_id)),
    )
    if cursor.rowcount == 0:
        return False
    await note(connection, "token_limited", by, key_id, {"limits": limits_to_plain(limits)})
    return True


def _limits_row(limits: Limits) -> tuple[int | None, int | None, int | None, list[str] | None]:
    aliases = None if limits.aliases is None else sorted(limits.aliases)
    return limits.requests_per_minute, limits.tokens_per_minute, limits.concurrent_streams, aliases


def _token(row: TupleRow) -> TokenRecord:
    key_id, name, secret, scopes, created_at, expires_at, revoked_at, *others = row
    requests, tokens, streams, aliases, learning, text = others
    known = frozenset(Scope(scope) for scope in scopes if scope in set(Scope))
    limits = Limits(requests, tokens, streams, None if aliases is None else frozenset(aliases))
    return TokenRecord(
        key_id,
        from_text(name),
        bytes(secret),
        known,
        created_at,
        expires_at,
        revoked_at,
        limits,
        learning,
        text,
    )
