"""The public keys of those who issue JWTs: a JSON Web Key Set (RFC 7517), read again and again.

While the source is down the keys read last stay in force, up to an age. A token that names a key which is not
known makes us read at once, but not more often than every few seconds, however many such tokens come.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import httpx
import jwt

READ_SECONDS = 5.0
"""For one read of a URL, as a whole."""
MAX_SET_BYTES = 256 * 1024
MAX_KEYS = 100
MAX_KID_CHARACTERS = 256
RSA_BITS = (2048, 8192)
"""Fewer are too weak (NIST SP 800-131A); more only cost time."""

ALGORITHMS: Final[Mapping[tuple[str, str], str]] = {
    ("RSA", ""): "RS256",
    ("EC", "P-256"): "ES256",
    ("OKP", "Ed25519"): "EdDSA",
}
"""The one algorithm that a key of each type and curve is for. The key says it, never the token: so no public
key is ever taken for the secret of an HMAC."""

Read = Callable[[], Awaitable[bytes]]

_log = logging.getLogger(__name__)


class JwksError(Exception):
    """The source cannot be read, or is no key set. The text is for the server's log."""


def reader(place: str) -> Read:
    """Reads the bytes at a path or URL; raises JwksError when it cannot.

    A URL is read with the certificates that this machine trusts, without a proxy, and redirects are not
    followed: they may lead to a place that nobody chose.
    """
    if "://" in place:
        return lambda: _read_url(place)
    return lambda: asyncio.to_thread(_read_file, Path(place))


class Jwks:
    """The keys in force.

    Args:
        read: gives a key set; raises JwksError.
        refresh_seconds: how old the keys may become while the source answers.
        retry_seconds: reads for keys that are not known, or after one that failed, are this far apart.
        max_age_seconds: keys whose source has not answered for so long are no longer trusted.
        monotonic: seconds.
    """

    def __init__(
        self,
        read: Read,
        *,
        refresh_seconds: float,
        retry_seconds: float,
        max_age_seconds: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._refresh_seconds = refresh_seconds
        self._retry_seconds = retry_seconds
        self._max_age_seconds = max_age_seconds
        self._monotonic = monotonic
        self._keys: dict[str, jwt.PyJWK] = {}
        self._read_at = float("-inf")
        self._asked_at = float("-inf")
        self._reading: asyncio.Task[bool] | None = None
        self._loop: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read once, whether that succeeds or not, and go on reading."""
        await self.refresh()
        self._loop = asyncio.create_task(self._keep_reading(), name="read keys")

    async def close(self) -> None:
        """Stop reading."""
        tasks = [task for task in (self._loop, self._reading) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def key(self, kid: str) -> jwt.PyJWK | None:
        """The key of that id; read for it at once, unless that was done a moment ago."""
        found = self._known(kid)
        if found is None and (self._reading or self._since(self._asked_at) >= self._retry_seconds):
            await self.refresh()
            found = self._known(kid)
        return found

    async def refresh(self) -> bool:
        """Read now, once for all who ask meanwhile; False if it failed, and the keys stay as they are."""
        if self._reading is None:
            self._asked_at = self._monotonic()
            self._reading = asyncio.create_task(self._take(), name="read keys once")
            self._reading.add_done_callback(self._forget)
        return await asyncio.shield(self._reading)

    def _forget(self, task: asyncio.Task[bool]) -> None:
        del task
        self._reading = None

    async def _take(self) -> bool:
        try:
            keys = keys_of(await self._read())
        except JwksError as error:
            _log.warning("the keys of JWTs were not read; the last known stay in force: %s", error)
            return False
        if keys.keys() != self._keys.keys():
            _log.info("the keys of JWTs have changed", extra={"kids": sorted(keys)})
        self._keys, self._read_at = keys, self._monotonic()
        return True

    def _known(self, kid: str) -> jwt.PyJWK | None:
        if self._keys and self._since(self._read_at) > self._max_age_seconds:
            _log.error("the keys of JWTs are too old: their source has not answered for too long")
            self._keys = {}
        return self._keys.get(kid)

    def _since(self, moment: float) -> float:
        return self._monotonic() - moment

    async def _keep_reading(self) -> None:
        fresh = self._keys != {}
        while True:
            await asyncio.sleep(
                self._refresh_seconds if fresh else min(self._refresh_seconds, self._retry_seconds)
            )
            try:
                fresh = await self.refresh()
            except Exception:  # whatever it was, the next read may succeed
                _log.exception("the keys of JWTs could not be read")
                fresh = False


def keys_of(content: bytes) -> dict[str, jwt.PyJWK]:
    """The keys of a set that verify RS256, ES256 or EdDSA, by kid. An empty set has none: all are withdrawn.

    What is no such key (another type, for encryption, private, too short, without a kid) is left out.

    Raises:
        JwksError: if it is no key set, or two of its keys have one kid: which is meant nobody can tell.
    """
    if len(content) > MAX_SET_BYTES:
        raise JwksError(f"it has more than {MAX_SET_BYTES} bytes")
    try:
        members = json.loads(content, object_pairs_hook=unique_names)["keys"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise JwksError("it is no JSON Web Key Set") from error
    if not isinstance(members, list) or len(members) > MAX_KEYS:
        raise JwksError(f"`keys` must be a list of at most {MAX_KEYS}")
    keys: dict[str, jwt.PyJWK] = {}
    for index, member in enumerate(members):
        try:
            kid, key = _key(member)
        except ValueError as error:
            _log.warning("key %d of the set is left out: %s", index, error)
            continue
        if kid in keys:
            raise JwksError(f"two keys have the kid {kid[:40]!a}")
        keys[kid] = key
    return keys


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different (`object_pairs_hook`); ValueError otherwise."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _key(member: Any) -> tuple[str, jwt.PyJWK]:
    """Raises ValueError, which quotes nothing of the key: it may be a private one."""
    if not isinstance(member, dict):
        raise ValueError("it is no object")
    kid, kind, curve = member.get("kid"), member.get("kty"), member.get("crv", "")
    if not isinstance(kid, str) or not 1 <= len(kid) <= MAX_KID_CHARACTERS:
        raise ValueError(f"it has no kid of 1 to {MAX_KID_CHARACTERS} characters")
    if not isinstance(kind, str) or not isinstance(curve, str) or (kind, curve) not in ALGORITHMS:
        raise ValueError("its type is not RSA, EC on P-256, or Ed25519")
    algorithm = ALGORITHMS[kind, curve]
    if member.get("alg", algorithm) != algorithm:
        raise ValueError(f"its alg is not {algorithm}")
    if member.get("use", "sig") != "sig" or "verify" not in member.get("key_ops", ["verify"]):
        raise ValueError("it is not for signatures")
    if "d" in member or "k" in member:
        raise ValueError("it is a private key, which does not belong here: change it, it is known now")
    try:
        key = jwt.PyJWK(member, algorithm)
    except (jwt.PyJWTError, ValueError, TypeError) as error:
        raise ValueError("its numbers are no key") from error
    if kind == "RSA" and not RSA_BITS[0] <= key.key.key_size <= RSA_BITS[1]:
        raise ValueError(f"it has {key.key.key_size} bits; RSA needs {RSA_BITS[0]} to {RSA_BITS[1]}")
    return kid, key


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_SET_BYTES + 1)
    except OSError as error:
        raise JwksError(f"{path} cannot be read: {error.strerror}") from error


async def _read_url(url: str) -> bytes:
    content = b""
    try:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(asyncio.timeout(READ_SECONDS))
            verify = ssl.create_default_context() if url.startswith("https") else False
            client = httpx.AsyncClient(trust_env=False, verify=verify, timeout=READ_SECONDS)
            await stack.enter_async_context(client)
            response = await stack.enter_async_context(client.stream("GET", url))
            if response.status_code != httpx.codes.OK:
                raise JwksError(f"the URL answers with status {response.status_code}")
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > MAX_SET_BYTES:
                    break
    except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError) as error:
        raise JwksError(f"the URL does not answer: {type(error).__name__}") from error
    return content
