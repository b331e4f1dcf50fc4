"""Health as it is watched, also next to one who watches and does not read."""

from __future__ import annotations

import asyncio
import struct
import time
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.integration.grpc_bench import Bench, status_of

STATUS = health_pb2.HealthCheckResponse
WATCH = "/grpc.health.v1.Health/Watch"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One of HTTP/2's (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def header(name: str, value: str) -> bytes:
    """A literal header field that is not indexed (RFC 7541, section 6.2.2)."""
    return b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in (name, value))


async def watch_without_reading(address: str) -> asyncio.StreamWriter:
    """Ask to watch, and allow the server to send nothing: a flow-control window of 0."""
    host, port = address.rsplit(":", 1)
    _, writer = await asyncio.open_connection(host, int(port))
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": WATCH,
        ":authority": address,
        "content-type": "application/grpc",
        "te": "trailers",
    }
    initial_window_size = struct.pack(">HI", 4, 0)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, initial_window_size))
    writer.write(frame(1, 4, 1, b"".join(header(name, value) for name, value in fields.items())))
    writer.write(frame(0, 1, 1, b"\0" * 5))  # an empty message, and the end
    await writer.drain()
    return writer


async def test_one_who_watches_and_does_not_read_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpc_server.transports.WATCH_SECONDS", 0.01)
    async with Bench().run(tmp_path) as bench:
        assert bench.running is not None
        silent = await watch_without_reading(bench.running.grpc_address)
        stub = health_pb2_grpc.HealthStub(bench.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == STATUS.SERVING
        await asyncio.sleep(0.2)  # the other one's first answer is on its way, and stays there
        for down, status in ((True, STATUS.NOT_SERVING), (False, STATUS.SERVING)):
            bench.engine.down = down
            assert (await asyncio.wait_for(watch.read(), 5)).status == status
        began = time.monotonic()
        closing = asyncio.create_task(bench.close_listeners())
        assert (await asyncio.wait_for(watch.read(), 5)).status == STATUS.NOT_SERVING
        await asyncio.wait_for(closing, 10)
        assert time.monotonic() - began < 5
        silent.close()


async def test_a_service_that_there_is_not_is_watched_as_unknown(tmp_path: Path) -> None:
    async with Bench().run(tmp_path) as bench:
        stub = health_pb2_grpc.HealthStub(bench.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"))
        assert (await watch.read()).status == STATUS.SERVICE_UNKNOWN
        error = await status_of(stub.Check(health_pb2.HealthCheckRequest(service="nobody")))
        assert error.details() == "there is no service 'nobody'"
        watch.cancel()
