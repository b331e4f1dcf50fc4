"""Messages and tools of the API as domain values, and back; errors name the field."""

from __future__ import annotations

import json
from collections.abc import Iterable
from uuid import UUID

from agentloop.v1 import inference_pb2 as pb
from grpc_server.domain.errors import InvalidArgument
from grpc_server.domain.plain import plain
from grpc_server.domain.types import Message, Role, Tool, ToolCall
from grpc_server.json_text import json_object, json_schema

_ROLES = {
    pb.ROLE_SYSTEM: Role.SYSTEM,
    pb.ROLE_USER: Role.USER,
    pb.ROLE_ASSISTANT: Role.ASSISTANT,
    pb.ROLE_TOOL: Role.TOOL,
}


def message(field: str, value: pb.Message) -> Message:
    """The message. Raises InvalidArgument for an unknown role, and for arguments that are no object."""
    if value.role not in _ROLES:
        raise InvalidArgument(
            f"{field}.role is {value.role}; it must be one of ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT,"
            " ROLE_TOOL",
            f"{field}.role",
        )
    calls = [
        ToolCall(call.name, json_object(f"{field}.tool_calls[{index}].arguments_json", call.arguments_json))
        for index, call in enumerate(value.tool_calls)
    ]
    return Message(_ROLES[value.role], value.content, tuple(calls), value.tool_name)


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


def tool_call(call: ToolCall) -> pb.ToolCall:
    """The call, its arguments as one line of JSON."""
    return pb.ToolCall(name=call.name, arguments_json=json.dumps(plain(call.arguments), ensure_ascii=False))


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
