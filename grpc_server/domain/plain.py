"""Messages and requests as plain JSON objects, and back: the form in the log, snapshots and datasets.

A request does not hold its alias, model version or session: the log has columns of their own for these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from grpc_server.domain.types import (
    ChatRequest,
    GenerateRequest,
    InferenceRequest,
    Message,
    Role,
    Sampling,
    Tool,
    ToolCall,
    ToolChoice,
)


def texts_in(value: Any) -> Iterator[str]:
    """Every string in a plain value, keys too, in its order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from texts_in(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from texts_in(item)


def message_to_plain(message: Message) -> dict[str, Any]:
    """`{"role", "content", "tool_calls": [{"name", "arguments"}], "tool_name"}`, all keys always there."""
    return {
        "role": message.role.value,
        "content": message.content,
        "tool_calls": [
            {"name": call.name, "arguments": plain(call.arguments)} for call in message.tool_calls
        ],
        "tool_name": message.tool_name,
    }


def message_from_plain(value: Mapping[str, Any]) -> Message:
    """The message that `message_to_plain` gave.

    Raises:
        ValueError: if a key is missing or a value has another type than it must.
    """
    calls = _each(value, "tool_calls", ())
    return Message(
        role=_choice(Role, value, "role"),
        content=_text(value, "content", ""),
        tool_calls=tuple(ToolCall(_text(call, "name"), _object(call, "arguments")) for call in calls),
        tool_name=_text(value, "tool_name", ""),
    )


def request_to_plain(request: InferenceRequest) -> dict[str, Any]:
    """`{"messages", "tools", "tool_choice", "sampling", "response_schema"}`, all keys always there.

    A raw prompt stands under `prompt`, a key that only it has, beside no messages and no tools.
    """
    sampling = request.sampling
    return {
        **_asked(request),
        "sampling": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": sampling.max_tokens,
            "seed": sampling.seed,
            "stop": list(sampling.stop),
        },
        "response_schema": None if request.response_schema is None else plain(request.response_schema),
    }


def _asked(request: InferenceRequest) -> dict[str, Any]:
    if isinstance(request, GenerateRequest):
        choice = ToolChoice.NONE.value
        return {"prompt": request.prompt, "messages": [], "tools": [], "tool_choice": choice}
    return {
        "messages": [message_to_plain(message) for message in request.messages],
        "tools": [
            {"name": tool.name, "description": tool.description, "parameters": plain(tool.parameters)}
            for tool in request.tools
        ],
        "tool_choice": request.tool_choice.value,
    }


def raw_prompt(value: Mapping[str, Any]) -> str | None:
    """The raw prompt of a plain request; None if it is a conversation."""
    prompt = value.get("prompt")
    return prompt if isinstance(prompt, str) else None


def request_from_plain(
    value: Mapping[str, Any], *, alias: str = "default", model_version: str = "", session_id: str = ""
) -> ChatRequest:
    """The conversation that `request_to_plain` gave; what it does not hold is given by keyword.

    Raises:
        ValueError: if a key is missing or a value has another type than it must.
    """
    drawn = value.get("sampling", {})
    if not isinstance(drawn, Mapping):
        raise ValueError(f"sampling is {type(drawn).__name__}; it must be an object")
    schema = value.get("response_schema")
    if schema is not None and not isinstance(schema, Mapping):
        raise ValueError(f"response_schema is {type(schema).__name__}; it must be an object or null")
    default = Sampling()
    return ChatRequest(
        messages=tuple(message_from_plain(message) for message in _each(value, "messages")),
        alias=alias,
        model_version=model_version,
        tools=tuple(
            Tool(_text(tool, "name"), _text(tool, "description", ""), _object(tool, "parameters"))
            for tool in _each(value, "tools", ())
        ),
        tool_choice=_choice(ToolChoice, value, "tool_choice", ToolChoice.AUTO),
        sampling=Sampling(
            temperature=float(_number(drawn, "temperature", default.temperature)),
            top_p=float(_number(drawn, "top_p", default.top_p)),
            top_k=int(_number(drawn, "top_k", default.top_k)),
            max_tokens=int(_number(drawn, "max_tokens", default.max_tokens)),
            seed=None if drawn.get("seed") is None else int(_number(drawn, "seed", 0)),
            stop=_texts(drawn, "stop"),
        ),
        response_schema=schema,
        session_id=session_id,
    )


def plain(value: Any) -> Any:
    """`value` with every mapping a dict and every sequence a list, as `json.dumps` wants them."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


_NEEDED: Any = object()


def _get(value: Mapping[str, Any], key: str, default: Any) -> Any:
    found = value.get(key, default)
    if found is _NEEDED:
        raise ValueError(f"{key} is missing")
    return found


def _text(value: Mapping[str, Any], key: str, default: Any = _NEEDED) -> str:
    found = _get(value, key, default)
    if not isinstance(found, str):
        raise ValueError(f"{key} is {type(found).__name__}; it must be text")
    return found


def _object(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = _get(value, key, _NEEDED)
    if not isinstance(found, Mapping):
        raise ValueError(f"{key} is {type(found).__name__}; it must be an object")
    return found


def _number(value: Mapping[str, Any], key: str, default: Any) -> int | float:
    found = _get(value, key, default)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ValueError(f"{key} is {type(found).__name__}; it must be a number")
    return found


def _each(value: Mapping[str, Any], key: str, default: Any = _NEEDED) -> list[Mapping[str, Any]]:
    found = _get(value, key, default)
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise ValueError(f"{key} is {type(found).__name__}; it must be a list")
    for item in found:
        if not isinstance(item, Mapping):
            raise ValueError(f"{key} holds {type(item).__name__}; it must hold objects")
    return list(found)


def _texts(value: Mapping[str, Any], key: str) -> tuple[str, ...]:
    found = value.get(key, ())
    if (
        not isinstance(found, Sequence)
        or isinstance(found, str)
        or not all(isinstance(x, str) for x in found)
    ):
        raise ValueError(f"{key} must be a list of texts")
    return tuple(found)


def _choice(kind: Any, value: Mapping[str, Any], key: str, default: Any = _NEEDED) -> Any:
    found = _get(value, key, default)
    try:
        return kind(found)
    except ValueError:
        raise ValueError(f"{key} is {found!r}; it must be one of {', '.join(kind)}") from None
