"""JWTs over the wire: keys by URL, a server that takes them beside API tokens."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import pytest

from agentloop.v1 import model_pb2
from grpc_server.adapters import jwks
from grpc_server.adapters.jwks import JwksError, keys_of, reader
from grpc_server.bootstrap import service
from grpc_server.domain.errors import Unauthenticated
from grpc_server.settings import Settings
from tests.fakes import FakeEngine, FakeLogReader, FakeLogStore, FakeRoutes, FakeSpool, FakeTokenStore
from tests.integration.grpc_bench import Bench, bearer, hello, status_of
from tests.jwts import AUDIENCE, ISSUER, key_set, token


class Publisher(ThreadingHTTPServer):
    """Answers each GET with `status`, `headers` and `content`; waits for `hold` before its content."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.content = key_set("ES256")
        self.status = 200
        self.more: dict[str, str] = {}
        self.hold = threading.Event()
        self.hold.set()
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/keys"


class Answer(BaseHTTPRequestHandler):
    server: Publisher

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(self.server.status)
        for name, value in self.server.more.items():
            self.send_header(name, value)
        self.end_headers()
        self.server.hold.wait(30)
        with contextlib.suppress(OSError):
            self.wfile.write(self.server.content)

    def log_message(self, format: str, *args: object) -> None:
        """Not on the tests' terminal."""


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    with Publisher() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.hold.set()
        server.shutdown()
        thread.join()


async def test_a_url_gives_its_keys(publisher: Publisher) -> None:
    assert list(keys_of(await reader(publisher.url)())) == ["ES256"]


async def test_a_redirect_is_not_followed(publisher: Publisher) -> None:
    publisher.status, publisher.more = 302, {"Location": "/elsewhere"}
    with pytest.raises(JwksError, match="status 302"):
        await reader(publisher.url)()
    assert publisher.asked == ["/keys"]


async def test_a_proxy_of_the_environment_is_not_asked(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert await reader(publisher.url)()


async def test_a_source_without_end_is_cut_off(publisher: Publisher) -> None:
    publisher.content = b" " * (8 << 20)
    content = await reader(publisher.url)()
    assert jwks.MAX_SET_BYTES < len(content) < 1 << 20
    with pytest.raises(JwksError, match="more than"):
        keys_of(content)


async def test_a_source_that_hangs_is_given_up(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwks, "READ_SECONDS", 0.05)
    publisher.hold.clear()
    with pytest.raises(JwksError, match="does not answer"):
        await reader(publisher.url)()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/keys", "https://127.0.0.1:9/keys", "https://a b/"])
async def test_a_source_that_is_not_there_is_an_error(url: str) -> None:
    with pytest.raises(JwksError, match="does not answer"):
        await reader(url)()


def settings(folder: Path, **more: object) -> Settings:
    values: dict[str, object] = {
        "state_dir": folder,
        "grpc_address": "127.0.0.1:0",
        "http_address": "127.0.0.1:0",
        "grace_seconds": 0.2,
        "jwt_issuer": ISSUER,
        "jwt_audience": AUDIENCE,
    }
    return Settings(**{**values, **more})  # type: ignore[arg-type]


class Store(FakeLogStore, FakeTokenStore):
    """Both stores that a server has."""

    def __init__(self) -> None:
        FakeTokenStore.__init__(self)
        FakeLogStore.__init__(self)


async def test_a_server_takes_jwts_of_a_url_through_a_rotation_and_an_outage(
    tmp_path: Path, publisher: Publisher
) -> None:
    spool = FakeSpool()
    made = settings(tmp_path, jwks=publisher.url, jwks_refresh_seconds=0.02)
    running = service(
        made, store=Store(), engine=FakeEngine(), spool=spool, routes=FakeRoutes(), reader=FakeLogReader()
    )
    async with running as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        bench = Bench().ask_through(channel)
        assert await bench.chat(token=token("ES256"))
        refused = await status_of(bench.chat_stub.Chat(hello(), metadata=bearer(token("EdDSA"))))
        assert (refused.code(), refused.details()) == (
            grpc.StatusCode.UNAUTHENTICATED,
            str(Unauthenticated()),
        )
        publisher.content = key_set("EdDSA")
        asked = len(publisher.asked)
        async with asyncio.timeout(20):
            while len(publisher.asked) < asked + 2:  # noqa: ASYNC110 - it changes in a thread
                await asyncio.sleep(0.005)
        assert await bench.chat(token=token("EdDSA"))
        assert (await status_of(bench.chat_stub.Chat(hello(), metadata=bearer(token("ES256"))))).code() is (
            grpc.StatusCode.UNAUTHENTICATED
        )
        publisher.status = 503
        assert await bench.chat(token=token("EdDSA"))
        denied = await status_of(
            bench.model_stub.ListModels(model_pb2.ListModelsRequest(), metadata=bearer(token("EdDSA")))
        )
        assert denied.code() is grpc.StatusCode.PERMISSION_DENIED
    assert {(start.caller, start.key_id[:4]) for start in spool.starts} == {("billing", "jwt_")}


async def test_without_keys_set_a_jwt_is_as_unknown_as_any_text(tmp_path: Path) -> None:
    running = service(
        Settings(state_dir=tmp_path, grpc_address="127.0.0.1:0", http_address="127.0.0.1:0"),
        store=Store(),
        engine=FakeEngine(),
        spool=FakeSpool(),
        routes=FakeRoutes(),
        reader=FakeLogReader(),
    )
    async with running as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        refused = await status_of(
            Bench().ask_through(channel).chat_stub.Chat(hello(), metadata=bearer(token()))
        )
    assert refused.code() is grpc.StatusCode.UNAUTHENTICATED
