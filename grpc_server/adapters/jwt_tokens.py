"""Who a JSON Web Token (RFC 7519) speaks for: signature, issuer, audience and times checked, claims read.

PyJWT verifies; what is around it makes sure that it is asked the right question. Best practices: RFC 8725.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jwt

from grpc_server.adapters.jwks import Jwks, unique_names
from grpc_server.domain.errors import Unauthenticated
from grpc_server.domain.limits import limits_from_plain
from grpc_server.domain.types import NO_LIMITS, Caller, Limits, Scope

MAX_NAME_CHARACTERS = 100
LEARNING_CLAIM, TEXT_CLAIM = "agentloop_learning", "agentloop_text"
"""Claims that are `false` where nothing may be learned from the caller, or no word of it be kept."""
MAX_SUBJECT_CHARACTERS = 1000
NOTE_SECONDS = 60.0
"""Each reason of refusals is logged at most once in so long: strangers must not fill the log."""
TYPES = frozenset({"jwt", "at+jwt", "application/at+jwt"})
"""What `typ` may say, if it says anything: the same issuer signs tokens of other kinds, for other uses."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JwtRules:
    """Which tokens are taken, and where in them to look.

    Args:
        issuer: what `iss` must be.
        audience: what `aud` must be, or hold.
        leeway_seconds: how far the issuer's clock may be from ours.
        max_bytes: longer tokens are refused unread.
        scopes_claim: the claim with the scopes, words in one string or a list of strings; a path by dots
            (`realm_access.roles`) where there is no claim of that very name.
        scope_prefix: what our scopes begin with there; words without it are somebody else's.
        name_claim: the claim with the caller's name for the log.
        limits: of callers whose token has no claim of its own about them.
        limits_claim: the claim with an object of limits; what it does not name is as in `limits`.
    """

    issuer: str
    audience: str
    leeway_seconds: float = 30.0
    max_bytes: int = 8192
    scopes_claim: str = "scope"
    scope_prefix: str = ""
    name_claim: str = "sub"
    limits: Limits = NO_LIMITS
    limits_claim: str = "agentloop_limits"


class _RefusedError(Exception):
    """Why, for the server's log; nothing of the token itself."""


class JwtAuthenticator:
    """The Authenticator port, on JWTs signed by a key of the set."""

    def __init__(
        self, keys: Jwks, rules: JwtRules, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._keys = keys
        self._rules = rules
        self._monotonic = monotonic
        self._noted: dict[str, float] = {}
        self._jwt = jwt.PyJWT(
            {
                "require": ["exp", "iss", "aud", "sub"],
                "enforce_minimum_key_length": True,
            }
        )

    async def start(self) -> None:
        """Read the keys, and go on reading them."""
        await self._keys.start()

    async def close(self) -> None:
        """Stop reading."""
        await self._keys.close()

    async def authenticate(self, token: str) -> Caller:
        """The caller that `token` speaks for; its key id is a hash of issuer and subject.

        Raises:
            Unauthenticated: with the same text whatever was wrong, and that of API tokens.
        """
        try:
            return self._caller(await self._claims(token))
        except _RefusedError as error:
            self._note(str(error))
            raise Unauthenticated from None

    async def _claims(self, token: str) -> Mapping[str, Any]:
        if len(token) > self._rules.max_bytes or not token.isascii():
            raise _RefusedError(f"it has over {self._rules.max_bytes} bytes, or is not ASCII")
        kid, algorithm = _header(token)
        key = await self._keys.key(kid)
        if key is None:
            raise _RefusedError("its key is not in the set")
        if key.algorithm_name != algorithm:
            raise _RefusedError("its alg is not that of its key")
        try:
            claims = self._jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                issuer=self._rules.issuer,
                audience=self._rules.audience,
                leeway=self._rules.leeway_seconds,
            )
        # Beside its own errors: numbers that are none, or have no end, and what nests without end.
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise _RefusedError(type(error).__name__) from error
        return claims

    def _caller(self, claims: Mapping[str, Any]) -> Caller:
        subject, name = claims["sub"], _claim(claims, self._rules.name_claim)
        if not 1 <= len(subject) <= MAX_SUBJECT_CHARACTERS:
            raise _RefusedError("its subject is empty or too long")
        if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME_CHARACTERS or not name.isprintable():
            raise _RefusedError(f"its {self._rules.name_claim} is not 1 to 100 printable characters")
        key_id = key_id_of(self._rules.issuer, subject)
        text = _allowed(claims, TEXT_CLAIM)
        return Caller(
            key_id,
            name,
            self._scopes(claims),
            learning=text and _allowed(claims, LEARNING_CLAIM),
            text=text,
            limits=self._limits(claims),
        )

    def _scopes(self, claims: Mapping[str, Any]) -> frozenset[Scope]:
        """The scopes that are ours; the issuer knows others, for other services."""
        value = _claim(claims, self._rules.scopes_claim)
        words = value.split(" ") if isinstance(value, str) else value if isinstance(value, list) else []
        prefix = self._rules.scope_prefix
        ours = [
            word.removeprefix(prefix) for word in words if isinstance(word, str) and word.startswith(prefix)
        ]
        return frozenset(Scope(word) for word in ours if word in set(Scope))

    def _limits(self, claims: Mapping[str, Any]) -> Limits:
        value = _claim(claims, self._rules.limits_claim)
        try:
            return self._rules.limits if value is None else limits_from_plain(value, self._rules.limits)
        except ValueError as error:
            raise _RefusedError(f"its {self._rules.limits_claim} are no limits") from error

    def _note(self, reason: str) -> None:
        now = self._monotonic()
        if now - self._noted.get(reason, float("-inf")) >= NOTE_SECONDS:
            self._noted[reason] = now  # reasons are few: they quote nothing
            _log.warning("a JWT was refused", extra={"reason": reason})


def key_id_of(issuer: str, subject: str) -> str:
    """The key id of a JWT's caller, the same for each of its tokens: `jwt_` and 24 hexadecimal digits."""
    digest = hashlib.sha256(f"{issuer}\0{subject}".encode(errors="surrogatepass")).hexdigest()
    return f"jwt_{digest[:24]}"


def _header(token: str) -> tuple[str, str]:
    """`kid` and `alg`. No extension is understood (`crit`), and no key is taken from the token itself."""
    if token.count(".") != 2:
        raise _RefusedError("it is not three parts")
    part = token.partition(".")[0]
    try:
        content = base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)
        header = json.loads(content, object_pairs_hook=unique_names)
    except (binascii.Error, ValueError, RecursionError) as error:
        raise _RefusedError("its header is no JSON object, or says something twice") from error
    if not isinstance(header, dict):
        raise _RefusedError("its header is no JSON object, or says something twice")
    if "crit" in header or "b64" in header:
        raise _RefusedError("its header demands an extension")
    kind = header.get("typ", "jwt")
    if not isinstance(kind, str) or kind.lower() not in TYPES:
        raise _RefusedError("its typ is that of another kind of token")
    kid, algorithm = header.get("kid"), header.get("alg")
    if not isinstance(kid, str) or not isinstance(algorithm, str):
        raise _RefusedError("its header names no key, or no algorithm")
    return kid, algorithm


def _allowed(claims: Mapping[str, Any], name: str) -> bool:
    """Whether a claim does not forbid it: only `false` does, and what is neither is no token of ours."""
    value = claims.get(name, True)
    if not isinstance(value, bool):
        raise _RefusedError(f"its {name} is neither true nor false")
    return value


def _claim(claims: Mapping[str, Any], name: str) -> Any:
    """The claim of that name, or at that path; none: None."""
    if name in claims:
        return claims[name]
    value: Any = claims
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value
