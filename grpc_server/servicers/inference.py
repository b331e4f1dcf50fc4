"""InferenceService: a request to the domain, its events to the stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypedDict, TypeVar

import grpc
from google.protobuf.message import Message as ProtobufMessage

from agentloop.v1 import inference_pb2 as pb
from agentloop.v1 import inference_pb2_grpc as rpc
from grpc_server.domain.errors import Exhausted, InvalidArgument
from grpc_server.domain.types import (
    ChatEvent,
    ChatRequest,
    EmbedRequest,
    FinishReason,
    GenerateRequest,
    InferenceRequest,
    JsonObject,
    Priority,
    Sampling,
    Started,
    TextDelta,
    ToolCall,
)
from grpc_server.inference import Inference
from grpc_server.interceptors.auth import caller
from grpc_server.json_text import json_schema
from grpc_server.priority import priority_of
from grpc_server.servicers import messages
from grpc_server.servicers.reader import Reader

FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
}

Context = grpc.aio.ServicerContext[Any, Any]
Request = TypeVar("Request", bound=ProtobufMessage)
Domain = TypeVar("Domain")
Value = TypeVar("Value")

LARGE_BYTES = 8192
UNREAD_SECONDS = 30.0


class InferenceServicer(rpc.InferenceServiceServicer):
    """Every call of the service, through the pipeline."""

    def __init__(self, inference: Inference, *, unread_seconds: float = UNREAD_SECONDS) -> None:
        self._inference = inference
        self._unread_seconds = unread_seconds

    async def Chat(  # type: ignore[override]  # noqa: N802 - gRPC's name
        self, request: pb.ChatRequest, context: Context
    ) -> None:
        """Stream one answer."""
        await self._stream(context, await _read(domain_request, request), _chat_response)

    async def Generate(  # type: ignore[override]  # noqa: N802 - gRPC's name
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        """Stream one continuation."""
        await self._stream(context, await _read(generate_request, request), _generate_response)

    async def _stream(
        self, context: Context, asked: InferenceRequest, response: Callable[[ChatEvent], Any]
    ) -> None:
        with Reader(context, self._unread_seconds) as reader:

            async def emit(event: ChatEvent) -> None:
                await reader.write(response(event))

            try:
                await self._inference.chat(caller(), asked, emit, **_how(context))
            except asyncio.CancelledError:
                if not reader.stopped:
                    raise
                raise Exhausted(f"no part of the answer was read for {self._unread_seconds:g} s") from None

    async def CountTokens(  # noqa: N802 - gRPC's name
        self, request: pb.CountTokensRequest, context: Context
    ) -> pb.CountTokensResponse:
        """Count what Chat or Generate would read."""
        with _inside(request.WhichOneof("request") or ""):
            asked = await _read(counted_request, request)
            tokens, version = await self._inference.count_tokens(caller(), asked, **_how(context))
        return pb.CountTokensResponse(input_tokens=tokens, model_version=version)

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:  # noqa: N802
        """One vector a text."""
        asked = EmbedRequest(tuple(request.texts), request.alias or "default", request.model_version)
        made, version = await self._inference.embed(caller(), asked, **_how(context))
        return pb.EmbedResponse(
            embeddings=[pb.Embedding(values=vector) for vector in made.vectors],
            usage=pb.Usage(input_tokens=made.input_tokens),
            model_version=version,
        )

    async def CancelInference(  # noqa: N802 - gRPC's name
        self, request: pb.CancelInferenceRequest, context: Context
    ) -> pb.CancelInferenceResponse:
        """Tell a running inference to end."""
        del context
        await self._inference.cancel(caller(), messages.uuid("inference_id", request.inference_id))
        return pb.CancelInferenceResponse()


class _How(TypedDict):
    seconds: float | None
    priority: Priority


def _how(context: Context) -> _How:
    """What the call's metadata says: until when, and how urgent."""
    return {"seconds": context.time_remaining(), "priority": priority_of(context.invocation_metadata())}


async def _read(read: Callable[[Request], Domain], request: Request) -> Domain:
    """The request as the domain has it; in a thread where that may take long enough for others to notice."""
    if request.ByteSize() < LARGE_BYTES:
        return read(request)
    return await asyncio.to_thread(read, request)


@contextmanager
def _inside(name: str) -> Iterator[None]:
    """The fields that an InvalidArgument names are those of the message `name`."""
    try:
        yield
    except InvalidArgument as error:
        if name and error.field:
            error.field = f"{name}.{error.field}"
        raise


def counted_request(request: pb.CountTokensRequest) -> InferenceRequest:
    """The request whose prompt is to be counted. Raises InvalidArgument."""
    match request.WhichOneof("request"):
        case "chat":
            return domain_request(request.chat)
        case "generate":
            return generate_request(request.generate)
        case _:
            raise InvalidArgument("request is not set; send one of chat, generate", "request")


def generate_request(request: pb.GenerateRequest) -> GenerateRequest:
    """The request, its ranges unchecked. Raises InvalidArgument for what no domain value can be."""
    return GenerateRequest(
        prompt=request.prompt,
        alias=request.alias or "default",
        model_version=request.model_version,
        sampling=_sampling(request.sampling),
        response_schema=_schema(request),
        session_id=request.session_id,
    )


def domain_request(request: pb.ChatRequest) -> ChatRequest:
    """The request, its ranges unchecked. Raises InvalidArgument for what no domain value can be."""
    return ChatRequest(
        messages=tuple(messages.message(f"messages[{i}]", value) for i, value in enumerate(request.messages)),
        alias=request.alias or "default",
        model_version=request.model_version,
        tools=messages.tools(request.tools),
        tool_choice=messages.tool_choice(request.tool_choice),
        sampling=_sampling(request.sampling),
        response_schema=_schema(request),
        session_id=request.session_id,
    )


def _schema(request: pb.ChatRequest | pb.GenerateRequest) -> JsonObject | None:
    if not request.HasField("response_format"):
        return None
    return json_schema("response_format.json_schema", request.response_format.json_schema)


def _sampling(options: pb.SamplingOptions) -> Sampling:
    default = Sampling()

    def given(name: str, otherwise: Value) -> Value:
        return getattr(options, name) if options.HasField(name) else otherwise  # type: ignore[arg-type]

    return Sampling(
        temperature=_shortest(given("temperature", default.temperature)),
        top_p=_shortest(given("top_p", default.top_p)),
        top_k=given("top_k", default.top_k),
        max_tokens=given("max_tokens", default.max_tokens),
        seed=given("seed", default.seed),
        stop=tuple(options.stop),
    )


def _shortest(value: float) -> float:
    """0.7, where the wire's 32 bits say 0.699999988079071."""
    return float(f"{value:.7g}")


def _generate_response(event: ChatEvent) -> pb.GenerateResponse:
    """As of a chat: a continuation offers no tools, so that none is called."""
    response = _chat_response(event)
    match response.WhichOneof("event"):
        case "started":
            return pb.GenerateResponse(started=response.started)
        case "text_delta":
            return pb.GenerateResponse(text_delta=response.text_delta)
        case _:
            return pb.GenerateResponse(completed=response.completed)


def _chat_response(event: ChatEvent) -> pb.ChatResponse:
    if isinstance(event, Started):
        return pb.ChatResponse(
            started=pb.Started(inference_id=str(event.inference_id), model_version=event.model_version)
        )
    if isinstance(event, TextDelta):
        return pb.ChatResponse(text_delta=pb.TextDelta(text=event.text))
    if isinstance(event, ToolCall):
        return pb.ChatResponse(tool_call=messages.tool_call(event))
    return pb.ChatResponse(
        completed=pb.Completed(
            finish_reason=FINISH_REASONS[event.finish_reason],
            usage=messages.usage_to_proto(event.usage),
            timings=messages.timings_to_proto(event.timings),
        )
    )
