"""Every kind of credential that must not be let in, for a server that takes API tokens and JWTs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from grpc_server.adapters import credentials
from grpc_server.adapters.credentials import AnyCredential, CachedAuthenticator, new_token
from grpc_server.adapters.jwks import Jwks
from grpc_server.adapters.jwt_tokens import JwtAuthenticator, JwtRules
from grpc_server.domain.types import Scope
from tests import jwts
from tests.fakes import FakeTokenStore

Headers = tuple[tuple[str, str | bytes], ...]

ALL = frozenset(Scope)
EVERYTHING = " ".join(Scope)
EARLIER = datetime.now(UTC) - timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Credentials:
    """An authenticator, and API tokens; all but those of `scoped` would allow everything."""

    authenticator: AnyCredential
    in_force: str
    expired: str
    revoked: str
    scoped: Mapping[Scope, str]

    def without(self, scope: Scope) -> Mapping[str, str]:
        """Credentials in force that allow everything but `scope`, each by its kind."""
        others = [one for one in Scope if one not in (scope, Scope.ADMIN)]
        tokens = {f"API token for {one}": self.scoped[one] for one in others}
        return {
            **tokens,
            "JWT for all others": jwts.token(scope=" ".join(others)),
            "JWT without scopes": jwts.token(scope=None),
            "JWT for other services": jwts.token(scope="openid profile administrator"),
        }


@contextlib.asynccontextmanager
async def credentials_of(folder: Path) -> AsyncIterator[Credentials]:
    """API tokens and JWTs, as a server has them that both are set for."""
    store = FakeTokenStore()

    def add(
        scopes: frozenset[Scope], expires: datetime | None = None, revoked: datetime | None = None
    ) -> str:
        text, record = new_token("somebody", scopes, EARLIER, expires)
        store.tokens[record.key_id] = replace(record, revoked_at=revoked)
        return text

    async def published() -> bytes:
        return jwts.key_set("RS256", "ES256", "EdDSA")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(credentials, "SOONEST_SECONDS", 0.0)
        in_force, expired, revoked = add(ALL), add(ALL, EARLIER), add(ALL, None, EARLIER)
        scoped = {scope: add(frozenset({scope})) for scope in Scope}
        api = CachedAuthenticator(store, folder / "cache" / "tokens.json", 3600)
        keys = Jwks(published, refresh_seconds=3600, retry_seconds=3600, max_age_seconds=3600)
        signed = JwtAuthenticator(keys, JwtRules(jwts.ISSUER, jwts.AUDIENCE))
        for part in (api, signed):
            await part.start()
        try:
            yield Credentials(AnyCredential(api, signed), in_force, expired, revoked, scoped)
        finally:
            for part in (api, signed):
                await part.close()


def _bearer(text: str) -> Headers:
    return (("authorization", f"Bearer {text}"),)


def _jwt(**changes: Any) -> Callable[[Credentials], Headers]:
    return lambda _: _bearer(jwts.token(scope=EVERYTHING, **changes))


def _now(seconds: int) -> int:
    return int(time.time()) + seconds


BAD: Mapping[str, Callable[[Credentials], Headers]] = {
    "none": lambda _: (),
    "empty": lambda _: (("authorization", ""),),
    "no scheme": lambda c: (("authorization", c.in_force),),
    "another scheme": lambda c: (("authorization", f"Basic {c.in_force}"),),
    "no token": lambda _: (("authorization", "Bearer"),),
    "two headers, both right": lambda c: _bearer(c.in_force) * 2,
    "two headers, one right": lambda c: _bearer("al_x") + _bearer(c.in_force),
    "two tokens in one header": lambda c: _bearer(f"{c.in_force} {c.in_force}"),
    "two tokens by a comma": lambda c: _bearer(f"{c.in_force}, Bearer {c.in_force}"),
    "another header": lambda c: (("x-authorization", f"Bearer {c.in_force}"),),
    "malformed": lambda c: _bearer(c.in_force[:-1]),
    "in capitals": lambda c: _bearer(c.in_force.upper()),
    "long": lambda _: _bearer("al_" + "a" * 4000),
    "unknown": lambda _: _bearer("al_aaaaaaaaaaaa_" + "A" * 43),
    "of a known key, with another secret": lambda c: _bearer(c.in_force[:16] + "A" * 43),
    "expired": lambda c: _bearer(c.expired),
    "revoked": lambda c: _bearer(c.revoked),
    "JWT alg none": lambda _: _bearer(jwts.unsigned(scope=EVERYTHING)),
    "JWT without signature": lambda _: _bearer(jwts.token(scope=EVERYTHING).rpartition(".")[0] + "."),
    "JWT HS256 with the public key": lambda _: _bearer(jwts.confused(scope=EVERYTHING)),
    "JWT of a stranger's key": lambda _: _bearer(
        jwts.token("ES256/stranger", {"kid": "ES256"}, scope=EVERYTHING)
    ),
    "JWT of an unknown kid": lambda _: _bearer(jwts.token("ES256/stranger", scope=EVERYTHING)),
    "JWT kid twice": lambda _: _bearer(
        jwts.signed_by_hand('{"alg":"ES256","kid":"x","kid":"ES256"}', jwts.claims(scope=EVERYTHING))
    ),
    "JWT crit": lambda _: _bearer(
        jwts.signed_by_hand({"alg": "ES256", "kid": "ES256", "crit": ["x"]}, jwts.claims(scope=EVERYTHING))
    ),
    "JWT of another audience": _jwt(aud="other"),
    "JWT of another issuer": _jwt(iss="https://evil.test"),
    "JWT expired": lambda _: _bearer(jwts.token(scope=EVERYTHING, exp=_now(-60))),
    "JWT without end": _jwt(exp=None),
    "JWT not yet valid": lambda _: _bearer(jwts.token(scope=EVERYTHING, nbf=_now(600))),
    "JWT without subject": _jwt(sub=None),
    "JWT oversized": _jwt(padding="x" * 8192),
    "JWT of three words": lambda _: _bearer("a.b.c"),
}
"""What each kind puts into a call's headers."""
