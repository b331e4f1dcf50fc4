"""Messages and tools of the API as domain values, and back; errors name the field."""

from __future__ import annotations

import json
from collections.abc import Iterable
from uuid import UUID

from agentloop.v1 import inference_pb2 as pb
from grpc_server.domain.errors import InvalidArgument
from grpc_server.domain.plain import plain
from grpc_server.domain.types import (
    ChatRequest,
    JsonObject,
    Message,
    Role,
    Sampling,
    Timings,
    Tool,
    ToolCall,
    ToolChoice,
    Usage,
)
from grpc_server.json_text import json_object, json_schema

MAX_ARGUMENTS_BYTES = 65536
"""Of one tool call's arguments."""

_TOOL_CHOICES: dict[pb.ToolChoice.ValueType, ToolChoice] = {
    pb.TOOL_CHOICE_UNSPECIFIED: ToolChoice.AUTO,
    pb.TOOL_CHOICE_AUTO: ToolChoice.AUTO,
    pb.TOOL_CHOICE_NONE: ToolChoice.NONE,
    pb.TOOL_CHOICE_REQUIRED: ToolChoice.REQUIRED,
}
_ROLES = {
    pb.ROLE_SYSTEM: Role.SYSTEM,
    pb.ROLE_USER: Role.USER,
    pb.ROLE_ASSISTANT: Role.ASSISTANT,
    pb.ROLE_TOOL: Role.TOOL,
}
_ROLE_NUMBERS = {role: number for number, role in _ROLES.items()}
_TOOL_CHOICE_NUMBERS = {choice: number for number, choice in _TOOL_CHOICES.items()}


def message(field: str, value: pb.Message) -> Message:
    """The message. Raises InvalidArgument for an unknown role, and for arguments that are no object."""
    if value.role not in _ROLES:
        raise InvalidArgument(
            f"{field}.role is {value.role}; it must be one of ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT,"
            " ROLE_TOOL",
            f"{field}.role",
        )
    calls = [
        ToolCall(call.name, _arguments(f"{field}.tool_calls[{index}].arguments_json", call.arguments_json))
        for index, call in enumerate(value.tool_calls)
    ]
    return Message(_ROLES[value.role], value.content, tuple(calls), value.tool_name)


def _arguments(field: str, text: str) -> JsonObject:
    size = len(text.encode(errors="surrogatepass"))
    if size > MAX_ARGUMENTS_BYTES:
        raise InvalidArgument(f"{field} has {size} bytes; at most {MAX_ARGUMENTS_BYTES} are taken", field)
    return json_object(field, text)


def tools(values: Iterable[pb.ToolDefinition]) -> tuple[Tool, ...]:
    """The tools. Raises InvalidArgument for parameters that are no JSON Schema."""
    return tuple(
        Tool(
            value.name,
            value.description,
            json_schema(f"tools[{index}].parameters_json_schema", value.parameters_json_schema),
        )
        for index, value in enumerate(values)
    )


def tool_choice(value: pb.ToolChoice.ValueType) -> ToolChoice:
    """The choice; the default where none is made. Raises InvalidArgument for one that is unknown."""
    if value not in _TOOL_CHOICES:
        raise InvalidArgument(
            f"tool_choice is {value}; it must be one of {', '.join(pb.ToolChoice.keys())}", "tool_choice"
        )
    return _TOOL_CHOICES[value]


def tool_call(call: ToolCall) -> pb.ToolCall:
    """The call, its arguments as one line of JSON."""
    return pb.ToolCall(name=printable(call.name), arguments_json=_json(call.arguments))


def message_to_proto(value: Message) -> pb.Message:
    """The message."""
    return pb.Message(
        role=_ROLE_NUMBERS[value.role],
        content=printable(value.content),
        tool_calls=[tool_call(call) for call in value.tool_calls],
        tool_name=value.tool_name,
    )


def chat_to_proto(value: ChatRequest) -> pb.ChatRequest:
    """The request, every default filled in."""
    return pb.ChatRequest(
        alias=value.alias,
        messages=[message_to_proto(each) for each in value.messages],
        tools=[
            pb.ToolDefinition(
                name=each.name,
                description=printable(each.description),
                parameters_json_schema=_json(each.parameters),
            )
            for each in value.tools
        ],
        tool_choice=_TOOL_CHOICE_NUMBERS[value.tool_choice],
        sampling=sampling_to_proto(value.sampling),
        response_format=response_format_to_proto(value.response_schema),
        session_id=value.session_id,
    )


def sampling_to_proto(value: Sampling) -> pb.SamplingOptions:
    """How tokens were drawn."""
    return pb.SamplingOptions(
        temperature=value.temperature,
        top_p=value.top_p,
        top_k=value.top_k,
        max_tokens=value.max_tokens,
        seed=value.seed,
        stop=value.stop,
    )


def response_format_to_proto(schema: JsonObject | None) -> pb.ResponseFormat | None:
    """The form of an answer, if it was held to one."""
    return None if schema is None else pb.ResponseFormat(json_schema=_json(schema))


def usage_to_proto(value: Usage) -> pb.Usage:
    """The counts."""
    return pb.Usage(input_tokens=value.input_tokens, output_tokens=value.output_tokens)


def timings_to_proto(value: Timings) -> pb.Timings:
    """The times."""
    return pb.Timings(
        queue_ms=value.queue_ms, time_to_first_token_ms=value.ttft_ms or 0.0, total_ms=value.total_ms
    )


def printable(text: str) -> str:
    """`text` without half surrogate pairs, which UTF-8 cannot hold."""
    return text.encode(errors="replace").decode()


def _json(value: JsonObject) -> str:
    return printable(json.dumps(plain(value), ensure_ascii=False))


def uuid(field: str, text: str) -> UUID:
    """The UUID written `xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`. Raises InvalidArgument."""
    try:
        value = UUID(text)
    except ValueError:
        value = None
    if value is None or str(value) != text.lower():
        shown = ascii(text[:60])
        raise InvalidArgument(f"{field} is {shown}; it must be a UUID, as Started.inference_id is", field)
    return value
