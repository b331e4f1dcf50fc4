"""A server in a process of its own, before an Ollama that is played by script, and what it logs to.

The fixtures are everybody's (see tests/conftest.py): two files share one server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import psycopg
import pytest

from agentloop.v1 import inference_pb2 as pb
from agentloop.v1 import inference_pb2_grpc
from grpc_server.adapters.local_postgres import LocalPostgres
from tests.integration.grpc_bench import bearer, hello, rest_of
from tests.live_server import LiveServer
from tests.scripted_ollama import Script, ScriptedOllama

SECRET = "the caller's own words"
STORED_SECONDS = 20.0
PARALLEL = 32
UNREAD_SECONDS = 2.0


@dataclass
class Gateway:
    """A server before a scripted Ollama, what it logs to, and who may ask it."""

    server: LiveServer
    ollama: ScriptedOllama
    dsn: str
    token: str

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.dsn) as connection:
            return connection.execute(query).fetchall()

    async def statuses(self, ids: list[str]) -> list[str]:
        """Of the rows of these inferences, each of which must have exactly one, with an end."""
        named = ", ".join(f"'{one}'" for one in ids)
        query = f"SELECT id::text, status FROM inference WHERE id IN ({named}) AND status <> 'started'"
        until = time.monotonic() + STORED_SECONDS
        while len(found := await asyncio.to_thread(self.rows, query)) < len(ids):
            assert time.monotonic() < until, f"{len(found)} of {len(ids)} rows are stored"
            await asyncio.sleep(0.05)
        assert len(found) == len(ids)
        by_id = dict(found)
        return [by_id[one] for one in ids]


def database(postgres: LocalPostgres) -> str:
    """A database of its own, which goes with the session's Postgres."""
    name = f"faults_{uuid4().hex}"
    with psycopg.connect(postgres.dsn("postgres"), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE agentloop STRATEGY FILE_COPY')
    return postgres.dsn(name)


def server_before(ollama: ScriptedOllama, dsn: str, place: Path, **settings: Any) -> LiveServer:
    installed = place / "installed.gguf"  # the scripted Ollama says that it has it: nobody reads it
    installed.touch()
    return LiveServer(
        place,
        **{
            "engine": "ollama",
            "ollama_url": ollama.url,
            "database_url": dsn,
            "base_gguf": installed,
            "parallel": PARALLEL,
            "unread_seconds": UNREAD_SECONDS,
            **settings,
        },
    )


@pytest.fixture(scope="session")
def gateway(local_postgres: LocalPostgres, places: Callable[[str], Path]) -> Iterator[Gateway]:
    dsn = database(local_postgres)
    with ScriptedOllama() as ollama, server_before(ollama, dsn, places("faults")) as server:
        yield Gateway(server, ollama, dsn, server.token("infer", name="faults"))


@pytest.fixture
async def stub(gateway: Gateway) -> AsyncIterator[inference_pb2_grpc.InferenceServiceStub]:
    async with grpc.aio.insecure_channel(gateway.server.grpc_address) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


def asked(tokens: int = 8) -> pb.ChatRequest:
    return hello(SECRET, sampling=pb.SamplingOptions(max_tokens=tokens))


async def started(call: Any) -> str:
    """The id that the stream begins with."""
    return str((await call.read()).started.inference_id)


async def served(gateway: Gateway, stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    """A healthy engine's next answer arrives whole, and its row says so."""
    gateway.ollama.play(Script())
    call = stub.Chat(asked(), metadata=bearer(gateway.token), timeout=30)
    events = await rest_of(call)
    assert events[-1].HasField("completed")
    assert await gateway.statuses([events[0].started.inference_id]) == ["ok"]
