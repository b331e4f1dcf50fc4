"""Who holds a credential: API tokens made, and checked against those in force; which form is whose.

An API token is `al_<key id>_<secret>`. The secret has 256 random bits, so that a plain SHA-256 of it can be
stored: there is nothing to guess, and nothing to slow down.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grpc_server.adapters.last_known import SOONEST_SECONDS, LastKnown
from grpc_server.domain.errors import Unauthenticated
from grpc_server.domain.limits import limits_from_plain, limits_to_plain
from grpc_server.domain.ports import Authenticator, TokenRecord, TokenStore
from grpc_server.domain.types import NO_LIMITS, Caller, Limits, Scope

_PREFIX = "al_"
_FORM = re.compile(r"al_([a-z0-9]{12})_([A-Za-z0-9_-]{43})")
_ALPHABET = string.ascii_lowercase + string.digits
_NOBODY = hashlib.sha256(b"").digest()


def new_token(
    name: str,
    scopes: frozenset[Scope],
    created_at: datetime,
    expires_at: datetime | None,
    limits: Limits = NO_LIMITS,
    *,
    learning: bool = True,
    text: bool = True,
) -> tuple[str, TokenRecord]:
    """A new token: as it is written, which is shown once, and what is stored of it.

    Without `learning` the nights learn nothing from its caller; without `text` the log keeps no word of it.
    """
    key_id = "".join(secrets.choice(_ALPHABET) for _ in range(12))
    secret = secrets.token_urlsafe(32)
    record = TokenRecord(
        key_id, name, _digest(secret), scopes, created_at, expires_at, None, limits, learning, text
    )
    return f"al_{key_id}_{secret}", record


class CachedAuthenticator:
    """The Authenticator port, on the tokens that were read last.

    A revocation acts after `refresh_seconds` and the time of one read, or as soon as `changed_elsewhere` is
    called; an expiry at once. A token that was
    made just now is known at once, too: who comes with an unknown one waits for a fresh read, and there are
    at most two of these a second. Until the database has answered once, and without a file of an earlier run,
    nobody is let in.

    Args:
        token_store: all tokens.
        cache_file: where hashes and scopes are kept for a start without the database.
        refresh_seconds: how often tokens are read.
        now: the time, in UTC.
    """

    def __init__(
        self,
        token_store: TokenStore,
        cache_file: Path,
        refresh_seconds: float,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._now = now
        self._tokens: dict[str, TokenRecord] = {}
        self._last_known = LastKnown(
            token_store.all_tokens,
            cache_file,
            refresh_seconds,
            changed=self._take,
            encode=_encode,
            decode=_decode,
        )

    async def start(self) -> None:
        """Read the tokens, and go on reading them."""
        await self._last_known.start()

    async def close(self) -> None:
        """Stop reading."""
        await self._last_known.close()

    async def changed_elsewhere(self) -> None:
        """Read the tokens anew; returns when that is done, or cannot be done."""
        await self._last_known.refresh_soon(SOONEST_SECONDS)

    async def authenticate(self, token: str) -> Caller:
        """The caller that `token` speaks for.

        Raises:
            Unauthenticated: with the same text whatever was wrong.
        """
        found = _FORM.fullmatch(token)
        if found is None:
            raise Unauthenticated()
        record = self._find(*found.groups())
        if record is None:
            await self._last_known.refresh_soon(SOONEST_SECONDS)
            record = self._find(*found.groups())
        if record is None:
            raise Unauthenticated()
        return record.caller()

    def _find(self, key_id: str, secret: str) -> TokenRecord | None:
        """The token in force; as much work is done for an unknown key as for a known one."""
        record = self._tokens.get(key_id)
        right = hmac.compare_digest(_digest(secret), _NOBODY if record is None else record.secret_sha256)
        if record is None or not right or record.revoked_at is not None:
            return None
        if record.expires_at is not None and record.expires_at <= self._now():
            return None
        return record

    def _take(self, tokens: Sequence[TokenRecord]) -> None:
        self._tokens = {token.key_id: token for token in tokens}


class AnyCredential:
    """The Authenticator port on API tokens and JWTs: the first letters tell which a credential is."""

    def __init__(self, api_tokens: Authenticator, jwts: Authenticator) -> None:
        self._api_tokens = api_tokens
        self._jwts = jwts

    async def authenticate(self, token: str) -> Caller:
        """The caller that `token` speaks for. Raises Unauthenticated."""
        chosen = self._api_tokens if token.startswith(_PREFIX) else self._jwts
        return await chosen.authenticate(token)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _encode(token: TokenRecord) -> dict[str, Any]:
    return {
        "key_id": token.key_id,
        "name": token.name,
        "secret_sha256": token.secret_sha256.hex(),
        "scopes": sorted(token.scopes),
        "created_at": token.created_at.isoformat(),
        "expires_at": None if token.expires_at is None else token.expires_at.isoformat(),
        "revoked_at": None if token.revoked_at is None else token.revoked_at.isoformat(),
        "limits": limits_to_plain(token.limits),
        "learning": token.learning,
        "text": token.text,
    }


def _decode(row: dict[str, Any]) -> TokenRecord:
    def moment(key: str) -> datetime | None:
        return None if row[key] is None else datetime.fromisoformat(row[key])

    return TokenRecord(
        key_id=row["key_id"],
        name=row["name"],
        secret_sha256=bytes.fromhex(row["secret_sha256"]),
        scopes=frozenset(Scope(scope) for scope in row["scopes"]),
        created_at=datetime.fromisoformat(row["created_at"]),
        expires_at=moment("expires_at"),
        revoked_at=moment("revoked_at"),
        limits=limits_from_plain(row["limits"]),
        learning=bool(row["learning"]),
        text=bool(row["text"]),
    )
