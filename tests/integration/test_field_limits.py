"""Every field of every request has a limit, and a test of it here: the fields come from the descriptors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.timestamp_pb2 import Timestamp

from agentloop import errors
from agentloop.v1 import feedback_pb2, inference_pb2, log_pb2, model_pb2
from agentloop.v1.feedback_pb2 import SubmitRequest
from agentloop.v1.inference_pb2 import (
    CancelInferenceRequest,
    ChatRequest,
    EmbedRequest,
    GenerateRequest,
    Message,
    ResponseFormat,
    SamplingOptions,
    ToolCall,
    ToolDefinition,
)
from agentloop.v1.log_pb2 import GetInferenceRequest, ListInferencesRequest
from agentloop.v1.model_pb2 import (
    GetModelRequest,
    GetRouteRequest,
    InstallModelRequest,
    LoadModelRequest,
    RemoveModelRequest,
    Route,
    SetRouteRequest,
    Target,
    UnloadModelRequest,
)
from tests.fakes import BASE
from tests.integration.grpc_bench import Bench, bearer, status_of

FILES = (inference_pb2, log_pb2, feedback_pb2, model_pb2)
ANY = {
    "agentloop.v1.SamplingOptions.seed": "every number of 32 bits is one",
    "agentloop.v1.SubmitRequest.boolean": "both values are",
    "agentloop.v1.UnloadModelRequest.force": "both values are",
}
"""Fields whose every value is taken."""
COERCED = {"agentloop.v1.ListInferencesRequest.page_size": "tests/integration/test_grpc_log.py"}
"""Fields of which too large a value is taken for the largest, and where that is tested."""

MIB = 1024 * 1024
ODD: Any = 99  # of an enum: what no generated client can say
UUID = "018f0000-0000-7000-8000-000000000000"
USER = Message(role=inference_pb2.ROLE_USER, content="Hi")
DEEP = '{"type": "object", "a": ' + '{"a": ' * 40 + "1" + "}" * 40 + "}"


def chat(*messages: Message, **fields: Any) -> ChatRequest:
    return ChatRequest(messages=messages or [USER], **fields)


def drawn(**fields: Any) -> ChatRequest:
    return chat(sampling=SamplingOptions(**fields))


def offered(**fields: Any) -> ChatRequest:
    tool = {"name": "f", "parameters_json_schema": '{"type": "object"}'} | fields
    return chat(tools=[ToolDefinition(**tool)])


def called(*calls: ToolCall) -> ChatRequest:
    return chat(USER, Message(role=inference_pb2.ROLE_ASSISTANT, tool_calls=calls), USER)


def routed(**fields: Any) -> SetRouteRequest:
    target: dict[str, Any] = {
        "model_version": BASE,
        "role": model_pb2.TARGET_ROLE_STABLE,
        "weight": 100,
    } | fields
    return SetRouteRequest(route=Route(alias="default", revision=1, targets=[Target(**target)]))


def submitted(**fields: Any) -> SubmitRequest:
    return SubmitRequest(**({"inference_id": UUID} | fields))


def installed(**fields: Any) -> InstallModelRequest:
    return InstallModelRequest(**({"name": "m:1", "path": "/m.gguf", "sha256": "0" * 64} | fields))


LONG_ARGUMENTS = '{"a": "' + "x" * 65536 + '"}'
BEYOND: dict[str, list[tuple[Any, str]]] = {
    "ChatRequest.alias": [(chat(alias="a" * 65), "alias"), (chat(alias="A"), "alias")],
    "ChatRequest.model_version": [(chat(model_version="m:" + "1" * 127), "model_version")],
    "ChatRequest.messages": [
        (chat(*[USER] * 257), "messages"),
        (ChatRequest(), "messages"),
        (chat(Message(role=inference_pb2.ROLE_USER, content="x" * (MIB + 1))), "messages"),
    ],
    "ChatRequest.tools": [
        (
            chat(
                tools=[
                    ToolDefinition(name=f"f{i}", parameters_json_schema='{"type": "object"}')
                    for i in range(65)
                ]
            ),
            "tools",
        )
    ],
    "ChatRequest.tool_choice": [(chat(tool_choice=ODD), "tool_choice")],
    "ChatRequest.session_id": [
        (chat(session_id="s" * 129), "session_id"),
        (chat(session_id="\0"), "session_id"),
    ],
    "Message.role": [(chat(Message(role=ODD, content="Hi")), "messages[0].role")],
    "Message.content": [
        (chat(Message(role=inference_pb2.ROLE_USER)), "messages[0].content"),
        (chat(Message(role=inference_pb2.ROLE_USER, content="ä" * (MIB // 2 + 1))), "messages"),
    ],
    "Message.tool_calls": [
        (
            called(ToolCall(name="f", arguments_json="{}"), ToolCall(name="f", arguments_json="{}")),
            "messages[1].tool_calls",
        )
    ],
    "Message.tool_name": [
        (
            chat(Message(role=inference_pb2.ROLE_USER, content="Hi", tool_name="f" * 200)),
            "messages[0].tool_name",
        )
    ],
    "ToolCall.name": [
        (called(ToolCall(name="f" * 129, arguments_json="{}")), "messages[1].tool_calls[0].name")
    ],
    "ToolCall.arguments_json": [
        (called(ToolCall(name="f", arguments_json=each)), "messages[1].tool_calls[0].arguments_json")
        for each in (LONG_ARGUMENTS, "[" + "1," * 30_000 + "1]", DEEP)
    ],
    "ToolDefinition.name": [(offered(name=each), "tools[0].name") for each in ("f" * 129, "")],
    "ToolDefinition.description": [(offered(description="x" * (MIB + 1)), "messages")],
    "ToolDefinition.parameters_json_schema": [
        (offered(parameters_json_schema=each), "tools[0].parameters_json_schema")
        for each in ('{"type": "object", "description": "' + "x" * 65536 + '"}', DEEP)
    ],
    "SamplingOptions.temperature": [(drawn(temperature=2.01), "sampling.temperature")],
    "SamplingOptions.top_p": [
        (drawn(top_p=1.01), "sampling.top_p"),
        (drawn(top_p=0), "sampling.top_p"),
    ],
    "SamplingOptions.top_k": [(drawn(top_k=1001), "sampling.top_k"), (drawn(top_k=0), "sampling.top_k")],
    "SamplingOptions.max_tokens": [(drawn(max_tokens=8193), "sampling.max_tokens")],
    "SamplingOptions.stop": [
        (drawn(stop=["x"] * 9), "sampling.stop"),
        (drawn(stop=["x", "x" * 65]), "sampling.stop[1]"),
        (drawn(stop=[""]), "sampling.stop[0]"),
    ],
    "ResponseFormat.json_schema": [
        (chat(response_format=ResponseFormat(json_schema=each)), "response_format.json_schema")
        for each in ('{"description": "' + "x" * 65536 + '"}', DEEP)
    ],
    "GenerateRequest.alias": [(GenerateRequest(prompt="x", alias="a" * 65), "alias")],
    "GenerateRequest.model_version": [(GenerateRequest(prompt="x", model_version="m"), "model_version")],
    "GenerateRequest.prompt": [
        (GenerateRequest(), "prompt"),
        (GenerateRequest(prompt="x" * (MIB + 1)), "prompt"),
    ],
    "GenerateRequest.session_id": [(GenerateRequest(prompt="x", session_id="s" * 129), "session_id")],
    "EmbedRequest.alias": [(EmbedRequest(texts=["x"], alias="a" * 65), "alias")],
    "EmbedRequest.model_version": [(EmbedRequest(texts=["x"], model_version="m"), "model_version")],
    "EmbedRequest.texts": [
        (EmbedRequest(), "texts"),
        (EmbedRequest(texts=["x"] * 129), "texts"),
        (EmbedRequest(texts=["x", ""]), "texts[1]"),
        (EmbedRequest(texts=["x" * MIB, "x"]), "texts"),
    ],
    "CancelInferenceRequest.inference_id": [
        (CancelInferenceRequest(inference_id=UUID + "0"), "inference_id")
    ],
    "GetInferenceRequest.inference_id": [(GetInferenceRequest(inference_id="x" * MIB), "inference_id")],
    "ListInferencesRequest.since": [(ListInferencesRequest(since=Timestamp(seconds=2**60)), "since")],
    "ListInferencesRequest.until": [(ListInferencesRequest(until=Timestamp(seconds=-1)), "until")],
    "ListInferencesRequest.session_id": [(ListInferencesRequest(session_id="s" * 129), "session_id")],
    "ListInferencesRequest.model_version": [
        (ListInferencesRequest(model_version="m:" + "1" * 127), "model_version")
    ],
    "ListInferencesRequest.status": [(ListInferencesRequest(status=ODD), "status")],
    "ListInferencesRequest.caller": [(ListInferencesRequest(caller="c" * 129), "caller")],
    "ListInferencesRequest.page_token": [(ListInferencesRequest(page_token="A" * 65), "page_token")],
    "SubmitRequest.feedback_id": [(submitted(feedback_id="x", boolean=True), "feedback_id")],
    "SubmitRequest.inference_id": [(submitted(inference_id="", boolean=True), "inference_id")],
    "SubmitRequest.score": [(submitted(score=1.01), "score"), (submitted(score=float("nan")), "score")],
    "SubmitRequest.comment": [
        (submitted(comment="x" * 65537), "comment"),
        (submitted(comment=""), "comment"),
    ],
    "InstallModelRequest.name": [(installed(name="m:" + "1" * 127), "name")],
    "InstallModelRequest.path": [
        (installed(path="m.gguf"), "path"),
        (installed(path="/" + "x" * 4096), "path"),
    ],
    "InstallModelRequest.sha256": [(installed(sha256="0" * 65), "sha256")],
    "GetModelRequest.name": [(GetModelRequest(name="m:" + "1" * 127), "name")],
    "LoadModelRequest.name": [(LoadModelRequest(name="m:" + "1" * 127), "name")],
    "UnloadModelRequest.name": [(UnloadModelRequest(name="m:" + "1" * 127), "name")],
    "RemoveModelRequest.name": [(RemoveModelRequest(name="m:" + "1" * 127), "name")],
    "GetRouteRequest.alias": [(GetRouteRequest(alias="a" * 65), "alias")],
    "Route.alias": [(SetRouteRequest(route=Route(alias="a" * 65)), "route.alias")],
    "Route.revision": [
        (
            SetRouteRequest(route=Route(revision=2**63, targets=routed().route.targets)),
            "route.revision",
        )
    ],
    "Route.targets": [
        (SetRouteRequest(route=Route()), "route.targets"),
        (SetRouteRequest(route=Route(targets=[*routed().route.targets] * 9)), "route.targets"),
    ],
    "Target.model_version": [(routed(model_version="m"), "route.targets[0].model_version")],
    "Target.role": [(routed(role=ODD), "route.targets[0].role")],
    "Target.weight": [(routed(weight=101), "route.targets[0].weight")],
}
"""Of each field requests that it makes too large, too small or odd, and the field that is told."""
METHOD_OF = {
    method.input_type.full_name: (f"/{service.full_name}/{method.name}", method)
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


def fields_of(message: Descriptor | None, seen: set[str]) -> Iterator[FieldDescriptor]:
    """Every field of a message, and of those within it, that holds a value or several messages."""
    if message is None or message.full_name in seen:
        return
    seen.add(message.full_name)
    for field in message.fields:
        inner = field.message_type
        ours = inner is not None and inner.full_name.startswith("agentloop.")
        if not ours or field.is_repeated:
            yield field
        if ours:
            yield from fields_of(inner, seen)


def every_field() -> set[str]:
    seen: set[str] = set()
    return {
        field.full_name for _, method in METHOD_OF.values() for field in fields_of(method.input_type, seen)
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    """One server for all who are refused: it keeps nothing of them."""
    async with Bench().run(tmp_path_factory.mktemp("limits")) as running:
        yield running


def test_every_field_of_every_request_has_a_test_of_its_limit() -> None:
    limited = {f"agentloop.v1.{name}" for name in BEYOND}
    assert every_field() == limited | set(ANY) | set(COERCED)
    assert not limited & (set(ANY) | set(COERCED))


@pytest.mark.parametrize("name", sorted(BEYOND))
@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_beyond_a_fields_limit_is_refused_by_its_name(bench: Bench, name: str) -> None:
    for request, field in BEYOND[name]:
        path, method = METHOD_OF[request.DESCRIPTOR.full_name]
        make = bench.channel.unary_stream if method.server_streaming else bench.channel.unary_unary
        call = make(path, request_serializer=lambda message: message.SerializeToString())
        error = await status_of(call(request, metadata=bearer("al_admin")))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error.details()
        told = errors.from_grpc(error).field_violations
        assert [violation.field for violation in told] == [field], error.details()
    assert (bench.engine.asked, bench.engine.embedded, bench.spool.records) == ([], [], [])
