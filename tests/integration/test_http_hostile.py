"""The HTTP front against callers who mean it no good: the server lives, its memory bounded, others served."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import WebSocketRoute
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from grpc_server.domain.types import Scope, Status
from grpc_server.http import access, app
from tests import jwts
from tests.fakes import FakeEngine
from tests.integration.bad_credentials import BAD, Credentials, Headers, credentials_of
from tests.integration.grpc_bench import Bench
from tests.integration.openai_bench import HELLO, posting


async def test_a_deadline_that_is_none_is_refused(tmp_path: Path) -> None:
    body = {"model": "default", "messages": HELLO}
    async with Bench().run(tmp_path) as bench, posting(bench) as client:
        for value in ("0", "-1", "nan", "inf", "1e9", "soon", ""):
            headers = {"x-deadline-seconds": value}
            response = await client.post("/v1/chat/completions", json=body, headers=headers)
            assert (response.status_code, response.json()["error"]["param"]) == (400, "x-deadline-seconds")


async def test_a_body_that_is_no_json_object_is_refused(tmp_path: Path) -> None:
    bodies = [
        b"",
        b"{",
        b"[]",
        b"\0",
        b"\xff",
        b'{"a": NaN}',
        b"[" * 5000,
        b"1" * 5000,
        b'"' + b"\xff" * 9000,
    ]
    async with Bench().run(tmp_path) as bench, posting(bench) as client:
        for body in bodies:
            response = await client.post("/v1/chat/completions", content=body)
            assert response.status_code == 400, body[:20]
            assert response.json()["error"]["message"].startswith("the body is ")


async def test_a_body_that_is_too_large_is_refused_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "MAX_BODY_BYTES", 1000)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b" " * 500

    async with Bench().run(tmp_path) as bench, posting(bench) as client:
        for content in (b" " * 1001, pieces()):
            response = await client.post("/v1/chat/completions", content=content)
            assert (response.status_code, response.headers["connection"]) == (413, "close")


async def test_a_body_that_does_not_come_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "BODY_SECONDS", 0.05)
    never = asyncio.Event()

    async def stuck() -> AsyncIterator[bytes]:
        yield b"{"
        await never.wait()

    async with Bench().run(tmp_path) as bench, posting(bench) as client:
        call = asyncio.create_task(client.post("/v1/chat/completions", content=stuck()))
        address = bench.running.http_address.split(":") if bench.running else []
        reader, writer = await asyncio.open_connection(*address)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer al_infer\r\n"
        writer.write(head + b"content-length: 9\r\n\r\n{")
        assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
        writer.close()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)


async def test_a_head_that_does_not_come_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpc_server.http.listener.HEAD_SECONDS", 0.05)
    async with Bench().run(tmp_path) as bench:
        assert bench.running is not None
        for whole in (False, True):
            reader, writer = await asyncio.open_connection(*bench.running.http_address.split(":"))
            if whole:  # the connection is kept for another request, which is then slow
                writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
                await reader.readuntil(b"alive")
            writer.write(b"GET /heal")
            with contextlib.suppress(ConnectionResetError):
                assert b"HTTP" not in await asyncio.wait_for(reader.read(), 4)
            writer.close()


async def test_a_reader_that_takes_nothing_gives_its_place_back(tmp_path: Path) -> None:
    engine = FakeEngine(["x" * 100_000] * 200)
    body = json.dumps({"model": "default", "messages": HELLO, "stream": True, "max_tokens": 8192}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer al_infer\r\n"
    async with Bench(engine, settings={"unread_seconds": 0.2}).run(tmp_path) as bench:
        assert bench.running is not None
        _, writer = await asyncio.open_connection(*bench.running.http_address.split(":"), limit=1)
        writer.write(head + b"content-length: %d\r\n\r\n%s" % (len(body), body))
        await bench.until_ended()
        assert engine.running == 0
        writer.transport.abort()
    assert bench.spool.ends[0].status is Status.CANCELLED
    assert len(bench.spool.ends[0].answer["content"]) < 15_000_000


async def test_callers_beyond_the_limit_are_refused_and_health_still_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "MAX_OPEN", 1)
    engine = FakeEngine(hold=asyncio.Event())
    body = {"model": "default", "messages": HELLO}
    async with Bench(engine).run(tmp_path) as bench, posting(bench) as client:
        first = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        await asyncio.wait_for(engine.streaming.wait(), 10)
        assert (await client.get("/v1/models")).status_code == 429
        assert (await client.get("/healthz")).status_code == 200
        assert engine.hold is not None
        engine.hold.set()
        assert (await first).status_code == 200
        assert (await client.get("/v1/models")).status_code == 200


async def test_no_other_origin_may_read_an_answer(tmp_path: Path) -> None:
    async with Bench().run(tmp_path) as bench, posting(bench) as client:
        asked = {"origin": "https://elsewhere.example", "access-control-request-method": "POST"}
        response = await client.options("/v1/chat/completions", headers=asked)
        assert response.status_code == 405
        headers = {"origin": "https://elsewhere.example"}
        body = {"model": "default", "messages": HELLO}
        response = await client.post("/v1/chat/completions", json=body, headers=headers)
        assert not [name for name in response.headers if name.startswith("access-control")]


OPEN = {"/healthz", "/readyz", "/metrics"}


async def test_every_route_but_the_open_ones_refuses_every_bad_credential(tmp_path: Path) -> None:
    """Made from the routes that there are, so that a new one cannot be forgotten."""
    async with contextlib.AsyncExitStack() as stack:
        strict = await stack.enter_async_context(credentials_of(tmp_path))
        bench = await stack.enter_async_context(Bench(authenticator=strict.authenticator).run(tmp_path))
        client = await stack.enter_async_context(posting(bench))
        del client.headers["authorization"]
        made = app.make_app(
            None,  # type: ignore[arg-type] # only its routes are looked at
            bench.metrics,
            inference=None,  # type: ignore[arg-type]
            engine=bench.engine,
            routes=bench.routes,
            authenticator=bench.authenticator,
        )
        routes = [route for route in made.routes if getattr(route, "methods", None)]
        assert {route.path for route in routes} > OPEN  # type: ignore[attr-defined]
        for socket in [route for route in made.routes if isinstance(route, WebSocketRoute)]:
            await _refused(bench, strict, socket.path)
        for route in routes:
            path, methods = route.path, route.methods  # type: ignore[attr-defined]
            for method in methods - {"HEAD"}:
                if path in OPEN:
                    assert (await client.request(method, path)).status_code == 200
                    continue
                for why, headers_of in BAD.items():
                    headers: Any = headers_of(strict)
                    response = await client.request(method, path.replace("{name:path}", "x"), headers=headers)
                    assert response.status_code == 401, (method, path, why)
                    assert response.headers["www-authenticate"] == "Bearer"
                    assert response.json()["error"]["code"] == "invalid_api_key"
                for token in (strict.scoped[Scope.FEEDBACK], jwts.token(scope="feedback openid")):
                    headers = (("authorization", f"Bearer {token}"),)
                    response = await client.request(method, path.replace("{name:path}", "x"), headers=headers)
                    assert response.status_code == 403, (method, path, token)
    assert bench.spool.records == []


async def _refused(bench: Bench, strict: Credentials, path: str) -> None:
    """That a WebSocket does not open for a bad token; who shows none must say it in its first message."""
    assert bench.running is not None
    # A header's line beyond 8 KiB is no handshake to `websockets`: it never gets as far as a token.
    kinds = BAD.keys() - {"none", "JWT oversized"}
    bad: list[tuple[Headers, int]] = [(BAD[kind](strict), 401) for kind in sorted(kinds)]
    bad = [(headers, status) for headers, status in bad if headers[0][0] == "authorization"]
    bad.append(((("authorization", f"Bearer {strict.scoped[Scope.FEEDBACK]}"),), 403))
    bad.append(((("authorization", f"Bearer {jwts.token(scope='feedback')}"),), 403))
    for headers, status in bad:
        sent: Any = headers
        with pytest.raises(InvalidStatus) as caught:
            await connect(f"ws://{bench.running.http_address}{path}", additional_headers=sent, proxy=None)
        assert caught.value.response.status_code == status


async def test_bytes_that_are_no_request_harm_nobody(tmp_path: Path) -> None:
    draw = random.Random(7)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer al_infer\r\n"
    crafted = [
        b"\0" * 1000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000,
        b"GET /" + b"x" * 200_000,
        head + b"content-length: -1\r\n\r\n",
        head + b"content-length: 99999999999999999999999\r\n\r\n",
        head + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        head + b"transfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n",
        head.replace(b"POST /v1/chat/completions", b"GET /v1/chat/ws") + b"connection: upgrade\r\n\r\n",
        b"GET /v1/chat/ws HTTP/1.1\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n" + b"\xff" * 5000,
        b"GET /v1/models/%00%ff%0d%0ax HTTP/1.1\r\nhost: x\r\nauthorization: Bearer al_infer\r\n\r\n",
        *(draw.randbytes(draw.randrange(1, 3000)) for _ in range(20)),
        *(head + b"content-length: 50\r\n\r\n" + draw.randbytes(50) for _ in range(5)),
    ]
    async with Bench().run(tmp_path) as bench, posting(bench) as client:
        assert bench.running is not None
        for sent in crafted:
            reader, writer = await asyncio.open_connection(*bench.running.http_address.split(":"))
            with contextlib.suppress(OSError):  # the server has hung up
                writer.write(sent)
                await asyncio.wait_for(writer.drain(), 10)
                writer.write_eof()
                assert not (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 5")
            writer.close()
        assert (await client.get("/healthz")).status_code == 200
        body = {"model": "default", "messages": HELLO}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert len(bench.spool.starts) == 1
