"""A real gRPC and HTTP server on free ports, on fakes; imported by the tests of the transports."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.trace import Tracer

from agentloop.v1 import (
    feedback_pb2_grpc,
    gpu_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    log_pb2_grpc,
    model_pb2_grpc,
)
from grpc_server.adapters.traced import traced_engine, traced_spool
from grpc_server.admission import Admission
from grpc_server.audit import Audit
from grpc_server.domain.ports import LogReader
from grpc_server.domain.types import Caller, Scope
from grpc_server.handover import Handover
from grpc_server.inference import Inference
from grpc_server.metrics import Metrics
from grpc_server.settings import Settings
from grpc_server.tracing import silent
from grpc_server.transports import Running, listen
from tests.fakes import FakeAuthenticator, FakeEngine, FakeLogReader, FakeLogStore, FakeRoutes, FakeSpool

TOKENS = {
    "al_admin": Caller("k-admin", "admin", frozenset({Scope.ADMIN})),
    "al_infer": Caller("k-infer", "billing", frozenset({Scope.INFER})),
    "al_feedback": Caller("k-feedback", "reviewers", frozenset({Scope.FEEDBACK})),
    "al_read": Caller("k-read", "dashboard", frozenset({Scope.MODELS_READ})),
    "al_write": Caller("k-write", "rollout", frozenset({Scope.MODELS_WRITE})),
}


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


@dataclass
class Bench:
    """Parts, and stubs on the server that runs them."""

    engine: FakeEngine = field(default_factory=FakeEngine)
    spool: FakeSpool = field(default_factory=FakeSpool)
    routes: FakeRoutes = field(default_factory=FakeRoutes)
    store: FakeLogStore = field(default_factory=FakeLogStore)
    reader: LogReader | None = None
    authenticator: Any = field(default_factory=lambda: FakeAuthenticator(dict(TOKENS)))
    metrics: Metrics = field(default_factory=Metrics)
    settings: dict[str, Any] = field(default_factory=dict)
    queue_size: int = 64
    running: Running | None = None
    folder: Path = Path()
    audit: Any = None
    handover: Any = None
    inference: Any = None
    tracer: Tracer | None = None
    listeners: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    channel: Any = None
    chat_stub: Any = None
    feedback_stub: Any = None
    model_stub: Any = None
    log_stub: Any = None
    gpu_stub: Any = None

    @contextlib.asynccontextmanager
    async def run(self, state_dir: Path) -> AsyncIterator[Bench]:
        self.folder = state_dir
        settings = Settings(
            **{
                "state_dir": state_dir,
                "grpc_address": "127.0.0.1:0",
                "http_address": "127.0.0.1:0",
                "grace_seconds": 0.2,
                **self.settings,
            }
        )
        tracer = self.tracer or silent()
        spool = traced_spool(self.spool, tracer)
        inference = self.inference = Inference(
            traced_engine(self.engine, tracer),
            spool,
            self.routes,
            self.metrics,
            admission=Admission(self.engine.parallel, queue_size=self.queue_size, tracer=tracer),
            default_deadline_seconds=settings.default_deadline_seconds,
        )
        self.audit = Audit(self.store)
        routed = {target.model_version for route in self.routes.all() for target in route.targets}
        self.handover = Handover(
            self.engine, inference, lambda: routed, self.audit, mode=settings.gpu_handover, drain_seconds=0.05
        )
        self.listeners = contextlib.AsyncExitStack()
        async with self.listeners:
            self.running = await self.listeners.enter_async_context(
                listen(
                    settings,
                    inference=inference,
                    engine=self.engine,
                    spool=spool,
                    reader=self.reader or FakeLogReader(self.store),
                    routes=self.routes,
                    authenticator=self.authenticator,
                    audit=self.audit,
                    handover=self.handover,
                    check_store=self.store.check,
                    metrics=self.metrics,
                    tracer=tracer,
                )
            )
            await self.listeners.enter_async_context(self.handover.running())
            async with grpc.aio.insecure_channel(self.running.grpc_address) as channel:
                self.ask_through(channel)
                yield self

    def ask_through(self, channel: grpc.aio.Channel) -> Bench:
        """Make the stubs."""
        self.channel = channel
        self.chat_stub = inference_pb2_grpc.InferenceServiceStub(channel)
        self.feedback_stub = feedback_pb2_grpc.FeedbackServiceStub(channel)
        self.log_stub = log_pb2_grpc.LogServiceStub(channel)
        self.model_stub = model_pb2_grpc.ModelServiceStub(channel)
        self.gpu_stub = gpu_pb2_grpc.GpuServiceStub(channel)
        return self

    async def close_listeners(self) -> None:
        """Shut down as at SIGTERM, while the caller's channel stays open."""
        await self.listeners.aclose()

    async def chat(
        self, request: inference_pb2.ChatRequest | None = None, token: str = "al_infer", **options: Any
    ) -> list[inference_pb2.ChatResponse]:
        call = self.chat_stub.Chat(request or hello(), metadata=bearer(token), **options)
        return [event async for event in call]

    async def until_ended(self, count: int = 1) -> None:
        """Until that many inferences have their end in the spool."""
        await until(lambda: len(self.spool.ends) >= count)


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Return when it is so; TimeoutError if it is not within `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - it may change in the server's threads
            await asyncio.sleep(0.005)


def hello(text: str = "Hi", **fields: Any) -> inference_pb2.ChatRequest:
    message = inference_pb2.Message(role=inference_pb2.ROLE_USER, content=text)
    return inference_pb2.ChatRequest(messages=[message], **fields)


async def rest_of(call: Any) -> list[Any]:
    """What a stream still brings."""
    events = []
    while event := await call.read():  # its end is false
        events.append(event)
    return events


async def status_of(call: Any) -> grpc.aio.AioRpcError:
    """The error that a unary call, or the reading of a stream, ends with."""
    try:
        if hasattr(call, "read"):
            await rest_of(call)
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call did not fail")
