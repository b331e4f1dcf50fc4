"""Dataclasses to protobuf messages, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from agentloop.errors import ConfigurationError, IncompleteStream
from agentloop.types import (
    Answer,
    ChatEvent,
    Completed,
    Embeddings,
    FinishReason,
    GpuHandover,
    GpuLease,
    HandoverState,
    InstallPhase,
    InstallProgress,
    JsonObject,
    Message,
    ModelDetails,
    ModelVersion,
    Role,
    Route,
    Sampling,
    Started,
    Target,
    TargetRole,
    TextDelta,
    Tool,
    ToolCall,
    ToolChoice,
)
from agentloop.v1 import feedback_pb2, gpu_pb2, inference_pb2, model_pb2

K = TypeVar("K")
V = TypeVar("V")

_ROLES: dict[Role, inference_pb2.Role.ValueType] = {
    "system": inference_pb2.ROLE_SYSTEM,
    "user": inference_pb2.ROLE_USER,
    "assistant": inference_pb2.ROLE_ASSISTANT,
    "tool": inference_pb2.ROLE_TOOL,
}
_TOOL_CHOICES: dict[ToolChoice, inference_pb2.ToolChoice.ValueType] = {
    "auto": inference_pb2.TOOL_CHOICE_AUTO,
    "none": inference_pb2.TOOL_CHOICE_NONE,
    "required": inference_pb2.TOOL_CHOICE_REQUIRED,
}
TOOL_CHOICE_NAMES: dict[int, ToolChoice] = {number: name for name, number in _TOOL_CHOICES.items()}
_ROLE_NAMES: dict[int, Role] = {number: name for name, number in _ROLES.items()}
FINISH_REASONS: dict[int, FinishReason] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}
_TARGET_ROLES: dict[TargetRole, model_pb2.TargetRole.ValueType] = {
    "stable": model_pb2.TARGET_ROLE_STABLE,
    "canary": model_pb2.TARGET_ROLE_CANARY,
    "shadow": model_pb2.TARGET_ROLE_SHADOW,
}
_PHASES: dict[int, InstallPhase] = {
    model_pb2.INSTALL_PHASE_WAITING: "waiting",
    model_pb2.INSTALL_PHASE_CHECKING: "checking",
    model_pb2.INSTALL_PHASE_COPYING: "copying",
    model_pb2.INSTALL_PHASE_LOADING: "loading",
}
HANDOVER_STATES: dict[int, HandoverState] = {
    gpu_pb2.HANDOVER_STATE_SERVING: "serving",
    gpu_pb2.HANDOVER_STATE_DRAINING: "draining",
    gpu_pb2.HANDOVER_STATE_LEASED: "leased",
    gpu_pb2.HANDOVER_STATE_RESTORING: "restoring",
}
TARGET_ROLE_NAMES: dict[int, TargetRole] = {number: name for name, number in _TARGET_ROLES.items()}


@contextmanager
def valid() -> Iterator[None]:
    """Turns what protobuf refuses (a negative count, half a surrogate pair) into a ConfigurationError."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"this cannot be sent: {error}") from error


@valid()
def chat_request(
    messages: str | Sequence[Message],
    *,
    tools: Sequence[Tool],
    tool_choice: ToolChoice,
    sampling: Sampling,
    json_schema: JsonObject | None,
    alias: str,
    model_version: str,
    session_id: str,
) -> inference_pb2.ChatRequest:
    """The request; a plain string is one message of the user."""
    turns = [Message("user", messages)] if isinstance(messages, str) else messages
    return inference_pb2.ChatRequest(
        alias=alias,
        model_version=model_version,
        messages=[message_to_proto(turn) for turn in turns],
        tools=[
            inference_pb2.ToolDefinition(
                name=tool.name,
                description=tool.description,
                parameters_json_schema=_json(tool.parameters),
            )
            for tool in tools
        ],
        tool_choice=_known(_TOOL_CHOICES, tool_choice, "tool_choice"),
        sampling=_sampling(sampling),
        response_format=_response_format(json_schema),
        session_id=session_id,
    )


@valid()
def generate_request(
    prompt: str,
    *,
    sampling: Sampling,
    json_schema: JsonObject | None,
    alias: str,
    model_version: str,
    session_id: str,
) -> inference_pb2.GenerateRequest:
    """The request to go on from a raw prompt."""
    return inference_pb2.GenerateRequest(
        alias=alias,
        model_version=model_version,
        prompt=prompt,
        sampling=_sampling(sampling),
        response_format=_response_format(json_schema),
        session_id=session_id,
    )


@valid()
def embed_request(texts: Sequence[str], alias: str, model_version: str) -> inference_pb2.EmbedRequest:
    """The request for vectors."""
    if isinstance(texts, str):
        raise ConfigurationError("texts is one string; give a list of them")
    return inference_pb2.EmbedRequest(alias=alias, model_version=model_version, texts=texts)


def embeddings_from_proto(response: inference_pb2.EmbedResponse) -> Embeddings:
    """The vectors."""
    vectors = tuple(tuple(embedding.values) for embedding in response.embeddings)
    return Embeddings(vectors, response.model_version, response.usage.input_tokens)


def _sampling(sampling: Sampling) -> inference_pb2.SamplingOptions:
    return inference_pb2.SamplingOptions(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
        stop=sampling.stop,
    )


def _response_format(schema: JsonObject | None) -> inference_pb2.ResponseFormat | None:
    return None if schema is None else inference_pb2.ResponseFormat(json_schema=_json(schema))


def message_to_proto(message: Message) -> inference_pb2.Message:
    """One turn."""
    return inference_pb2.Message(
        role=_known(_ROLES, message.role, "role"),
        content=message.content,
        tool_calls=[
            inference_pb2.ToolCall(name=call.name, arguments_json=_json(call.arguments))
            for call in message.tool_calls
        ],
        tool_name=message.tool_name,
    )


def message_from_proto(message: inference_pb2.Message) -> Message:
    """One turn, as the service shows it."""
    return Message(
        _ROLE_NAMES.get(message.role, "assistant"),
        message.content,
        tuple(ToolCall(call.name, json.loads(call.arguments_json or "{}")) for call in message.tool_calls),
        message.tool_name,
    )


def event_from_proto(
    response: inference_pb2.ChatResponse | inference_pb2.GenerateResponse,
) -> ChatEvent | None:
    """One event of a stream; None for a kind that this version of the client does not know."""
    kind = response.WhichOneof("event")
    if kind == "started":
        return Started(response.started.inference_id, response.started.model_version)
    if kind == "text_delta":
        return TextDelta(response.text_delta.text)
    if kind == "tool_call" and isinstance(response, inference_pb2.ChatResponse):
        return ToolCall(response.tool_call.name, json.loads(response.tool_call.arguments_json or "{}"))
    if kind == "completed":
        done = response.completed
        return Completed(
            finish_reason=FINISH_REASONS.get(done.finish_reason, "stop"),
            input_tokens=done.usage.input_tokens,
            output_tokens=done.usage.output_tokens,
            queue_ms=done.timings.queue_ms,
            ttft_ms=done.timings.time_to_first_token_ms,
            total_ms=done.timings.total_ms,
        )
    return None


def collect(events: Iterable[ChatEvent]) -> Answer:
    """The answer that the events of one stream make. Raises IncompleteStream if they do not end it."""
    started: Started | None = None
    completed: Completed | None = None
    text: list[str] = []
    calls: list[ToolCall] = []
    for event in events:
        match event:
            case Started():
                started = event
            case TextDelta():
                text.append(event.text)
            case ToolCall():
                calls.append(event)
            case Completed():
                completed = event
    if started is None or completed is None:
        raise IncompleteStream("the stream ended without its last event; ask again")
    return Answer(started.inference_id, started.model_version, "".join(text), tuple(calls), completed)


@valid()
def feedback_request(
    inference_id: str,
    feedback_id: str,
    *,
    boolean: bool | None,
    score: float | None,
    comment: str | None,
    demonstration: Message | None,
) -> feedback_pb2.SubmitRequest:
    """The feedback. Raises ConfigurationError unless exactly one value is given."""
    given = [value for value in (boolean, score, comment, demonstration) if value is not None]
    if len(given) != 1:
        raise ConfigurationError(
            f"{len(given)} values are given; give one of boolean, score, comment and demonstration"
        )
    request = feedback_pb2.SubmitRequest(feedback_id=feedback_id, inference_id=inference_id)
    if boolean is not None:
        request.boolean = boolean
    elif score is not None:
        request.score = score
    elif comment is not None:
        request.comment = comment
    elif demonstration is not None:
        request.demonstration.CopyFrom(message_to_proto(demonstration))
    return request


def model_from_proto(model: model_pb2.ModelVersion) -> ModelVersion:
    """A model version."""
    return ModelVersion(model.name, model.sha256, model.size_bytes, model.loaded)


def lease_from_proto(lease: gpu_pb2.GpuLease) -> GpuLease:
    """A lease of the GPU."""
    return GpuLease(
        lease.id, lease.holder, lease.expires_in_seconds, lease.remaining_seconds, lease.lease_seconds
    )


def handover_from_proto(response: gpu_pb2.GetGpuHandoverResponse) -> GpuHandover:
    """Who has the GPU; a state that this version of the client does not know is told as `draining`."""
    lease = lease_from_proto(response.lease) if response.HasField("lease") else None
    return GpuHandover(HANDOVER_STATES.get(response.state, "draining"), response.mode, lease)


def details_from_proto(response: model_pb2.GetModelResponse) -> ModelDetails:
    """A model version in full."""
    details = response.details
    return ModelDetails(
        model_from_proto(response.model),
        details.architecture,
        details.parameters,
        details.quantization,
        details.context_tokens,
        response.cycle_id,
        response.base,
        tuple(response.aliases),
    )


def progress_from_proto(progress: model_pb2.InstallProgress) -> InstallProgress:
    """How far an installation is; a phase that this version of the client does not know is waiting."""
    phase = _PHASES.get(progress.phase, "waiting")
    return InstallProgress(phase, progress.done_bytes, progress.total_bytes, progress.host, progress.hosts)


@valid()
def route_to_proto(alias: str, targets: Sequence[Target], revision: int) -> model_pb2.Route:
    """A route, whose revision is the one that it replaces."""
    return model_pb2.Route(
        alias=alias,
        revision=revision,
        targets=[
            model_pb2.Target(
                model_version=target.model_version,
                role=_known(_TARGET_ROLES, target.role, "role"),
                weight=target.weight,
            )
            for target in targets
        ],
    )


def route_from_proto(route: model_pb2.Route) -> Route:
    """A route; targets of a role that this version of the client does not know are left out."""
    return Route(
        alias=route.alias,
        revision=route.revision,
        targets=tuple(
            Target(target.model_version, TARGET_ROLE_NAMES[target.role], target.weight)
            for target in route.targets
            if target.role in TARGET_ROLE_NAMES
        ),
    )


def _json(value: JsonObject) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=dict)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"this is not JSON: {error}") from error


def _known(table: Mapping[K, V], key: K, what: str) -> V:
    if key not in table:
        raise ConfigurationError(f"{what} is {key!r}; it must be one of {', '.join(map(str, table))}")
    return table[key]
