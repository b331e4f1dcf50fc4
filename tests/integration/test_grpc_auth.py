"""Every RPC of the API, found in its descriptors, with every kind of token."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import agentloop.v1
from agentloop.v1 import model_pb2
from grpc_server.domain.types import Scope
from grpc_server.interceptors.auth import ADMINISTRATIVE, OPEN, SCOPES
from grpc_server.transports import SERVICES
from tests import jwts
from tests.integration.bad_credentials import BAD, Credentials, Headers, credentials_of
from tests.integration.grpc_bench import TOKENS, Bench, bearer, hello, status_of

FILES = [
    importlib.import_module(f"agentloop.v1.{module.name}").DESCRIPTOR
    for module in pkgutil.iter_modules(agentloop.v1.__path__)
    if module.name.endswith("_pb2")
]
METHODS = {
    f"/{service.full_name}/{method.name}": method
    for file in FILES
    for service in file.services_by_name.values()
    for method in service.methods
}
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
GRPC_ONLY: dict[str, Headers] = {"binary": (("authorization-bin", b"Bearer al_admin"),)}


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with Bench().run(tmp_path) as running:
        yield running


@dataclass(frozen=True, slots=True)
class Strict:
    """A server with the real authenticator, and credentials of every kind."""

    bench: Bench
    credentials: Credentials


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def strict(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Strict]:
    """One server for all who are refused: it keeps nothing of them."""
    folder = tmp_path_factory.mktemp("strict")
    async with credentials_of(folder) as made, Bench(authenticator=made.authenticator).run(folder) as bench:
        yield Strict(bench, made)


def call(bench: Bench, name: str, metadata: Any) -> Any:
    """A call of any method with an empty request."""
    method = METHODS[name]
    make = bench.channel.unary_stream if method.server_streaming else bench.channel.unary_unary
    invoke = make(
        name,
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    return invoke(GetMessageClass(method.input_type)(), metadata=metadata)


def test_every_method_of_the_api_has_its_scope_and_no_other_is_named() -> None:
    ours = {name for name in SCOPES if name.startswith("/agentloop.")}
    assert ours == set(METHODS)
    assert all(SCOPES[name] in set(Scope) for name in METHODS)
    assert {file.services_by_name[name].full_name for file in FILES for name in file.services_by_name} == set(
        SERVICES
    )
    health = health_pb2.DESCRIPTOR.services_by_name["Health"]
    assert {f"/{health.full_name}/{method.name}" for method in health.methods} == OPEN


@pytest.mark.parametrize("kind", sorted({*BAD, *GRPC_ONLY}))
@pytest.mark.asyncio(loop_scope="module")
async def test_no_method_lets_a_bad_credential_in_or_says_what_is_wrong_with_it(
    strict: Strict, kind: str
) -> None:
    bench = strict.bench
    headers = GRPC_ONLY[kind] if kind in GRPC_ONLY else BAD[kind](strict.credentials)
    for name in METHODS:
        error = await status_of(call(bench, name, headers))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED, (name, error.details())
        assert error.details() == "a valid token is needed: authorization: Bearer al_…"
    assert (bench.engine.asked, bench.spool.records, bench.routes.store.changes) == ([], [], [])
    assert bench.store.events == []


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.asyncio(loop_scope="module")
async def test_no_method_takes_a_credential_without_its_scope(strict: Strict, name: str) -> None:
    bench, scope = strict.bench, SCOPES[name]
    assert scope is not None
    for kind, text in strict.credentials.without(scope).items():
        error = await status_of(call(bench, name, bearer(text)))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED, (kind, error.details())
    assert (bench.engine.asked, bench.spool.records, bench.routes.store.changes) == ([], [], [])


@pytest.mark.asyncio(loop_scope="module")
async def test_good_credentials_of_both_kinds_get_in(strict: Strict) -> None:
    for text in (strict.credentials.in_force, jwts.token(scope="models:read")):
        await call(strict.bench, "/agentloop.v1.ModelService/ListModels", bearer(text))


@pytest.mark.parametrize("name", sorted(METHODS))
async def test_a_call_with_another_scope_is_denied_and_with_its_own_gets_further(
    bench: Bench, name: str
) -> None:
    scope = SCOPES[name]
    assert scope is not None
    for token, caller in TOKENS.items():
        try:
            error = await status_of(call(bench, name, bearer(token)))
        except AssertionError:  # an empty request that is well-formed succeeds
            assert caller.may(scope)
            continue
        denied = error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert denied is not caller.may(scope), (token, error.details())
        assert error.code() is not grpc.StatusCode.UNAUTHENTICATED
    assert bench.engine.asked == []


async def test_the_scheme_is_case_insensitive(bench: Bench) -> None:
    metadata = (("authorization", "bearer al_infer"),)
    assert [event async for event in bench.chat_stub.Chat(hello(), metadata=metadata)]


async def test_a_model_version_needs_admin(bench: Bench) -> None:
    request = hello(model_version="gemma-3-270m:base")
    error = await status_of(bench.chat_stub.Chat(request, metadata=bearer("al_infer")))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert await bench.chat(request, token="al_admin")


async def test_reflection_needs_a_token_and_tells_every_service(bench: Bench) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(bench.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    error = await status_of(stub.ServerReflectionInfo(iter([request])))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    responses = [r async for r in stub.ServerReflectionInfo(iter([request]), metadata=bearer("al_read"))]
    names = {service.name for service in responses[0].list_services_response.service}
    assert {method.rsplit("/", 1)[0].lstrip("/") for method in METHODS} <= names


async def test_an_unknown_method_is_unimplemented(bench: Bench) -> None:
    error = await status_of(bench.channel.unary_unary("/agentloop.v1.InferenceService/Guess")(b""))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_method_that_the_table_forgot_is_denied(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(SCOPES, "/agentloop.v1.ModelService/ListModels")
    error = await status_of(call(bench, "/agentloop.v1.ModelService/ListModels", bearer("al_admin")))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_neither_tokens_nor_prompts_are_logged(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    bench.engine.fail = RuntimeError("boom")
    await status_of(bench.chat_stub.Chat(hello("my secret question"), metadata=bearer("al_infer")))
    await status_of(bench.chat_stub.Chat(hello("my secret question"), metadata=bearer("al_wrong")))
    ours = "\n".join(
        f"{record.getMessage()} {record.exc_text or ''} {vars(record)}"
        for record in caplog.records
        if record.name.startswith("grpc_server")
    )
    assert "unexpected error" in ours
    assert "al_infer" not in ours
    assert "al_wrong" not in ours
    assert "my secret question" not in ours


async def test_a_denied_administrative_call_is_written_down_and_others_are_not(bench: Bench) -> None:
    for name, method in METHODS.items():
        if SCOPES[name] is not Scope.INFER and not method.client_streaming:
            await status_of(call(bench, name, bearer("al_infer")))
    await bench.audit.flush()
    administrative = {name for name, scope in SCOPES.items() if scope in ADMINISTRATIVE}
    assert {(kind, actor, subject) for kind, actor, subject, _ in bench.store.events} == {
        ("denied", "billing", name) for name in administrative
    }


async def test_models_are_installed_and_removed_with_their_events_or_not_at_all(
    bench: Bench, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF of a test")
    request = model_pb2.InstallModelRequest(
        name="m:1", path=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest()
    )
    bench.store.down = True
    refused = await status_of(bench.model_stub.InstallModel(request, metadata=bearer("al_write")))
    assert refused.code() is grpc.StatusCode.UNAVAILABLE
    assert "m:1" not in bench.engine.models
    bench.store.down = False
    await bench.model_stub.InstallModel(request, metadata=bearer("al_write"))
    remove = model_pb2.RemoveModelRequest(name="m:1")
    await bench.model_stub.RemoveModel(remove, metadata=bearer("al_write"))
    told = [(kind, actor, subject, detail["outcome"]) for kind, actor, subject, detail in bench.store.events]
    assert told == [
        (kind, "rollout", "m:1", outcome)
        for kind in ("model_install", "model_remove")
        for outcome in ("asked", "done")
    ]
