"""Refusals over the wire, read by the client: fields, reasons, waits; never by their text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agentloop import AsyncClient, Client, errors
from agentloop.types import Sampling
from grpc_server.domain.errors import EngineUnavailable
from tests.fakes import FakeEngine, FakeSpool
from tests.integration.grpc_bench import Bench


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with Bench().run(tmp_path) as running:
        yield running


def client(bench: Bench, token: str = "al_infer") -> AsyncClient:
    assert bench.running is not None
    return AsyncClient(bench.running.grpc_address, token)


async def test_a_wrong_field_is_told_by_its_path_to_both_clients(bench: Bench) -> None:
    async with client(bench) as caller:
        with pytest.raises(errors.InvalidArgument) as wrong:
            await caller.ask("Hi", sampling=Sampling(top_p=2))
    assert [violation.field for violation in wrong.value.field_violations] == ["sampling.top_p"]
    assert wrong.value.reason == "INVALID_ARGUMENT"
    assert wrong.value.retry_after_s is None

    def ask() -> errors.InvalidArgument:
        assert bench.running is not None
        with (
            Client(bench.running.grpc_address, "al_infer") as plain,
            pytest.raises(errors.InvalidArgument) as caught,
        ):
            plain.ask("Hi", sampling=Sampling(top_p=2))
        return caught.value

    again = await asyncio.to_thread(ask)
    assert again.field_violations == wrong.value.field_violations


async def test_a_token_that_is_not_valid_and_a_scope_that_is_missing_have_reasons(bench: Bench) -> None:
    for token, kind, reason in (
        ("al_unknown", errors.Unauthenticated, "UNAUTHENTICATED"),
        ("al_read", errors.PermissionDenied, "PERMISSION_DENIED"),
    ):
        async with client(bench, token) as caller:
            with pytest.raises(kind) as refused:
                await caller.ask("Hi")
        assert refused.value.reason == reason


async def test_bytes_that_are_no_message_and_methods_that_are_not_offered_have_reasons(bench: Bench) -> None:
    from tests.integration.grpc_bench import bearer, status_of

    call = bench.channel.unary_stream("/agentloop.v1.InferenceService/Chat")(
        b"\xff\xff", metadata=bearer("al_infer")
    )
    assert errors.from_grpc(await status_of(call)).reason == "INVALID_ARGUMENT"
    listing = bench.channel.unary_unary("/grpc.health.v1.Health/List")(b"")
    assert errors.from_grpc(await status_of(listing)).reason == "UNIMPLEMENTED"


async def test_a_full_spool_says_whose_quota_it_is_and_when_to_come_back(tmp_path: Path) -> None:
    async with Bench(spool=FakeSpool(full=True)).run(tmp_path) as bench, client(bench) as caller:
        with pytest.raises(errors.ResourceExhausted) as refused:
            await caller.ask("Hi", timeout_s=4)  # less than the wait that it is told: no second try
    assert refused.value.reason == "SPOOL_FULL"
    assert refused.value.quota_subject == "server"
    assert refused.value.retry_after_s == 5.0


async def test_a_client_that_is_told_to_wait_waits_and_is_answered(tmp_path: Path) -> None:
    spool = FakeSpool(full=True)
    spool.retry_after_seconds = 0.05
    async with Bench(spool=spool).run(tmp_path) as bench, client(bench) as caller:
        asking = asyncio.create_task(caller.ask("Hi"))
        await asyncio.sleep(0.02)
        spool.full = False
        assert (await asking).text == "Hello, world!"


async def test_an_engine_that_is_down_has_its_own_reason(tmp_path: Path) -> None:
    engine = FakeEngine(fail=EngineUnavailable("the engine is down", retry_after_seconds=7))
    async with Bench(engine).run(tmp_path) as bench, client(bench) as caller:
        with pytest.raises(errors.Unavailable) as refused:
            await caller.ask("Hi")
    assert (refused.value.reason, refused.value.retry_after_s) == ("ENGINE_UNAVAILABLE", 7.0)
    assert refused.value.inference_id
