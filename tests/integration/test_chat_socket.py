"""The WebSocket: one request, the events of its answer, and an end that says why."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosedError, InvalidStatus

from grpc_server.domain.errors import EngineUnavailable
from grpc_server.domain.types import Status
from grpc_server.http import app, chat_socket
from tests.fakes import BASE, FakeEngine, FakeSpool
from tests.integration.grpc_bench import Bench

REQUEST = {"model": "default", "messages": [{"role": "user", "content": "Hi"}]}


@asynccontextmanager
async def connected(bench: Bench, token: str = "al_infer", **headers: str) -> AsyncIterator[ClientConnection]:
    assert bench.running is not None
    more = {"authorization": f"Bearer {token}"} if token else {}
    url = f"ws://{bench.running.http_address}/v1/chat/ws"
    async with connect(url, additional_headers=more | headers, proxy=None) as socket:
        yield socket


async def events(socket: ClientConnection) -> list[dict[str, Any]]:
    """What still comes; `close_code` says how it ended."""
    told = []
    with suppress(ConnectionClosedError):
        async for message in socket:
            told.append(json.loads(message))
    return told


async def test_a_request_brings_its_events_and_the_socket_closes(tmp_path: Path) -> None:
    async with Bench().run(tmp_path) as bench, connected(bench) as socket:
        await socket.send(json.dumps(REQUEST))
        told = await events(socket)
        assert socket.close_code == 1000
    assert [event["type"] for event in told] == ["started", *["text_delta"] * 4, "completed"]
    assert told[0] == {
        "type": "started",
        "inference_id": str(bench.spool.starts[0].id),
        "model_version": BASE,
    }
    assert "".join(event["text"] for event in told[1:-1]) == "Hello, world!"
    assert told[-1]["finish_reason"] == "stop"
    assert told[-1]["usage"]["output_tokens"] == 4
    assert told[-1]["timings"]["total_ms"] >= 0


async def test_a_tool_call_is_an_event(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "now"}}
    engine = FakeEngine(['{"name": "now", "arguments": {}}'])
    async with Bench(engine).run(tmp_path) as bench, connected(bench) as socket:
        await socket.send(json.dumps({**REQUEST, "tools": [tool]}))
        told = await events(socket)
    assert told[1] == {"type": "tool_call", "name": "now", "arguments": {}}


async def test_a_browser_says_first_who_it_is(tmp_path: Path) -> None:
    async with Bench().run(tmp_path) as bench:
        async with connected(bench, "") as socket:
            await socket.send(json.dumps({"authorization": "Bearer al_infer", "deadline_seconds": 9}))
            await socket.send(json.dumps(REQUEST))
            assert (await events(socket))[-1]["type"] == "completed"
        assert bench.spool.starts[0].caller == "billing"


OPENINGS: list[dict[str, Any]] = [
    REQUEST,
    {},
    {"authorization": "Bearer al_nobody"},
    {"authorization": "al_infer"},
    {"authorization": "Bearer al_feedback"},
    {"authorization": "Bearer al_infer", "deadline_seconds": 0},
    {"authorization": "Bearer al_infer", "deadline_seconds": "soon"},
]


async def test_a_browser_that_does_not_gets_nothing(tmp_path: Path) -> None:
    async with Bench().run(tmp_path) as bench:
        for opening in OPENINGS:
            async with connected(bench, "") as socket:
                await socket.send(json.dumps(opening))
                told = await events(socket)
                assert [event["type"] for event in told] == ["error"]
                assert told[0]["error"]["status"] in (400, 401, 403)
                assert socket.close_code == 1008
    assert bench.spool.records == []


async def test_a_bad_credential_in_the_header_is_refused_before_the_socket_opens(tmp_path: Path) -> None:
    async with Bench().run(tmp_path) as bench:
        for token, seconds, status in (
            ("al_nobody", "9", 401),
            ("al_feedback", "9", 403),
            ("al_infer", "0", 400),
        ):
            with pytest.raises(InvalidStatus) as caught:
                async with connected(bench, token, **{"x-deadline-seconds": seconds}):
                    pass
            assert caught.value.response.status_code == status
            assert b'"error"' in (caught.value.response.body or b"")


async def test_a_request_that_is_wrong_ends_the_socket_with_a_sentence(tmp_path: Path) -> None:
    wrong: list[str | bytes] = ["", "{", "[]", b"{}", '{"model": "default"}', json.dumps({**REQUEST, "n": 2})]
    async with Bench().run(tmp_path) as bench:
        for message in wrong:
            async with connected(bench) as socket:
                await socket.send(message)
                told = await events(socket)
                assert (told[-1]["error"]["status"], socket.close_code) == (400, 1008)
    assert bench.spool.records == []


async def test_a_message_that_is_too_large_is_not_taken(tmp_path: Path) -> None:
    async with Bench().run(tmp_path) as bench, connected(bench) as socket:
        with suppress(ConnectionClosedError):  # which may come before all is sent
            await socket.send(" " * (4 * 1024 * 1024 + 1))
        assert await events(socket) == []
        assert socket.close_code == 1009


async def test_silence_ends_the_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_socket, "MESSAGE_SECONDS", 0.05)
    async with Bench().run(tmp_path) as bench:
        for token in ("", "al_infer"):
            async with connected(bench, token) as socket:
                told = await events(socket)
                assert told[0]["error"]["status"] == 504


async def test_leaving_before_the_request_leaves_nothing(tmp_path: Path) -> None:
    async with Bench().run(tmp_path) as bench:
        for token in ("", "al_infer"):
            async with connected(bench, token):
                pass
    assert bench.spool.records == []


@pytest.mark.parametrize("politely", [True, False])
async def test_a_caller_who_leaves_stops_the_engine_and_is_logged_as_cancelled(
    tmp_path: Path, politely: bool
) -> None:
    engine = FakeEngine(hold=asyncio.Event(), hold_at=2)
    async with Bench(engine).run(tmp_path) as bench, connected(bench) as socket:
        await socket.send(json.dumps(REQUEST))
        await asyncio.wait_for(engine.streaming.wait(), 10)
        await socket.send("what is said meanwhile is not read")
        if politely:
            await socket.close()
        else:
            socket.transport.abort()
        await bench.until_ended()
        assert engine.running == 0
    assert bench.spool.ends[0].status is Status.CANCELLED


@pytest.mark.parametrize(
    ("bench", "status", "code"),
    [
        (Bench(spool=FakeSpool(full=True)), 429, 1013),
        (Bench(FakeEngine(fail=EngineUnavailable("down"), hold_at=1)), 503, 1013),
        (Bench(FakeEngine(fail=KeyError("secret"), hold_at=1)), 500, 1011),
    ],
    ids=["spool full", "engine down", "unexpected"],
)
async def test_a_failure_is_the_last_event(tmp_path: Path, bench: Bench, status: int, code: int) -> None:
    async with bench.run(tmp_path), connected(bench) as socket:
        await socket.send(json.dumps(REQUEST))
        told = await events(socket)
        assert (told[-1]["type"], told[-1]["error"]["status"], socket.close_code) == ("error", status, code)
        assert "secret" not in json.dumps(told)


@pytest.mark.parametrize(
    ("deadline", "unread_seconds", "status"), [("1", 30, Status.DEADLINE), ("60", 0.2, Status.CANCELLED)]
)
async def test_a_reader_that_takes_nothing_holds_up_the_engine_for_a_while_and_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deadline: str, unread_seconds: float, status: Status
) -> None:
    monkeypatch.setattr(chat_socket, "FAREWELL_SECONDS", 0.05)
    engine = FakeEngine(["x" * 100_000] * 200)
    made = Bench(engine, settings={"unread_seconds": unread_seconds})
    async with made.run(tmp_path) as bench, connected(bench, **{"x-deadline-seconds": deadline}) as socket:
        socket.transport.pause_reading()
        await socket.send(json.dumps({**REQUEST, "max_tokens": 8192}))
        await bench.until_ended()
        assert engine.running == 0
        socket.transport.abort()
    end = bench.spool.ends[0]
    assert end.status is status
    assert len(end.answer["content"]) < 15_000_000


async def test_sockets_beyond_the_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MAX_OPEN", 1)
    async with Bench().run(tmp_path) as bench, connected(bench):
        with pytest.raises(InvalidStatus) as caught:
            async with connected(bench):
                pass
    assert caught.value.response.status_code == 429


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("", {"x-deadline-seconds": "1" * 9000}, 431),
        ("", {f"x-{number}": "" for number in range(150)}, 431),
        ("?" + "a" * 9000, {}, 414),
    ],
)
async def test_a_handshake_that_is_too_large_is_answered(
    tmp_path: Path, path: str, headers: dict[str, str], status: int
) -> None:
    async with Bench().run(tmp_path) as bench:
        assert bench.running is not None
        url = f"ws://{bench.running.http_address}/v1/chat/ws{path}"
        with pytest.raises(InvalidStatus) as caught:
            await connect(url, additional_headers=headers, proxy=None, open_timeout=20)
        assert caught.value.response.status_code == status
        async with connected(bench) as socket:
            await socket.send(json.dumps(REQUEST))
            assert (await events(socket))[-1]["type"] == "completed"
