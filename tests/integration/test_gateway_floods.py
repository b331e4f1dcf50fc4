"""Hostile bytes at the gRPC port: the server lives, memory stays bounded, others are served meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import Callable, Iterator
from itertools import count

import psutil
import pytest
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from agentloop.v1 import inference_pb2_grpc
from tests.integration.conftest_gateway import (
    PARALLEL,
    UNREAD_SECONDS,
    Gateway,
    asked,
    served,
)
from tests.integration.grpc_bench import bearer, rest_of, until
from tests.integration.raw_http2 import PREFACE, RawCaller
from tests.scripted_ollama import Script

FLOOD_SECONDS = 0.5
GROWTH_BYTES = 64 << 20
"""What a flood may leave in memory: each brings some ten thousand frames."""
NOBODY = "al_nobody"


def memory(gateway: Gateway) -> int:
    """Resident bytes of the server."""
    assert gateway.server.process is not None
    return int(psutil.Process(gateway.server.process.pid).memory_info().rss)


def fuzzed(random_bytes: random.Random) -> bytes:
    """What is no HTTP/2 at all, or is so up to some point."""
    noise = random_bytes.randbytes(random_bytes.randrange(1, 4096))
    kind = random_bytes.randrange(5)
    if kind == 0:
        return noise
    if kind == 1:
        return b"GET / HTTP/1.1\r\nHost: " + noise
    if kind == 2:  # a TLS ClientHello's first bytes
        return b"\x16\x03\x01\x02\x00\x01" + noise
    settings = PREFACE + SettingsFrame(0).serialize()
    if kind == 3:
        return settings + noise
    length = random_bytes.randrange(0, 64)
    frame = length.to_bytes(3, "big") + bytes([random_bytes.randrange(12), random_bytes.randrange(256)])
    return settings + frame + random_bytes.randrange(8).to_bytes(4, "big") + random_bytes.randbytes(length)


def fuzz(address: str, seed: int, connections: int) -> None:
    host, _, port = address.rpartition(":")
    random_bytes = random.Random(seed)
    for _ in range(connections):
        with (
            socket.create_connection((host, int(port)), 10) as connection,
            contextlib.suppress(ConnectionError, TimeoutError),
        ):
            connection.sendall(fuzzed(random_bytes))
            connection.settimeout(0.002)
            connection.recv(4096)


async def test_fuzzed_bytes_harm_nobody(
    gateway: Gateway, stub: inference_pb2_grpc.InferenceServiceStub
) -> None:
    await served(gateway, stub)
    before = memory(gateway)
    seed = random.SystemRandom().randrange(2**32)
    flood = asyncio.to_thread(fuzz, gateway.server.grpc_address, seed, 400)
    await asyncio.gather(flood, served(gateway, stub))
    await served(gateway, stub)
    assert memory(gateway) - before < GROWTH_BYTES, f"seed {seed}"
    assert gateway.server.process is not None
    assert gateway.server.process.poll() is None, f"seed {seed}"


def pings(caller: RawCaller) -> Iterator[Frame]:
    for number in count():
        yield PingFrame(0, number.to_bytes(8, "big"))


def settings(caller: RawCaller) -> Iterator[Frame]:
    for number in count(1):
        yield SettingsFrame(0, settings={SettingsFrame.INITIAL_WINDOW_SIZE: number})


def resets(caller: RawCaller) -> Iterator[Frame]:
    """Calls that are taken back at once: the attack called rapid reset (CVE-2023-44487)."""
    while True:
        begin = caller.headers(NOBODY)
        yield begin
        yield RstStreamFrame(begin.stream_id, error_code=8)


def endless_headers(caller: RawCaller) -> Iterator[Frame]:
    """CONTINUATION frames without end (VU#421644)."""
    begin = caller.headers(NOBODY)
    begin.flags.discard("END_HEADERS")
    yield begin
    while True:
        # "x-a: aaa…", as a literal that is not kept
        yield ContinuationFrame(begin.stream_id, b"\x00\x03x-a\x7f\x21" + b"a" * 160)


def empty_data(caller: RawCaller) -> Iterator[Frame]:
    begin = caller.headers(NOBODY)
    yield begin
    while True:
        yield DataFrame(begin.stream_id, b"")


def window_updates(caller: RawCaller) -> Iterator[Frame]:
    begin = caller.headers(NOBODY)
    yield begin
    while True:
        yield WindowUpdateFrame(begin.stream_id, 1)


def priorities(caller: RawCaller) -> Iterator[Frame]:
    for number in count(1, 2):
        yield PriorityFrame(number % (2**31 - 1), depends_on=0, stream_weight=1)


def unfinished(caller: RawCaller) -> Iterator[Frame]:
    """Calls that begin and never go on."""
    while True:
        yield caller.headers(NOBODY)


FLOODS: dict[str, Callable[[RawCaller], Iterator[Frame]]] = {
    "pings": pings,
    "settings": settings,
    "resets": resets,
    "endless headers": endless_headers,
    "empty data": empty_data,
    "window updates": window_updates,
    "priorities": priorities,
    "unfinished calls": unfinished,
}


def flood(address: str, frames: Callable[[RawCaller], Iterator[Frame]]) -> int:
    """How many frames the server took until it ended the connection, or the time was over."""
    sent = 0
    end = time.monotonic() + FLOOD_SECONDS
    with RawCaller(address) as caller:
        caller.socket.settimeout(FLOOD_SECONDS)
        source = frames(caller)
        with contextlib.suppress(OSError):  # ended, or no longer read
            while time.monotonic() < end:
                batch = [next(source) for _ in range(100)]
                caller.send(*batch)
                sent += len(batch)
    return sent


@pytest.mark.parametrize("kind", list(FLOODS))
async def test_a_flood_of_frames_is_survived_and_others_are_served_meanwhile(
    kind: str, gateway: Gateway, stub: inference_pb2_grpc.InferenceServiceStub
) -> None:
    await served(gateway, stub)
    before = memory(gateway)
    flooding = asyncio.create_task(asyncio.to_thread(flood, gateway.server.grpc_address, FLOODS[kind]))
    answers = 0
    while not flooding.done():
        call = stub.Chat(asked(), metadata=bearer(gateway.token), timeout=30)
        assert (await rest_of(call))[-1].HasField("completed")
        answers += 1
    assert await flooding > 0
    assert answers > 0
    assert memory(gateway) - before < GROWTH_BYTES
    await served(gateway, stub)


async def test_a_ping_flood_is_ended(gateway: Gateway) -> None:
    with RawCaller(gateway.server.grpc_address) as caller:
        with contextlib.suppress(ConnectionError):
            for frame in [PingFrame(0, bytes(8)) for _ in range(1000)]:
                caller.send(frame)
        assert await asyncio.to_thread(caller.ended, 10)


async def test_calls_with_a_token_that_are_taken_back_at_once_have_an_end_each(
    gateway: Gateway, stub: inference_pb2_grpc.InferenceServiceStub
) -> None:
    gateway.ollama.play(Script(token_ms=50))
    query = "SELECT count(*) FROM inference WHERE ended_at IS NULL"
    message = asked(4096).SerializeToString()

    def take_back() -> None:
        with RawCaller(gateway.server.grpc_address) as caller:
            for _ in range(200):
                caller.send(RstStreamFrame(caller.call(gateway.token, message), error_code=8))

    await asyncio.to_thread(take_back)
    await served(gateway, stub)
    await until(lambda: gateway.rows(query) == [(0,)], 20)


async def test_callers_who_never_read_hold_no_place_for_long_and_no_memory(
    gateway: Gateway, stub: inference_pb2_grpc.InferenceServiceStub
) -> None:
    """Flow control that is never opened, on more streams than the engine has places."""
    await served(gateway, stub)
    before = memory(gateway)
    gateway.ollama.play(Script(token_ms=1))
    message = asked(8192).SerializeToString()
    with contextlib.ExitStack() as callers:
        for _ in range(4):
            caller = callers.enter_context(RawCaller(gateway.server.grpc_address, window=0))
            for _ in range(PARALLEL // 4):
                caller.call(gateway.token, message)
        await asyncio.sleep(UNREAD_SECONDS / 4)  # they are there first
        call = stub.Chat(asked(), metadata=bearer(gateway.token), timeout=UNREAD_SECONDS * 10)
        assert (await rest_of(call))[-1].HasField("completed")
        assert memory(gateway) - before < GROWTH_BYTES
        query = "SELECT count(*) FROM inference WHERE status = 'cancelled' AND total_ms >= "
        query += str(1000 * UNREAD_SECONDS)
        await until(lambda: gateway.rows(query)[0][0] >= PARALLEL, 30)
