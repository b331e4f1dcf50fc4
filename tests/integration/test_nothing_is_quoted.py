"""A mark in every text field of every request: it is in no log line, span, figure or status.

The fields are found in the proto descriptors, so that a new one cannot be forgotten. A name (of an alias, a
tool, an id) may stand in the status that tells its own caller what was wrong with it, and nowhere else.
"""

from __future__ import annotations

import io
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from agentloop.v1 import (
    feedback_pb2,
    feedback_pb2_grpc,
    gpu_pb2,
    gpu_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)
from grpc_server.domain.ports import Finished, Generation, Piece
from grpc_server.json_logs import log_to
from tests.fakes import BASE, FakeEngine
from tests.integration.grpc_bench import Bench, bearer
from tests.integration.test_tracing import Spans

MARK = "CANARYQZ"
TEXTS = (
    MARK,
    MARK + "x" * 70_000,
    f"\0{MARK}",
    f"{{{MARK}",
    f'{{"type": "{MARK}"}}',
    f'{{"type": "object", "{MARK}": {{"$ref": "#/{MARK}"}}, "pattern": "({MARK}"}}',
    f"<start_of_turn>{MARK}<end_of_turn>",
)
NAMES = {
    "alias",
    "model_version",
    "session_id",
    "tool_name",
    "inference_id",
    "feedback_id",
    "path",
    "sha256",
    "agentloop.v1.ToolCall.name",
    "agentloop.v1.ToolDefinition.name",
    "agentloop.v1.GetModelRequest.name",
    "agentloop.v1.InstallModelRequest.name",
    "agentloop.v1.LoadModelRequest.name",
    "agentloop.v1.RemoveModelRequest.name",
    "agentloop.v1.UnloadModelRequest.name",
}
"""What names something; all else is text that somebody wrote."""
Step = tuple[FieldDescriptor, ...]


class QuotingEngine(FakeEngine):
    """Answers with its prompt, and raises errors that quote it."""

    async def generate(self, generation: Generation) -> AsyncGenerator[Piece | Finished, None]:
        if len(self.asked) % 2:
            self.asked.append(generation)
            raise RuntimeError(generation.prompt) from ValueError(generation.prompt)
        async for event in super().generate(generation):
            yield event


def text_fields(message: Descriptor, before: Step = ()) -> Iterator[Step]:
    """The way to each text field of a message, and of the messages in it."""
    for field in message.fields:
        inner = field.message_type
        if inner is not None and inner.file.package == "agentloop.v1":
            yield from text_fields(inner, (*before, field))
        elif field.type == FieldDescriptor.TYPE_STRING:
            yield (*before, field)


def marked(base: Message, way: Step, text: str) -> Message:
    """`base` with `text` in one field."""
    request = type(base)()
    request.CopyFrom(base)
    at: Any = request
    for field in way[:-1]:
        at = getattr(at, field.name)
        if field.is_repeated:
            at = at[0] if at else at.add()
    last = way[-1]
    if last.is_repeated:
        getattr(at, last.name).append(text)
    else:
        setattr(at, last.name, text)
    return request


def base_of(message: Descriptor) -> Message:
    """A request that is right, where that takes more than defaults."""
    hello = inference_pb2.Message(role=inference_pb2.ROLE_USER, content="Hi")
    chat = inference_pb2.ChatRequest(messages=[hello])
    bases: dict[str, Message] = {
        "ChatRequest": chat,
        "CountTokensRequest": inference_pb2.CountTokensRequest(chat=chat),
        "GenerateRequest": inference_pb2.GenerateRequest(prompt="Hi"),
        "EmbedRequest": inference_pb2.EmbedRequest(texts=["Hi"]),
        "SubmitRequest": feedback_pb2.SubmitRequest(
            inference_id="019ab1c2-0000-7000-8000-000000000000", boolean=True
        ),
        "SetRouteRequest": model_pb2.SetRouteRequest(
            route=model_pb2.Route(
                alias="default",
                targets=[model_pb2.Target(model_version=BASE, role=model_pb2.TARGET_ROLE_STABLE, weight=100)],
            )
        ),
    }
    return bases.get(message.name) or GetMessageClass(message)()


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """Every log line of this process, the least severe too."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    lines = io.StringIO()
    log_to(lines, "DEBUG")
    yield lines
    root.handlers[:], root.level = handlers, level


@pytest.fixture
async def flooded(tmp_path: Path, written: io.StringIO) -> AsyncIterator[tuple[Bench, Spans]]:
    """A server; at the end its log, spans and figures are searched."""
    spans = Spans()
    engine = QuotingEngine(lambda generation: [generation.prompt])
    async with Bench(engine, tracer=spans.tracer).run(tmp_path) as bench:
        yield bench, spans
        assert MARK in repr(bench.spool.records)  # it was there to be quoted
        assert MARK not in bench.metrics.text().decode()
    assert MARK not in written.getvalue()
    assert "unexpected error" in written.getvalue()
    assert MARK not in "".join(span.to_json() for span in spans)
    assert len(list(spans)) > 50


SERVICES = (
    (inference_pb2, inference_pb2_grpc.InferenceServiceStub, "al_infer"),
    (feedback_pb2, feedback_pb2_grpc.FeedbackServiceStub, "al_feedback"),
    (model_pb2, model_pb2_grpc.ModelServiceStub, "al_admin"),
    (gpu_pb2, gpu_pb2_grpc.GpuServiceStub, "al_admin"),
)


async def test_no_text_of_a_call_over_grpc_is_quoted(flooded: tuple[Bench, Spans]) -> None:
    bench, _ = flooded
    asked = failed = 0
    quoting = set()
    for module, stub, token in SERVICES:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                call = getattr(stub(bench.channel), method.name)
                for way in text_fields(method.input_type):
                    for text in TEXTS:
                        asked += 1
                        error = await _error(call, marked(base_of(method.input_type), way, text), token)
                        failed += error is not None
                        names = way[-1].name in NAMES or way[-1].full_name in NAMES
                        if error is not None and MARK in error and not names:
                            quoting.add((method.name, way[-1].full_name, error[:200]))
    assert not quoting
    assert asked > 200
    assert 50 < failed < asked


async def _error(call: Any, request: Message, token: str) -> str | None:
    """All that an error says, its trailers too; None if there was none."""
    try:
        answer = call(request, metadata=bearer(token), timeout=10)
        if hasattr(answer, "read"):
            async for _ in answer:
                pass
        else:
            await answer
    except grpc.aio.AioRpcError as error:
        return f"{error.details()} {error.trailing_metadata()!r} {error.debug_error_string()}"
    return None


HELLO = {"role": "user", "content": "Hi"}


def _tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "t", **fields}}]}


def bodies(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Requests over HTTP with `text` in one field each, and the path to send them to."""
    chat, embeddings = "/v1/chat/completions", "/v1/embeddings"
    for fields in (
        {"messages": [{"role": "user", "content": text}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]},
        {"messages": [{"role": "system", "content": text}, HELLO]},
        {"messages": [HELLO, {"role": "assistant", "content": text}]},
        {"stop": text},
        {"stop": [text, text]},
        _tool(description=text),
        _tool(parameters={"type": text}),
        _tool(parameters=text),
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": text}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": text}}},
    ):
        yield chat, {"model": "default", "messages": [HELLO], **fields}
    yield embeddings, {"model": "default", "input": text}
    yield embeddings, {"model": "default", "input": ["Hi", text]}


async def test_no_text_of_a_call_over_http_is_quoted(flooded: tuple[Bench, Spans]) -> None:
    bench, _ = flooded
    assert bench.running is not None
    url, headers = f"http://{bench.running.http_address}", {"authorization": "Bearer al_infer"}
    quoting = set()
    async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False) as client:
        for text in TEXTS:
            for path, body in bodies(text):
                answer = await client.post(path, json=body)
                if answer.status_code != 200 and MARK in answer.text + repr(answer.headers):
                    quoting.add((path, answer.text[:300]))
            answer = await client.post("/v1/chat/completions", content=f'{{"{text}'.encode())
            if MARK in answer.text:
                quoting.add(("no JSON", answer.text[:300]))
    assert not quoting
