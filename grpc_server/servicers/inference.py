"""InferenceService: a request to the domain, its events to the stream."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import grpc

from agentloop.v1 import inference_pb2 as pb
from agentloop.v1 import inference_pb2_grpc as rpc
from grpc_server.domain.errors import Exhausted, InvalidArgument
from grpc_server.domain.types import (
    ChatEvent,
    ChatRequest,
    FinishReason,
    Sampling,
    Started,
    TextDelta,
    ToolCall,
    ToolChoice,
)
from grpc_server.inference import Inference
from grpc_server.interceptors.auth import caller
from grpc_server.json_text import json_schema
from grpc_server.priority import priority_of
from grpc_server.servicers import messages
from grpc_server.servicers.reader import Reader

_TOOL_CHOICES = {
    pb.TOOL_CHOICE_UNSPECIFIED: ToolChoice.AUTO,
    pb.TOOL_CHOICE_AUTO: ToolChoice.AUTO,
    pb.TOOL_CHOICE_NONE: ToolChoice.NONE,
    pb.TOOL_CHOICE_REQUIRED: ToolChoice.REQUIRED,
}
_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
}

LARGE_BYTES = 8192
UNREAD_SECONDS = 30.0


class InferenceServicer(rpc.InferenceServiceServicer):
    """Chat, through the pipeline."""

    def __init__(self, inference: Inference, *, unread_seconds: float = UNREAD_SECONDS) -> None:
        self._inference = inference
        self._unread_seconds = unread_seconds

    async def Chat(  # type: ignore[override]  # noqa: N802 - gRPC's name
        self, request: pb.ChatRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Stream one answer."""
        if request.ByteSize() < LARGE_BYTES:
            asked = domain_request(request)
        else:  # in a thread, as it may take long enough for other streams to notice
            asked = await asyncio.to_thread(domain_request, request)
        priority = priority_of(context.invocation_metadata())
        with Reader(context, self._unread_seconds) as reader:

            async def emit(event: ChatEvent) -> None:
                await reader.write(_response(event))

            try:
                await self._inference.chat(
                    caller(), asked, emit, seconds=context.time_remaining(), priority=priority
                )
            except asyncio.CancelledError:
                if not reader.stopped:
                    raise
                raise Exhausted(f"no part of the answer was read for {self._unread_seconds:g} s") from None


def domain_request(request: pb.ChatRequest) -> ChatRequest:
    """The request, its ranges unchecked. Raises InvalidArgument for what no domain value can be."""
    if request.tool_choice not in _TOOL_CHOICES:
        raise InvalidArgument(
            f"tool_choice is {request.tool_choice}; it must be one of {', '.join(pb.ToolChoice.keys())}",
            "tool_choice",
        )
    schema = None
    if request.HasField("response_format"):
        schema = json_schema("response_format.json_schema", request.response_format.json_schema)
    return ChatRequest(
        messages=tuple(messages.message(f"messages[{i}]", value) for i, value in enumerate(request.messages)),
        alias=request.alias or "default",
        model_version=request.model_version,
        tools=messages.tools(request.tools),
        tool_choice=_TOOL_CHOICES[request.tool_choice],
        sampling=_sampling(request.sampling),
        response_schema=schema,
        session_id=request.session_id,
    )


Value = TypeVar("Value")


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


def _response(event: ChatEvent) -> pb.ChatResponse:
    if isinstance(event, Started):
        return pb.ChatResponse(
            started=pb.Started(inference_id=str(event.inference_id), model_version=event.model_version)
        )
    if isinstance(event, TextDelta):
        return pb.ChatResponse(text_delta=pb.TextDelta(text=event.text))
    if isinstance(event, ToolCall):
        return pb.ChatResponse(tool_call=messages.tool_call(event))
    usage, timings = event.usage, event.timings
    return pb.ChatResponse(
        completed=pb.Completed(
            finish_reason=_FINISH_REASONS[event.finish_reason],
            usage=pb.Usage(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens),
            timings=pb.Timings(
                queue_ms=timings.queue_ms,
                time_to_first_token_ms=timings.ttft_ms or 0.0,
                total_ms=timings.total_ms,
            ),
        )
    )
