"""A request of OpenAI's chat completions as one of ours.

What would change the answer and is not offered is refused; what would not is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpc_server.domain import rules
from grpc_server.domain.errors import InvalidArgument
from grpc_server.domain.types import (
    ChatRequest,
    JsonObject,
    Message,
    Role,
    Sampling,
    Tool,
    ToolCall,
    ToolChoice,
)
from grpc_server.http.fields import Fields
from grpc_server.json_text import json_object, json_schema

_PASSED_OVER = (
    # Accounts, caches and prices, none of which there are here.
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    # A turn is one tool call in any case, and no model here reasons apart from its answer.
    "parallel_tool_calls",
    "reasoning_effort",
    "verbosity",
)
_NEUTRAL: dict[str, Any] = {
    "n": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "modalities": ["text"],
}
"""What is not offered may still say that it is not wanted."""
_ROLES = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
}
_CHOICES = {"auto": ToolChoice.AUTO, "none": ToolChoice.NONE, "required": ToolChoice.REQUIRED}
_MAX_PARTS = 1024
_MAX_CALLS = 64


@dataclass(frozen=True, slots=True)
class Asked:
    """What a caller wants, and how it wants to hear it."""

    request: ChatRequest
    stream: bool = False
    include_usage: bool = False


def completion_request(body: JsonObject) -> Asked:
    """The request, its ranges unchecked (see `rules.check_chat`). Raises InvalidArgument."""
    fields = Fields(body)
    alias, model_version = model(fields)
    tools, choice = _tools(fields)
    request = ChatRequest(
        messages=_messages(fields),
        alias=alias,
        model_version=model_version,
        tools=tools,
        tool_choice=choice,
        sampling=_sampling(fields),
        response_schema=_response_schema(fields),
        session_id=_session(fields),
    )
    stream = bool(fields.take("stream", bool))
    options = Fields(fields.take("stream_options", dict) or {}, "stream_options")
    include_usage = bool(options.take("include_usage", bool))
    options.drop("include_obfuscation")
    refuse_left(options)
    fields.drop(*_PASSED_OVER)
    _refuse_extras(fields)
    refuse_left(fields)
    return Asked(request, stream, include_usage)


def _refuse_extras(fields: Fields) -> None:
    """Raises InvalidArgument for what OpenAI offers and we do not, unless it says that it is not wanted."""
    for name, neutral in _NEUTRAL.items():
        value = fields.take(name, dict, list, str, bool, float)
        if value is None or (isinstance(value, bool) is isinstance(neutral, bool) and value == neutral):
            continue
        raise InvalidArgument(
            f"{name} is not offered here; leave it out, or make it {json.dumps(neutral)}", name
        )


def model(fields: Fields) -> tuple[str, str]:
    """The alias, or the one model version (`<model>:<cycle id>`), that `model` names."""
    name: str = fields.need("model", str)
    if ":" in name:
        rules.check_model_version(name, "model")
        return "default", name
    rules.check_alias(name, "model")
    return name, ""


def refuse_left(fields: Fields) -> None:
    """Raises InvalidArgument for what nobody took: it may be meant to change the answer."""
    for name in fields.left:
        place = fields.place(name if len(name) <= 60 else f"{name[:57]}...")
        raise InvalidArgument(f"{ascii(place)[1:-1]} is not offered here; leave it out", place)


def _sampling(fields: Fields) -> Sampling:
    default = Sampling()
    limits = [fields.whole("max_completion_tokens"), fields.whole("max_tokens")]
    given = [value for value in limits if value is not None]
    if len(set(given)) > 1:
        raise InvalidArgument(
            f"max_completion_tokens is {given[0]} and max_tokens is {given[1]}; send one of them",
            "max_tokens",
        )
    top_k = fields.whole("top_k")
    stop = fields.take("stop", str, list)
    return Sampling(
        temperature=fields.number("temperature", default.temperature),
        top_p=fields.number("top_p", default.top_p),
        top_k=default.top_k if top_k is None else top_k,
        max_tokens=given[0] if given else default.max_tokens,
        seed=fields.whole("seed"),
        stop=(stop,) if isinstance(stop, str) else _texts("stop", stop or ()),
    )


def _texts(place: str, values: Sequence[Any]) -> tuple[str, ...]:
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise InvalidArgument(f"{place}[{index}] must be text", f"{place}[{index}]")
    return tuple(values)


def _session(fields: Fields) -> str:
    """`metadata.session_id`, which says it outright, else `user`; other metadata is passed over."""
    user = fields.text("user")
    metadata = Fields(fields.take("metadata", dict) or {}, "metadata")
    return metadata.text("session_id") or user


def _response_schema(fields: Fields) -> JsonObject | None:
    form = Fields(fields.take("response_format", dict) or {"type": "text"}, "response_format")
    what = form.need("type", str)
    if what == "text":
        return None
    if what == "json_object":
        return {"type": "object"}
    if what != "json_schema":
        raise InvalidArgument(
            f"response_format.type is {what[:60]!a}; it must be one of text, json_object, json_schema",
            "response_format.type",
        )
    named = Fields(form.need("json_schema", dict), "response_format.json_schema")
    return _schema("response_format.json_schema.schema", named.need("schema", dict))


def _schema(place: str, value: JsonObject) -> JsonObject:
    """`value`, if it is a JSON Schema; as text, so that what was checked before is known again."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise InvalidArgument(f"{place} is nested too deep", place) from None
    return json_schema(place, text)


def _tools(fields: Fields) -> tuple[tuple[Tool, ...], ToolChoice]:
    """The tools, and whether one is called. Where one is named to be called, it is the only one offered."""
    tools = tuple(_tool(index, value) for index, value in enumerate(fields.items("tools", rules.MAX_TOOLS)))
    choice = fields.take("tool_choice", str, dict) or "auto"
    if isinstance(choice, str):
        if choice not in _CHOICES:
            raise InvalidArgument(
                f"tool_choice is {choice[:60]!a}; it must be one of auto, none, required, or an object"
                " that names a function",
                "tool_choice",
            )
        return tools, _CHOICES[choice]
    name = _function(Fields(choice, "tool_choice")).need("name", str)
    named = tuple(tool for tool in tools if tool.name == name)
    if not named:
        raise InvalidArgument("tool_choice.function.name is none of the tools' names", "tool_choice")
    return named, ToolChoice.REQUIRED


def _tool(index: int, value: Any) -> Tool:
    function = _function(Fields.of(value, f"tools[{index}]"))
    parameters = function.take("parameters", dict)
    place = function.place("parameters")
    return Tool(
        function.need("name", str),
        function.text("description"),
        {"type": "object", "properties": {}} if parameters is None else _schema(place, parameters),
    )


def _function(fields: Fields) -> Fields:
    """What stands under `function` of an object whose type must be that."""
    what = fields.need("type", str)
    if what != "function":
        place = fields.place("type")
        raise InvalidArgument(f"{place} is {what[:60]!a}; it must be function", place)
    return Fields(fields.need("function", dict), fields.place("function"))


def _messages(fields: Fields) -> tuple[Message, ...]:
    called: dict[str, str] = {}
    values = fields.items("messages", rules.MAX_MESSAGES)
    return tuple(_message(Fields.of(value, f"messages[{i}]"), called) for i, value in enumerate(values))


def _message(fields: Fields, called: dict[str, str]) -> Message:
    """One turn. `called` has the tool of each call so far, by the id that the tool's answer names."""
    role = fields.need("role", str)
    if role not in _ROLES:
        place = fields.place("role")
        raise InvalidArgument(f"{place} is {role[:60]!a}; it must be one of {', '.join(_ROLES)}", place)
    content = _content(fields)
    calls = tuple(
        _call(Fields.of(value, f"{fields.place('tool_calls')}[{index}]"), called)
        for index, value in enumerate(fields.items("tool_calls", _MAX_CALLS))
    )
    tool_name = ""
    if _ROLES[role] is Role.TOOL:
        answered = fields.need("tool_call_id", str)
        if answered not in called:
            place = fields.place("tool_call_id")
            raise InvalidArgument(f"{place} is the id of no tool call before it", place)
        tool_name = called[answered]
    # A speaker's name, and what a client copies from an answer of before.
    fields.drop("name", "refusal", "annotations")
    refuse_left(fields)
    return Message(_ROLES[role], content, calls, tool_name)


def _content(fields: Fields) -> str:
    """The text, which may come in parts."""
    content = fields.take("content", str, list) or ""
    if isinstance(content, str):
        return content
    place = fields.place("content")
    if len(content) > _MAX_PARTS:
        raise InvalidArgument(f"{place} has {len(content)} parts; at most {_MAX_PARTS} are taken", place)
    texts = []
    for index, value in enumerate(content):
        part = Fields.of(value, f"{place}[{index}]")
        what = part.need("type", str)
        if what != "text":
            raise InvalidArgument(
                f"{part.place('type')} is {what[:60]!a}; models here read text only", part.place("type")
            )
        texts.append(part.need("text", str))
    return "".join(texts)


def _call(fields: Fields, called: dict[str, str]) -> ToolCall:
    name_of = fields.text("id")
    function = _function(fields)
    name = function.need("name", str)
    if name_of:
        called[name_of] = name
    return ToolCall(name, json_object(function.place("arguments"), function.need("arguments", str)))
