r"""The one renderer and parser of Gemma's turns: serving, training and evaluation all use it.

A prompt is the turns of the conversation, and an open turn of the model:

    <start_of_turn>user
    (the system text, the tools, one a line, then what the user says)<end_of_turn>
    <start_of_turn>model

A tool is one line, as compact as a signature (`?` marks what may be left out, `[]` a list):

    weather.get(city: string, days?: integer, unit?: "C"|"F") - The weather in a city.

A tool call is a whole turn of the model, and JSON: `{"name": "weather.get", "arguments": {"city": "Oslo"}}`.

Prompts do not begin with `<bos>`: both engines and the trainer add that token themselves. A control token
in a caller's text is broken up (`< end_of_turn>`; inside JSON by the escape `\u003c`, which parses back),
so that no text can end a turn or begin one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from grpc_server.domain.types import JsonObject, Message, Role, Tool, ToolCall, ToolChoice

BOS = "<bos>"
START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"
STOP: tuple[str, ...] = (END_OF_TURN,)
"""What ends the model's turn; engines stop there and do not return it."""

DESCRIPTION_CHARACTERS = 120
"""How much of a tool's description the model sees; what was reached with it: docs/decisions.md."""

_ENUM_CHARACTERS = 120
_NESTING = 3

# Every control token of the Gemma 3 and 3n vocabularies. Their other special tokens are runs of blanks and
# HTML tags, which neither open nor close anything.
_CONTROL = re.compile(
    r"<(?=(?:pad|eos|bos|unk|mask|unused\d+|(?:start|end)_of_\w+|\w+_soft_token)>)|\[(?=multimodal\]|@BOS@\])"
)


def render(
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    tool_choice: ToolChoice = ToolChoice.AUTO,
    response_schema: JsonObject | None = None,
) -> str:
    r"""The prompt, without `<bos>`, ending in `<start_of_turn>model\n`.

    System texts, wherever they stand, the tools (unless `tool_choice` is NONE) and the response schema open
    the first turn, as Gemma has no system role.
    """
    preamble = [_safe(message.content) for message in messages if message.role is Role.SYSTEM]
    if tools and tool_choice is not ToolChoice.NONE:
        preamble.append("\n".join(_tool_line(tool) for tool in tools))
    if response_schema is not None:
        preamble.append(f"Answer in JSON that fits this schema: {_safe_json(response_schema)}")
    turns: list[tuple[str, str]] = []
    for message in messages:
        if message.role is not Role.SYSTEM:
            turns.append(_turn(message))
    if not turns or turns[0][0] != "user":
        turns.insert(0, ("user", ""))
    turns[0] = ("user", "\n\n".join(part for part in [*preamble, turns[0][1]] if part))
    closed = "".join(f"{START_OF_TURN}{who}\n{text}{END_OF_TURN}\n" for who, text in turns)
    return f"{closed}{START_OF_TURN}model\n"


def broken_up(prompt: str) -> str:
    """A raw prompt in which no control token is one any more."""
    return _safe(prompt)


def render_answer(message: Message) -> str:
    """What the model must write for `message`, ending in `<end_of_turn>`: one tool call, or text.

    Raises:
        ValueError: if the message has more than one tool call; a turn is one call.
    """
    return _answer(message) + END_OF_TURN


def parse_tool_call(text: str, tools: Sequence[Tool]) -> ToolCall | None:
    """The call of one of `tools` that the whole of `text` is, or None if it is anything else."""
    text = text.strip().removesuffix(END_OF_TURN).rstrip()
    if not text.startswith("{"):
        return None
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or set(value) != {"name", "arguments"}:
        return None
    name, arguments = value["name"], value["arguments"]
    if not isinstance(arguments, dict) or name not in [tool.name for tool in tools]:
        return None
    return ToolCall(name, arguments)


def tool_call_schema(tools: Sequence[Tool]) -> JsonObject:
    """The JSON Schema that holds an answer to a call of one of `tools`.

    Only the keywords that llama.cpp turns into a grammar are kept: others would make it refuse the request,
    and none of them is needed to make a call that parses.

    Raises:
        ValueError: if there is no tool.
    """
    if not tools:
        raise ValueError("tool_choice is required, but no tool is offered; offer at least one")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": _object_schema(tool.parameters)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _turn(message: Message) -> tuple[str, str]:
    if message.role is Role.ASSISTANT:
        return "model", _answer(message)
    if message.role is Role.TOOL:
        return "user", f"{_line(message.tool_name) or 'tool'} returned: {_safe(message.content)}"
    return "user", _safe(message.content)


def _answer(message: Message) -> str:
    if len(message.tool_calls) > 1:
        raise ValueError(f"a turn is one tool call, but this message has {len(message.tool_calls)}")
    if message.tool_calls:
        call = message.tool_calls[0]
        return _safe_json({"name": call.name, "arguments": call.arguments})
    return _safe(message.content)


def _safe(text: str) -> str:
    """`text` with a blank inside each control token."""
    return _CONTROL.sub(lambda match: match[0] + " ", text)


def _safe_json(value: Any) -> str:
    """`value` as one line of JSON. Control tokens can only stand in strings, where JSON can escape them."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", _JSON.encode(value))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_plain)


def _line(text: str) -> str:
    """`text` on one line, made safe."""
    return _safe(" ".join(text.split()))


def _clipped(text: str, limit: int) -> str:
    """`text` on one line, cut at a word, within `limit` characters."""
    line = " ".join(text.split())
    if len(line) > limit:
        line = line[:limit].rsplit(" ", 1)[0]
    return _safe(line)


def _tool_line(tool: Tool) -> str:
    description = _clipped(tool.description, DESCRIPTION_CHARACTERS)
    signature = f"{_line(tool.name)}({_fields(tool.parameters, _NESTING)})"
    return f"{signature} - {description}" if description else signature


def _fields(schema: Any, depth: int) -> str:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(properties, Mapping):
        return ""
    required = schema.get("required")
    needed = required if isinstance(required, Sequence) else ()
    return ", ".join(
        f"{_line(str(name))}{'' if name in needed else '?'}: {_type(value, depth)}"
        for name, value in properties.items()
    )


def _type(schema: Any, depth: int) -> str:
    """The type a schema gives, written as TypeScript would; "any" where it gives none."""
    if not isinstance(schema, Mapping):
        return "any"
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(choices, Sequence) and not isinstance(choices, str) and choices:
        listed = "|".join(_safe_json(choice) for choice in choices)
        if len(listed) <= _ENUM_CHARACTERS:
            return listed
        return _clipped(listed, _ENUM_CHARACTERS) + "|..."
    for keyword in ("anyOf", "oneOf"):
        options = schema.get(keyword)
        if isinstance(options, Sequence) and not isinstance(options, str) and options and depth > 0:
            return "|".join(dict.fromkeys(_type(option, depth - 1) for option in options))
    kind = schema.get("type", "object" if "properties" in schema else "any")
    if isinstance(kind, Sequence) and not isinstance(kind, str):
        return "|".join(_line(str(one)) for one in kind)
    if kind == "array" and depth > 0:
        return f"{_type(schema.get('items'), depth - 1)}[]"
    if kind == "object" and depth > 0:
        fields = _fields(schema, depth - 1)
        return f"{{{fields}}}" if fields else "object"
    return _line(str(kind))


# Keywords of JSON Schema that llama.cpp's grammar converter takes as they are.
_KEPT = ("type", "enum", "const", "minItems", "maxItems", "minLength", "maxLength", "minimum", "maximum")


def _held(schema: Any) -> JsonObject:
    """`schema` without what llama.cpp cannot hold an answer to."""
    if not isinstance(schema, Mapping):
        return {}
    held: dict[str, Any] = {key: schema[key] for key in _KEPT if key in schema}
    for keyword in ("anyOf", "oneOf"):
        options = schema.get(keyword)
        if isinstance(options, Sequence) and not isinstance(options, str) and options:
            return {"anyOf": [_held(option) for option in options]}
    if "const" in held or "enum" in held:
        return {key: held[key] for key in ("const", "enum") if key in held}
    if held.get("type") == "object" or "properties" in schema:
        return _object_schema(schema)
    if held.get("type") == "array":
        held["items"] = _held(schema.get("items"))
    if held.get("type") != "integer":  # llama.cpp bounds integers only, and refuses bounds on numbers
        held.pop("minimum", None)
        held.pop("maximum", None)
    return held


def _object_schema(schema: JsonObject) -> JsonObject:
    properties = schema.get("properties")
    if not isinstance(properties, Mapping) or not properties:
        if schema.get("additionalProperties") is False:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object"}
    required = schema.get("required")
    names = required if isinstance(required, Sequence) and not isinstance(required, str) else ()
    return {
        "type": "object",
        "properties": {name: _held(value) for name, value in properties.items()},
        "required": [name for name in names if isinstance(name, str) and name in properties],
        "additionalProperties": False,
    }


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits} is out of range")
    return number
