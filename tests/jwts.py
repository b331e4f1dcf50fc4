"""An issuer of JWTs for tests: keys, their set, tokens right and wrong."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from functools import cache
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

ISSUER = "https://issuer.test"
AUDIENCE = "agent-loop"


@cache
def private_key(kind: str) -> Any:
    """`RS256`, `ES256`, `EdDSA`, the same each time; anything else behind a `/` makes another one."""
    algorithm = kind.partition("/")[0]
    if algorithm == "RS256":
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)
    if algorithm == "ES256":
        return ec.generate_private_key(ec.SECP256R1())
    if algorithm == "EdDSA":
        return ed25519.Ed25519PrivateKey.generate()
    raise ValueError(kind)


def public_jwk(kind: str, kid: str | None = None, **more: Any) -> dict[str, Any]:
    """The public key as a member of a set; its kid is its kind, unless another is given."""
    make: Any = {"RS256": RSAAlgorithm, "ES256": ECAlgorithm, "EdDSA": OKPAlgorithm}
    jwk = make[kind.partition("/")[0]].to_jwk(private_key(kind).public_key(), as_dict=True)
    jwk.pop("key_ops", None)
    return {**jwk, "kid": kind if kid is None else kid, **more}


def key_set(*members: Any) -> bytes:
    """A set of these members, or of the kinds that these names name."""
    jwks = [public_jwk(member) if isinstance(member, str) else member for member in members]
    return json.dumps({"keys": jwks}).encode()


def public_pem(kind: str) -> bytes:
    public: bytes = (
        private_key(kind)
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return public


def claims(**changes: Any) -> dict[str, Any]:
    """Those of a token that is right; a change to None leaves one out."""
    now = int(time.time())
    right = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "billing",
        "exp": now + 300,
        "nbf": now - 5,
        "iat": now - 5,
        "scope": "infer feedback openid",
    }
    return {name: value for name, value in {**right, **changes}.items() if value is not None}


def token(kind: str = "ES256", headers: dict[str, Any] | None = None, **changes: Any) -> str:
    """A signed token; `headers` are added to, or replace, `kid` and `typ`."""
    algorithm = kind.partition("/")[0]
    return jwt.encode(
        claims(**changes), private_key(kind), algorithm=algorithm, headers={"kid": kind, **(headers or {})}
    )


def by_hand(header: dict[str, Any] | str, payload: dict[str, Any] | str, sign: Any = None) -> str:
    """A token that no library would make. `sign` gives the signature of what comes before it."""
    parts = [part if isinstance(part, str) else json.dumps(part) for part in (header, payload)]
    signed = ".".join(_encoded(part.encode(errors="surrogatepass")) for part in parts)
    return f"{signed}.{_encoded(sign(signed.encode())) if sign else ''}"


def unsigned(**changes: Any) -> str:
    """`alg: none`."""
    return by_hand({"alg": "none", "typ": "JWT", "kid": "ES256"}, claims(**changes))


def confused(kind: str = "RS256", **changes: Any) -> str:
    """HS256, with the public key as the secret."""
    secret = public_pem(kind)
    header = {"alg": "HS256", "typ": "JWT", "kid": kind}
    return by_hand(header, claims(**changes), lambda signed: hmac.digest(secret, signed, hashlib.sha256))


def signed_by_hand(header: dict[str, Any] | str, payload: dict[str, Any] | str) -> str:
    """Rightly signed with the ES256 key, whatever it says."""
    algorithm = ECAlgorithm(ECAlgorithm.SHA256)
    return by_hand(header, payload, lambda signed: algorithm.sign(signed, private_key("ES256")))


def _encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
