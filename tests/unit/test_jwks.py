"""The keys of JWTs: which are taken, how long they are kept, and how often their source is asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import RSAAlgorithm

from grpc_server.adapters import jwks
from grpc_server.adapters.jwks import Jwks, JwksError, keys_of, reader
from tests.fakes import FakeClock
from tests.jwts import key_set, private_key, public_jwk


class Source:
    """A key set that changes, fails, or hangs."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.down = False
        self.reads = 0
        self.hold: asyncio.Event | None = None

    async def read(self) -> bytes:
        self.reads += 1
        if self.hold is not None:
            await self.hold.wait()
        if self.down:
            raise JwksError("the source is down")
        return self.content


class Setup:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.source = Source(key_set("ES256"))
        self.keys = Jwks(
            self.source.read,
            refresh_seconds=3600,
            retry_seconds=10,
            max_age_seconds=100,
            monotonic=self.clock.monotonic,
        )


@pytest.fixture
async def setup() -> AsyncIterator[Setup]:
    made = Setup()
    await made.keys.start()
    yield made
    await made.keys.close()


async def test_a_key_is_found_by_its_id_without_another_read(setup: Setup) -> None:
    assert await setup.keys.key("ES256") is not None
    assert setup.source.reads == 1


async def test_a_rotated_key_is_read_as_soon_as_a_token_names_it(setup: Setup) -> None:
    setup.source.content = key_set("ES256", "EdDSA")
    setup.clock.advance(10)
    assert await setup.keys.key("EdDSA") is not None
    assert setup.source.reads == 2


async def test_a_withdrawn_key_is_gone_with_the_next_read(setup: Setup) -> None:
    setup.source.content = key_set("EdDSA")
    await setup.keys.refresh()
    assert await setup.keys.key("ES256") is None
    setup.source.content = key_set()
    await setup.keys.refresh()
    assert await setup.keys.key("EdDSA") is None


async def test_unknown_keys_make_it_read_once_in_so_many_seconds_however_many_come(setup: Setup) -> None:
    for second in range(100):
        for number in range(20):
            assert await setup.keys.key(f"unknown {second} {number}") is None
        setup.clock.advance(1)
    assert setup.source.reads <= 11


async def test_all_who_come_during_a_read_share_it(setup: Setup) -> None:
    setup.clock.advance(10)
    setup.source.hold = asyncio.Event()
    asked = [asyncio.create_task(setup.keys.key("EdDSA")) for _ in range(50)]
    await asyncio.sleep(0)
    setup.source.content = key_set("EdDSA")
    setup.source.hold.set()
    assert None not in await asyncio.gather(*asked)
    assert setup.source.reads == 2


async def test_who_asks_and_goes_away_does_not_end_the_read_of_the_others(setup: Setup) -> None:
    setup.clock.advance(10)
    setup.source.hold = asyncio.Event()
    first, second = (asyncio.create_task(setup.keys.key("EdDSA")) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    setup.source.content = key_set("EdDSA")
    setup.source.hold.set()
    assert await second is not None


async def test_the_keys_stay_while_their_source_is_down_but_not_for_ever(setup: Setup) -> None:
    setup.source.down = True
    setup.clock.advance(100)
    await setup.keys.refresh()
    assert await setup.keys.key("ES256") is not None
    setup.clock.advance(1)
    assert await setup.keys.key("ES256") is None
    setup.source.down = False
    setup.clock.advance(10)
    assert await setup.keys.key("ES256") is not None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b'{"keys": {}}',
        b'{"keys": [], "keys": []}',
        b"[" * 100_000,
        b" " * (jwks.MAX_SET_BYTES + 1),
        json.dumps({"keys": [{}] * (jwks.MAX_KEYS + 1)}).encode(),
        key_set(public_jwk("ES256", "a"), public_jwk("EdDSA", "a")),
    ],
)
async def test_what_is_no_key_set_or_has_one_kid_twice_leaves_the_keys_in_force(
    setup: Setup, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    setup.source.content = content
    assert not await setup.keys.refresh()
    assert await setup.keys.key("ES256") is not None
    assert "the last known stay in force" in caplog.text


async def test_a_start_without_the_source_takes_nobody_and_learns_later() -> None:
    made = Setup()
    made.source.down = True
    await made.keys.start()
    assert await made.keys.key("ES256") is None
    made.source.down = False
    made.clock.advance(10)
    assert await made.keys.key("ES256") is not None
    await made.keys.close()


async def test_keys_are_read_again_by_themselves_even_after_an_unexpected_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = Source(key_set("ES256"))
    keys = Jwks(source.read, refresh_seconds=0.001, retry_seconds=0.001, max_age_seconds=100)
    source.content = None  # type: ignore[assignment] # len() of it is a TypeError
    with pytest.raises(TypeError):
        await keys.start()
    source.content = key_set("ES256")
    await keys.start()
    source.content = None  # type: ignore[assignment]
    reads = source.reads
    async with asyncio.timeout(10):
        while source.reads < reads + 3:  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0.001)
    await keys.close()
    assert "could not be read" in caplog.text
    assert await keys.key("ES256") is not None


def weak_rsa() -> dict[str, Any]:
    key = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    return {**RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": "weak"}


def private() -> dict[str, Any]:
    return {**RSAAlgorithm.to_jwk(private_key("RS256"), as_dict=True), "kid": "private"}


LEFT_OUT: dict[str, Any] = {
    "no object": 7,
    "no kid": {key: value for key, value in public_jwk("ES256").items() if key != "kid"},
    "an empty kid": public_jwk("ES256", ""),
    "a kid that is a number": {**public_jwk("ES256"), "kid": 7},
    "a long kid": public_jwk("ES256", "x" * 257),
    "a secret": {"kty": "oct", "k": "AAAA", "kid": "x", "alg": "HS256"},
    "another curve": {**public_jwk("ES256"), "crv": "P-521"},
    "a curve that is a list": {**public_jwk("ES256"), "crv": ["P-256"]},
    "another alg": public_jwk("RS256", alg="HS256"),
    "RSA for PSS": public_jwk("RS256", alg="PS256"),
    "encryption": public_jwk("RS256", use="enc"),
    "signing only": public_jwk("RS256", key_ops=["sign"]),
    "a point off the curve": {**public_jwk("ES256"), "x": "AAAA"},
    "not base64": {**public_jwk("EdDSA"), "x": "!!!"},
    "a number for a number": {**public_jwk("RS256"), "n": 7},
    "a private key": private(),
    "1024 bits": weak_rsa(),
}


@pytest.mark.parametrize("name", sorted(LEFT_OUT))
def test_what_does_not_verify_signatures_is_left_out_and_the_others_serve(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    assert list(keys_of(key_set(LEFT_OUT[name], "EdDSA"))) == ["EdDSA"]
    assert "key 0 of the set is left out" in caplog.text


def test_a_key_may_say_what_it_is_for() -> None:
    assert keys_of(key_set(public_jwk("RS256", alg="RS256", use="sig", key_ops=["verify"])))
    assert {key.algorithm_name for key in keys_of(key_set("RS256", "ES256", "EdDSA")).values()} == {
        "RS256",
        "ES256",
        "EdDSA",
    }


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(["kty", "kid", "crv", "x", "y", "n", "e", "alg", "use", "key_ops"])


@given(members=st.lists(st.dictionaries(names, json_values | st.sampled_from(["EC", "RSA", "OKP", "P-256"]))))
def test_a_set_of_anything_gives_keys_or_one_error(members: list[dict[str, Any]]) -> None:
    with contextlib.suppress(JwksError):
        keys_of(json.dumps({"keys": members}).encode())


async def test_a_file_is_read_and_one_that_is_not_there_says_so(tmp_path: Path) -> None:
    path = tmp_path / "keys é.json"
    with pytest.raises(JwksError, match="No such file"):
        await reader(str(path))()
    path.write_bytes(key_set("ES256"))
    assert keys_of(await reader(str(path))())
