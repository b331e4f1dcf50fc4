"""The GPU's handover over real gRPC; on the real engine, whose processes end and are started, too.

There is no GPU here: what is freed and taken again is the processor's memory, by the same acts.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import httpx
import psutil
import pytest

from agentloop import AsyncClient, Client
from agentloop.errors import NotFound, retry_after_s
from agentloop.v1 import gpu_pb2 as pb
from agentloop.v1 import model_pb2
from grpc_server import bootstrap
from grpc_server.adapters.postgres import PostgresStore
from grpc_server.adapters.postgres_leases import PostgresLeases
from grpc_server.domain.types import KeptLease
from grpc_server.settings import Settings
from grpc_server.transports import Running
from tests.fakes import BASE, FakeAuthenticator
from tests.integration.conftest_engine import ROOT, base_gguf
from tests.integration.conftest_log import dsn, postgres, store  # noqa: F401
from tests.integration.grpc_bench import TOKENS, Bench, bearer, hello, status_of

READ, WRITE = bearer("al_read"), bearer("al_write")
HOLDS_OUT = """
import os, pathlib, sys, time
from training import lease
lease.end_when_over()
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(600)
"""


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with Bench(settings={"gpu_handover": "drain"}).run(tmp_path) as running:
        yield running


async def lent(bench: Bench, holder: str = "finetune") -> pb.GpuLease:
    answer: pb.LeaseGpuResponse = await bench.gpu_stub.LeaseGpu(
        pb.LeaseGpuRequest(holder=holder), metadata=WRITE
    )
    return answer.lease


def waits(error: grpc.aio.AioRpcError) -> float:
    """What RetryInfo says, in seconds."""
    return retry_after_s(error) or 0.0


async def test_while_the_gpu_is_lent_callers_are_told_when_to_ask_again_and_health_says_so(
    bench: Bench,
) -> None:
    lease = await lent(bench)
    assert (lease.holder, lease.lease_seconds) == ("finetune", 30)
    assert 29 < lease.expires_in_seconds <= 30
    error = await status_of(bench.chat_stub.Chat(hello(), metadata=bearer("al_infer")))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert str(error.details()).startswith("the GPU is lent to finetune, for 21600 s more at most")
    assert 1 <= waits(error) <= 30
    assert bench.spool.records == []
    load = model_pb2.LoadModelRequest(name=BASE)
    refused = await status_of(bench.model_stub.LoadModel(load, metadata=WRITE))
    assert refused.code() is grpc.StatusCode.UNAVAILABLE
    async with httpx.AsyncClient(trust_env=False) as client:
        ready = await client.get(f"http://{bench.running.http_address}/readyz")  # type: ignore[union-attr]
        assert ready.status_code == 503
        assert "the GPU is lent to finetune" in ready.json()["engine"]["detail"]
        metrics = (await client.get(f"http://{bench.running.http_address}/metrics")).text  # type: ignore[union-attr]
    assert 'agentloop_gpu_handover{state="leased"} 1.0' in metrics
    assert "agentloop_gpu_lease_max_seconds 21600.0" in metrics
    asked = pb.RenewGpuLeaseRequest(lease_id=lease.id)
    assert (await bench.gpu_stub.RenewGpuLease(asked, metadata=WRITE)).lease.id == lease.id
    release = pb.ReleaseGpuLeaseRequest(lease_id=lease.id)
    assert (await bench.gpu_stub.ReleaseGpuLease(release, metadata=WRITE)).changed
    assert len(await bench.chat()) > 1
    assert not (await bench.gpu_stub.ReleaseGpuLease(release, metadata=WRITE)).changed
    assert 'agentloop_gpu_leases_total{ended="released"} 1.0' in bench.metrics.text().decode()


async def test_a_second_holder_is_refused_with_who_has_the_gpu(bench: Bench) -> None:
    await lent(bench)
    second = pb.LeaseGpuRequest(holder="another")
    error = await status_of(bench.gpu_stub.LeaseGpu(second, metadata=WRITE))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "lent to finetune" in str(error.details())
    assert 1 <= waits(error) <= 30


@pytest.mark.parametrize("holder", ["", "a\0b", "a\nb", "x" * 129])
async def test_a_holder_without_a_printable_name_is_refused(bench: Bench, holder: str) -> None:
    error = await status_of(bench.gpu_stub.LeaseGpu(pb.LeaseGpuRequest(holder=holder), metadata=WRITE))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(error.details()).startswith("holder ")


async def test_an_id_that_is_none_is_refused_and_one_of_nobody_is_over(bench: Bench) -> None:
    for method, request in (
        (bench.gpu_stub.RenewGpuLease, pb.RenewGpuLeaseRequest),
        (bench.gpu_stub.ReleaseGpuLease, pb.ReleaseGpuLeaseRequest),
    ):
        error = await status_of(method(request(lease_id="no\0id"), metadata=WRITE))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == "lease_id has 5 characters, and is no UUID; give the one that LeaseGpu gave"
    unknown = pb.RenewGpuLeaseRequest(lease_id=str(uuid4()))
    assert (await status_of(bench.gpu_stub.RenewGpuLease(unknown, metadata=WRITE))).code() is (
        grpc.StatusCode.NOT_FOUND
    )


async def test_a_server_that_keeps_its_gpu_says_how_to_change_that(tmp_path: Path) -> None:
    async with Bench().run(tmp_path) as bench:
        error = await status_of(bench.gpu_stub.LeaseGpu(pb.LeaseGpuRequest(holder="x"), metadata=WRITE))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "AGENTLOOP_GPU_HANDOVER is off" in str(error.details())
        shown = await bench.gpu_stub.GetGpuHandover(pb.GetGpuHandoverRequest(), metadata=READ)
        assert (shown.state, shown.mode, shown.HasField("lease")) == (pb.HANDOVER_STATE_SERVING, "off", False)


async def test_both_clients_take_renew_show_and_release_the_gpu(bench: Bench) -> None:
    address = bench.running.grpc_address  # type: ignore[union-attr]
    async with AsyncClient(address, "al_admin") as client:
        lease = await client.lease_gpu("finetune")
        assert (await client.renew_gpu_lease(lease.id)).id == lease.id
        shown = await client.gpu_handover()
        assert (shown.state, shown.mode) == ("leased", "drain")
        assert shown.lease is not None
        assert shown.lease.holder == "finetune"
        assert await client.release_gpu_lease(lease.id)

    def ask() -> None:
        with Client(address, "al_admin") as client:
            lease = client.lease_gpu("finetune")
            assert client.renew_gpu_lease(lease.id).remaining_s > 1000
            assert client.release_gpu_lease(lease.id)
            assert client.gpu_handover().lease is None
            with pytest.raises(NotFound):
                client.renew_gpu_lease(lease.id)

    await asyncio.to_thread(ask)


async def test_a_lease_outlives_the_process_that_gave_it(store: PostgresStore) -> None:  # noqa: F811
    leases, other = PostgresLeases(store, "gpu-1"), PostgresLeases(store, "gpu\0-2")
    first, second = KeptLease(uuid4(), "fine\0tune", 20.0, 500.0), KeptLease(uuid4(), "b", -5.0, 50.0)
    assert await leases.find() is None
    await leases.keep(first)
    await other.keep(second)
    found = await leases.find()
    assert found is not None
    assert (found.id, found.holder) == (first.id, first.holder)
    assert 15 < found.expires_in_seconds <= 20
    assert 495 < found.remaining_seconds <= 500
    found = await other.find()
    assert found is not None
    assert found.expires_in_seconds < 0
    await leases.keep(second)  # in place of the first
    await leases.forget(first.id)
    assert await leases.find() is not None
    await leases.forget(second.id)
    assert (await leases.find(), await other.find() is None) == (None, False)


@asynccontextmanager
async def served(folder: Path, dsn: str, **more: Any) -> AsyncIterator[Running]:  # noqa: F811
    """A whole server on a real database and the real engine."""
    settings = Settings(
        **{
            "state_dir": folder,
            "database_url": dsn,
            "base_gguf": base_gguf(),
            "grpc_address": "127.0.0.1:0",
            "http_address": "127.0.0.1:0",
            "context_tokens": 1024,
            "parallel": 1,
            "redaction": "off",
            "gpu_drain_seconds": 5,
            **more,
        }
    )
    async with bootstrap.service(settings, authenticator=FakeAuthenticator(dict(TOKENS))) as running:
        yield running


def engines() -> list[psutil.Process]:
    """The engine's processes: each holds one model in memory."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "grpc_server.adapters.embedded_child" in child.cmdline()]


@pytest.mark.soak
@pytest.mark.timeout(600)
async def test_a_killed_holder_and_its_training_are_gone_when_the_real_engine_has_its_model_back(
    tmp_path: Path,
    dsn: str,  # noqa: F811
) -> None:
    async with (
        served(tmp_path, dsn, gpu_handover="drain", gpu_lease_seconds=3) as running,
        AsyncClient(running.grpc_address, "al_admin") as client,
    ):
        before = engines()
        assert len(before) == 1
        pid_file = tmp_path / "pid"
        holder = await asyncio.to_thread(
            subprocess.Popen,
            [
                *(sys.executable, "-m", "training", "with-gpu", "--"),
                *(sys.executable, "-c", HOLDS_OUT, str(pid_file)),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "AGENTLOOP_SERVER": running.grpc_address,
                "AGENTLOOP_TOKEN": "al_admin",
                "PYTHONPATH": str(ROOT),
            },
        )
        try:
            async with asyncio.timeout(240):
                while not (pid_file.is_file() and pid_file.read_text()):  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.05)
            assert (await client.gpu_handover()).state == "leased"
            assert (engines(), before[0].is_running()) == ([], False)
            training = psutil.Process(int(pid_file.read_text()))
            await asyncio.sleep(0.1)
            os.kill(holder.pid, signal.SIGKILL)
            async with asyncio.timeout(240):
                while (await client.gpu_handover()).state == "leased":  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
                assert not training.is_running() or training.status() == psutil.STATUS_ZOMBIE
                while (await client.gpu_handover()).state != "serving":  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        finally:
            holder.kill()
            holder.wait()
        assert len(engines()) == 1
        assert (await client.ask("Hi")).completed.output_tokens > 0


@pytest.mark.soak
async def test_a_shrunk_real_engine_answers_what_fits_and_all_of_it_when_it_has_grown_again(
    tmp_path: Path,
    dsn: str,  # noqa: F811
) -> None:
    long = " ".join(["word"] * 400)
    async with (
        served(
            tmp_path,
            dsn,
            gpu_handover="shrink",
            gpu_small_context_tokens=256,
            gpu_lease_seconds=600,  # nobody renews it here
        ) as running,
        AsyncClient(running.grpc_address, "al_admin") as client,
    ):
        (before,) = engines()
        lease = await client.lease_gpu("finetune")
        (small,) = engines()
        assert small.pid != before.pid
        async with asyncio.timeout(60):  # while it shrank it was not
            while await client.health() != "SERVING":  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        assert (await client.ask("Hi")).completed.output_tokens > 0
        with pytest.raises(Exception, match="the context holds 256; shorten it"):
            await client.ask(long)
        assert await client.release_gpu_lease(lease.id)
        (after,) = engines()
        assert after.pid not in (before.pid, small.pid)
        assert (await client.ask(long)).completed.output_tokens > 0
