"""What the servicers make of callers who are gone, which gRPC tells in more than one way."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import grpc
import pytest
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from agentloop.v1 import feedback_pb2, inference_pb2
from grpc_server.cancellation import CallerGone
from grpc_server.domain.types import Caller, Feedback, Scope, Status
from grpc_server.inference import Inference
from grpc_server.interceptors import auth
from grpc_server.metrics import Metrics
from grpc_server.servicers import reader
from grpc_server.servicers.feedback import FeedbackServicer
from grpc_server.servicers.inference import InferenceServicer
from grpc_server.servicers.reader import Reader
from tests.fakes import FakeEngine, FakeRoutes, FakeSpool

MESSAGE = inference_pb2.Message(role=inference_pb2.ROLE_USER, content="Hi")


@pytest.fixture(autouse=True)
def caller() -> None:
    auth._caller.set(Caller("key", "billing", frozenset({Scope.INFER, Scope.FEEDBACK})))


class Gone:
    """The context of a call whose caller went away before its event number `at`."""

    def __init__(self, error: Exception, at: int) -> None:
        self.error, self.at = error, at
        self.written = 0

    def time_remaining(self) -> float | None:
        return None

    def invocation_metadata(self) -> None:
        return None

    async def write(self, response: Any) -> None:
        if self.written == self.at:
            raise self.error
        self.written += 1


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize(
    "error",
    [
        grpc.aio.UsageError("RPC already finished."),
        grpc.aio.InternalError("the completion queue shut down"),
        cygrpc.ExecuteBatchError("Failed grpc_call_start_batch: 10"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_caller_who_vanishes_during_a_write_is_logged_as_cancelled(error: Exception, at: int) -> None:
    engine, spool, metrics = FakeEngine(), FakeSpool(), Metrics()
    servicer = InferenceServicer(Inference(engine, spool, FakeRoutes(), metrics))
    context: Any = Gone(error, at)
    with pytest.raises(asyncio.CancelledError):
        await servicer.Chat(inference_pb2.ChatRequest(messages=[MESSAGE]), context)
    assert [end.status for end in spool.ends] == [Status.CANCELLED]
    assert b'status="cancelled"' in metrics.text()
    assert engine.running == 0


async def answered(behaviour: Any) -> tuple[list[bytes], grpc.aio.AioRpcError]:
    """What a caller of `behaviour` gets over a connection, and how that ends."""
    method = grpc.unary_stream_rpc_method_handler(behaviour)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test", {"Stream": method})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    seen = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(20):
        as_it_is: Any = None
        try:
            async for response in channel.unary_stream("/test/Stream", as_it_is, as_it_is)(b""):
                seen.append(response)
        except grpc.aio.AioRpcError as error:
            await server.stop(0)
            return seen, error
    raise AssertionError("the stream ended well")


async def test_a_deadline_that_passes_while_the_first_response_is_written_is_told() -> None:
    async def behaviour(request: bytes, context: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        with Reader(context, 30) as one:
            asyncio.get_running_loop().call_soon(task.cancel)  # the write waits for gRPC's thread meanwhile
            try:
                await one.write(b"first")
            except asyncio.CancelledError:
                task.uncancel()
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "too late")

    seen, error = await answered(behaviour)
    assert seen == [b"first"]
    assert (error.code(), error.details()) == (grpc.StatusCode.DEADLINE_EXCEEDED, "too late")


async def test_a_first_response_that_nobody_takes_does_not_hold_a_cancelled_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stuck:
        async def write(self, response: Any) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr(reader, "HEAD_SECONDS", 0.01)
    context: Any = Stuck()

    async def write() -> None:
        with Reader(context, 30) as one:
            await one.write(b"first")

    writing = asyncio.create_task(write())
    await asyncio.sleep(0.01)
    writing.cancel()
    with pytest.raises(CallerGone):
        await writing


async def test_feedback_that_was_taken_is_counted_though_its_caller_has_gone() -> None:
    counted: list[Feedback] = []
    spool = FakeSpool()
    spool.hold = asyncio.Event()
    servicer = FeedbackServicer(spool, logged=counted.append)
    request = feedback_pb2.SubmitRequest(inference_id=str(uuid.uuid4()), boolean=True)
    context: Any = None
    submitting = asyncio.create_task(servicer.Submit(request, context))
    await asyncio.sleep(0)
    submitting.cancel()
    await asyncio.sleep(0)
    spool.hold.set()
    with pytest.raises(asyncio.CancelledError):
        await submitting
    assert spool.feedback == counted
    assert len(counted) == 1
