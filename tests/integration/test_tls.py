"""TLS on both ports: who gets in, and how certificates change under a server that runs."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from agentloop import AsyncClient
from agentloop.errors import ConfigurationError
from agentloop.v1 import model_pb2
from grpc_server import tls
from grpc_server.domain.errors import Precondition
from grpc_server.tls import Certificates
from tests.certificates import Authority, Pair
from tests.fakes import FakeEngine
from tests.integration.grpc_bench import Bench, bearer, hello, rest_of, status_of

OURS = Authority("ours")
CALLERS = Authority("callers")
STRANGERS = Authority("strangers")
SERVER = OURS.sign("server")
CALLER = CALLERS.sign("billing")


class Place:
    """The files of a server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.certificate, self.key = SERVER.write(folder, "server")
        self.ca = folder / "callers.pem"
        self.ca.write_bytes(CALLERS.pem)

    def write(self, pair: Pair) -> None:
        pair.write(self.folder, "server")

    def settings(self, *, mutual: bool = False) -> dict[str, Any]:
        found = {"tls_cert_file": self.certificate, "tls_key_file": self.key}
        return {**found, "tls_client_ca_file": self.ca} if mutual else found

    def certificates(self, *, mutual: bool = False) -> Certificates:
        return Certificates(self.certificate, self.key, self.ca if mutual else None)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "RELOAD_SECONDS", 0.01)


def channel(bench: Bench, pair: Pair | None = None, ca: bytes = OURS.pem) -> grpc.aio.Channel:
    assert bench.running is not None
    key, certificate = (pair.key, pair.certificate) if pair else (None, None)
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
    return grpc.aio.secure_channel(bench.running.grpc_address, credentials, options)


async def grpc_answers(bench: Bench, pair: Pair | None = None, ca: bytes = OURS.pem) -> bool:
    async with channel(bench, pair, ca) as made:
        call = (
            Bench()
            .ask_through(made)
            .model_stub.ListModels(model_pb2.ListModelsRequest(), metadata=bearer("al_read"))
        )
        try:
            await call
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            return False
        return True


async def http_answers(bench: Bench, pair: Pair | None = None, ca: bytes = OURS.pem) -> bool:
    assert bench.running is not None
    context = ssl.create_default_context(cadata=ca.decode())
    if pair is not None:
        paths = pair.write(bench.folder, "caller")
        context.load_cert_chain(*paths)
    try:
        async with httpx.AsyncClient(trust_env=False, verify=context) as client:
            return (await client.get(f"{bench.running.urls()['http_url']}/healthz")).status_code == 200
    except httpx.TransportError:
        return False


Answers = Callable[..., Awaitable[bool]]
both = pytest.mark.parametrize("answers", [grpc_answers, http_answers])


@pytest.fixture
async def server(place: Place, tmp_path: Path) -> AsyncIterator[Bench]:
    async with Bench(settings=place.settings()).run(tmp_path) as bench:
        yield bench


@pytest.fixture
async def mutual(place: Place, tmp_path: Path) -> AsyncIterator[Bench]:
    async with Bench(settings=place.settings(mutual=True)).run(tmp_path) as bench:
        yield bench


@both
async def test_who_trusts_the_authority_gets_an_answer_and_nobody_else(
    server: Bench, answers: Answers
) -> None:
    assert await answers(server)
    assert not await answers(server, ca=STRANGERS.pem)


async def test_plaintext_is_not_spoken_where_tls_is_set(server: Bench) -> None:
    refused = await status_of(server.chat_stub.Chat(hello(), metadata=bearer("al_infer")))
    assert refused.code() is grpc.StatusCode.UNAVAILABLE
    assert server.running is not None
    with pytest.raises(httpx.TransportError):
        async with httpx.AsyncClient(trust_env=False) as client:
            await client.get(f"http://{server.running.http_address}/healthz")


@both
async def test_with_mutual_tls_only_a_certificate_of_the_callers_authority_gets_in(
    mutual: Bench, answers: Answers
) -> None:
    assert await answers(mutual, CALLER)
    assert not await answers(mutual)
    assert not await answers(mutual, STRANGERS.sign("billing"))
    assert not await answers(mutual, OURS.sign("billing"))
    assert not await answers(mutual, CALLERS.sign("billing", timedelta(seconds=-1)))


async def test_a_certificate_alone_lets_nobody_ask(mutual: Bench) -> None:
    async with channel(mutual, CALLER) as made:
        refused = await status_of(Bench().ask_through(made).chat_stub.Chat(hello()))
    assert refused.code() is grpc.StatusCode.UNAUTHENTICATED


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0.01)


@both
async def test_a_new_certificate_serves_without_a_restart_and_a_stream_goes_on(
    place: Place, tmp_path: Path, answers: Answers
) -> None:
    hold = asyncio.Event()
    bench = Bench(FakeEngine(hold=hold, hold_at=1), settings=place.settings())
    async with bench.run(tmp_path), channel(bench) as made:
        stream = Bench().ask_through(made).chat_stub.Chat(hello(), metadata=bearer("al_infer"))
        await stream.read()
        other = Authority("next year's")
        place.write(other.sign("server"))
        await until(lambda: answers(bench, ca=other.pem))
        assert not await answers(bench, ca=OURS.pem)
        hold.set()
        assert (await rest_of(stream))[-1].WhichOneof("event") == "completed"


@both
async def test_an_authority_that_is_withdrawn_lets_nobody_in_any_more(
    place: Place, mutual: Bench, answers: Answers
) -> None:
    assert await answers(mutual, CALLER)
    place.ca.write_bytes(STRANGERS.pem)
    await until(lambda: answers(mutual, STRANGERS.sign("x")))
    assert not await answers(mutual, CALLER)


def broken(name: str) -> tuple[bytes, bytes]:
    """A certificate and a key that do not fit together."""
    new = OURS.sign("server")
    return {
        "the certificate alone is new": (new.certificate, SERVER.key),
        "the key alone is new": (SERVER.certificate, new.key),
        "half a certificate": (new.certificate[:200], new.key),
        "half a key": (new.certificate, new.key[:60]),
        "both empty": (b"", b""),
        "no PEM": (b"\0" * 100, b"\xff" * 100),
        "an encrypted key": (lambda pair: (pair.certificate, pair.key))(OURS.sign("s", password=b"hush")),
        "ended": (lambda pair: (pair.certificate, pair.key))(OURS.sign("s", timedelta(seconds=-1))),
    }[name]


BROKEN = [
    "the certificate alone is new",
    "the key alone is new",
    "half a certificate",
    "half a key",
    "both empty",
    "no PEM",
    "an encrypted key",
    "ended",
]


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_leaves_the_old_pair_in_force_and_is_logged_once(
    place: Place, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    certificates = place.certificates()
    before = certificates.context
    place.write(Pair(*broken(name)))
    for _ in range(3):
        assert not certificates.reload()
    assert certificates.context is before
    faults = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(faults) == 1
    assert "stays in force" in faults[0].getMessage()
    assert "PRIVATE" not in caplog.text
    place.write(OURS.sign("server"))
    assert certificates.reload()


@pytest.mark.parametrize("name", BROKEN)
def test_a_server_does_not_start_with_what_does_not_fit(place: Place, name: str) -> None:
    place.write(Pair(*broken(name)))
    with pytest.raises(Precondition):
        place.certificates()


def test_files_that_are_away_for_a_moment_change_nothing(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    certificates = place.certificates(mutual=True)
    for path in (place.certificate, place.key, place.ca):
        content = path.read_bytes()
        path.unlink()
        assert not certificates.reload()
        assert not certificates.reload()
        path.write_bytes(content)
        assert not certificates.reload()
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 3
    place.ca.write_bytes(b"no certificate")
    assert not certificates.reload()
    with pytest.raises(Precondition, match="do not fit together"):
        place.certificates(mutual=True)


def test_a_certificate_that_ends_soon_is_a_warning(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    place.certificates()
    place.write(OURS.sign("server", timedelta(days=3)))
    place.certificates()
    assert [r.levelname for r in caplog.records if "in force" in r.getMessage()] == ["INFO", "WARNING"]


async def test_an_unexpected_error_does_not_end_the_looking(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    certificates = place.certificates()
    calls: list[int] = []

    def breaks() -> bool:
        calls.append(1)
        raise RuntimeError("odd")

    monkeypatch.setattr(certificates, "reload", breaks)
    task = asyncio.create_task(certificates.keep_reading())
    async with asyncio.timeout(20):
        while len(calls) < 2:  # noqa: ASYNC110 - it changes in a thread
            await asyncio.sleep(0.005)
    task.cancel()
    assert "could not be looked at" in caplog.text


async def test_with_tls_other_machines_may_reach_it(place: Place, tmp_path: Path) -> None:
    settings = {**place.settings(), "grpc_address": "0.0.0.0:0", "http_address": "0.0.0.0:0"}
    async with Bench(settings=settings).run(tmp_path) as bench:
        assert bench.running is not None


async def test_the_client_shows_its_certificate(
    place: Place, mutual: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mutual.running is not None
    ca = tmp_path / "ours.pem"
    ca.write_bytes(OURS.pem)
    certificate, key = CALLER.write(tmp_path, "billing")
    monkeypatch.setenv("AGENTLOOP_CLIENT_CERT_FILE", str(certificate))
    with pytest.raises(ConfigurationError, match="need each other"):
        AsyncClient("grpcs://127.0.0.1:1", token="al_read")
    monkeypatch.setenv("AGENTLOOP_CLIENT_KEY_FILE", str(key))
    address = mutual.running.urls()["grpc_url"]
    async with AsyncClient(address, token="al_read", ca_file=ca) as client:
        assert await client.list_models()
