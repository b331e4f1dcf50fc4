"""What a request, a feedback or a route must be, who may ask, and which version answers. Pure functions.

Each check returns nothing, or raises InvalidArgument: the field as callers write it, its value, and what it
must be. A value that may be a prompt is never quoted.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from grpc_server.domain.errors import InvalidArgument, PermissionDenied
from grpc_server.domain.types import (
    Caller,
    ChatRequest,
    EmbedRequest,
    Feedback,
    GenerateRequest,
    InferenceRequest,
    JsonObject,
    Message,
    Role,
    Route,
    Sampling,
    Scope,
    Target,
    TargetRole,
    Tool,
    ToolChoice,
)

MAX_TEXT_BYTES = 1024 * 1024
"""UTF-8 bytes of all texts of a request: messages, tools and schemas."""
MAX_MESSAGES = 256
MAX_EMBED_TEXTS = 128
"""So that their vectors, of up to 8,192 numbers, fit into one message of 4 MiB."""
MAX_TOOLS = 64
MAX_TOKENS = 8192
MAX_TOP_K = 1000
MAX_STOPS = 8
MAX_STOP_CHARACTERS = 64
MAX_SESSION_CHARACTERS = 128
MAX_COMMENT_BYTES = 65536
MAX_JSON_DEPTH = 32
MAX_TARGETS = 8
MAX_REVISION = 2**63 - 1
BYTES_A_TOKEN = 4
"""Of English text, about, in Gemma's vocabulary. What a prompt really had, the engine tells at the end."""

BASE = "base"
"""What the untouched model has for a cycle id."""

_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_ALIAS = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_MODEL_VERSION = re.compile(r"(?=.{3,128}$)[A-Za-z0-9][A-Za-z0-9._-]*:[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def authorise(caller: Caller, request: InferenceRequest | EmbedRequest) -> None:
    """Raises PermissionDenied if `caller` may not ask this."""
    if not caller.may(Scope.INFER):
        raise PermissionDenied(f"this call needs the scope {Scope.INFER}")
    if request.model_version and not caller.may(Scope.ADMIN):
        raise PermissionDenied(f"model_version needs the scope {Scope.ADMIN}; leave it out to be routed")
    aliases = caller.limits.aliases
    if aliases is not None and (request.model_version or request.alias not in aliases):
        asked = "a model_version" if request.model_version else f"the alias {_quoted(request.alias)}"
        raise PermissionDenied(f"this caller may not ask {asked}, only: {', '.join(sorted(aliases))}")


def check_chat(request: ChatRequest) -> None:
    """Raises InvalidArgument for what the API does not take."""
    _check_addressee(request)
    check_identifier("session_id", request.session_id, MAX_SESSION_CHARACTERS)
    _check_messages(request.messages)
    _check_tools(request.tools, request.tool_choice)
    _check_sampling(request.sampling)
    if request.response_schema is not None:
        if request.tools:
            raise InvalidArgument("response_format and tools exclude each other; send one", "response_format")
        check_json("response_format.json_schema", request.response_schema)
    size = _text_bytes(request)
    if size > MAX_TEXT_BYTES:
        raise InvalidArgument(
            f"messages, tools and schemas hold {size} bytes of text; at most {MAX_TEXT_BYTES} are taken",
            "messages",
        )


def check_generate(request: GenerateRequest) -> None:
    """Raises InvalidArgument for what the API does not take."""
    _check_addressee(request)
    check_identifier("session_id", request.session_id, MAX_SESSION_CHARACTERS)
    _check_sampling(request.sampling)
    if request.response_schema is not None:
        check_json("response_format.json_schema", request.response_schema)
    size = len(_utf8("prompt", request.prompt)) + _json_bytes(request.response_schema or {})
    if not request.prompt or size > MAX_TEXT_BYTES:
        raise InvalidArgument(
            f"prompt has {size} bytes, its schema included; it must have 1 to {MAX_TEXT_BYTES}", "prompt"
        )


def check_embed(request: EmbedRequest) -> None:
    """Raises InvalidArgument for what the API does not take."""
    _check_addressee(request)
    if not 1 <= len(request.texts) <= MAX_EMBED_TEXTS:
        raise InvalidArgument(
            f"texts has {len(request.texts)} texts; it must have 1 to {MAX_EMBED_TEXTS}", "texts"
        )
    size = 0
    for index, text in enumerate(request.texts):
        if not text:
            raise InvalidArgument(f"texts[{index}] is empty", f"texts[{index}]")
        size += len(_utf8(f"texts[{index}]", text))
    if size > MAX_TEXT_BYTES:
        raise InvalidArgument(f"texts have {size} bytes; at most {MAX_TEXT_BYTES} are taken", "texts")


def estimated_tokens(request: InferenceRequest | EmbedRequest) -> int:
    """About how many tokens are to be read, from the size of all texts; at least 1."""
    match request:
        case ChatRequest():
            size = _text_bytes(request)
        case GenerateRequest():
            size = len(request.prompt.encode(errors="surrogatepass"))
        case EmbedRequest():
            size = sum(len(text.encode(errors="surrogatepass")) for text in request.texts)
    return -(-size // BYTES_A_TOKEN) or 1


def check_feedback(feedback: Feedback) -> None:
    """Raises InvalidArgument unless `feedback` has exactly one value, and that one is sound."""
    values = (feedback.boolean, feedback.score, feedback.comment, feedback.demonstration)
    if sum(value is not None for value in values) != 1:
        raise InvalidArgument("value is not set; send one of boolean, score, comment, demonstration", "value")
    score, comment = feedback.score, feedback.comment
    if score is not None and not (math.isfinite(score) and 0 <= score <= 1):
        raise InvalidArgument(f"score is {score}; it must be a number from 0 to 1", "score")
    if comment is not None:
        size = len(_utf8("comment", comment))
        if not 1 <= size <= MAX_COMMENT_BYTES:
            raise InvalidArgument(
                f"comment has {size} bytes; it must have 1 to {MAX_COMMENT_BYTES}", "comment"
            )
    if feedback.demonstration is not None:
        _check_demonstration(feedback.demonstration)


def check_route(route: Route) -> None:
    """Raises InvalidArgument unless the targets are exactly one stable, at most one canary, any shadows."""
    check_alias(route.alias, "route.alias")
    if route.revision > MAX_REVISION:
        raise InvalidArgument(
            f"route.revision is {route.revision}; it must be at most {MAX_REVISION}", "route.revision"
        )
    if not 1 <= len(route.targets) <= MAX_TARGETS:
        raise InvalidArgument(
            f"route.targets has {len(route.targets)} targets; it must have 1 to {MAX_TARGETS}",
            "route.targets",
        )
    for index, target in enumerate(route.targets):
        check_model_version(target.model_version, f"route.targets[{index}].model_version")
        if not 0 <= target.weight <= 100:
            raise InvalidArgument(
                f"route.targets[{index}].weight is {target.weight}; it must be from 0 to 100",
                f"route.targets[{index}].weight",
            )
    names = [target.model_version for target in route.targets]
    if len(set(names)) < len(names):
        raise InvalidArgument("route.targets names one model version twice", "route.targets")
    roles = [target.role for target in route.targets]
    if roles.count(TargetRole.STABLE) != 1:
        raise InvalidArgument(
            f"route.targets has {roles.count(TargetRole.STABLE)} stable targets; it must have exactly one",
            "route.targets",
        )
    if roles.count(TargetRole.CANARY) > 1:
        raise InvalidArgument(
            f"route.targets has {roles.count(TargetRole.CANARY)} canaries; it may have one", "route.targets"
        )
    total = sum(target.weight for target in route.targets if target.role is not TargetRole.SHADOW)
    if total != 100:
        raise InvalidArgument(
            f"the weights of stable and canary add up to {total}; they must add up to 100", "route.targets"
        )


def check_alias(alias: str, field: str = "alias") -> None:
    """Raises InvalidArgument unless `alias` is 1 to 64 lower-case letters, digits, `.`, `_`, `-`."""
    if not _ALIAS.fullmatch(alias):
        raise InvalidArgument(
            f"{field} is {_quoted(alias)}; it must be 1 to 64 of a-z, 0-9, '.', '_', '-', and begin with"
            " a letter or digit",
            field,
        )


def check_model_version(name: str, field: str = "model_version") -> None:
    """Raises InvalidArgument unless `name` is `<model>:<cycle id>`."""
    if not _MODEL_VERSION.fullmatch(name):
        raise InvalidArgument(
            f"{field} is {_quoted(name)}; it must be <model>:<cycle id>, of letters, digits, '.', '_', '-',"
            " at most 128 characters",
            field,
        )


def lineage(name: str) -> tuple[str, str]:
    """The cycle that made a model version, and the version that it was trained from; both empty for a base.

    Every cycle trains the untouched base of its model.
    """
    model, _, cycle_id = name.partition(":")
    return ("", "") if cycle_id == BASE else (cycle_id, f"{model}:{BASE}")


def check_sha256(value: str, field: str = "sha256") -> None:
    """Raises InvalidArgument unless `value` is 64 lower-case hexadecimal digits."""
    if not _SHA256.fullmatch(value):
        raise InvalidArgument(
            f"{field} is {_quoted(value)}; it must be 64 lower-case hexadecimal digits", field
        )


def check_identifier(field: str, value: str, characters: int) -> None:
    """Raises InvalidArgument unless `value` is at most so many printable characters; none are as good."""
    if len(value) > characters:
        raise InvalidArgument(f"{field} has {len(value)} characters; at most {characters} are taken", field)
    if value and not value.isprintable():
        raise InvalidArgument(f"{field} holds a control character; use printable ones", field)


def check_json(field: str, value: Any) -> None:
    """Raises InvalidArgument for JSON that is too deep, or that UTF-8 cannot hold (a lone surrogate)."""
    waiting = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        if depth > MAX_JSON_DEPTH:
            raise InvalidArgument(f"{field} is nested deeper than {MAX_JSON_DEPTH} levels", field)
        if isinstance(item, str):
            _utf8(field, item)
        elif isinstance(item, Mapping):
            for key, inner in item.items():
                _utf8(field, key)
                waiting.append((inner, depth + 1))
        elif isinstance(item, Sequence):
            waiting.extend((inner, depth + 1) for inner in item)


def choose_target(route: Route, session_id: str, draw: float) -> Target:
    """The stable target or the canary, by weight.

    `draw` is a random number in [0, 1). A session always draws the same number, so that it stays with one
    version while weights stay; and as the canary takes the lowest numbers, raising its weight only moves
    sessions to it, never away from it.
    """
    if session_id:
        digest = hashlib.sha256(f"{route.alias}\0{session_id}".encode()).digest()
        draw = int.from_bytes(digest[:8], "big") / 2**64
    stable = stable_target(route)
    canary = next((target for target in route.targets if target.role is TargetRole.CANARY), None)
    return canary if canary is not None and draw * 100 < canary.weight else stable


def stable_target(route: Route) -> Target:
    """The stable target: whose vectors compare with each other, while no rollout ends."""
    return next(target for target in route.targets if target.role is TargetRole.STABLE)


def fallbacks(route: Route, chosen: Target) -> tuple[Target, ...]:
    """Whom to ask, in this order, if `chosen` fails before its first token: what else serves the alias.

    Not a shadow, and not what has no weight: that was taken out of service.
    """
    return tuple(
        target
        for target in route.targets
        if target.role is not TargetRole.SHADOW
        and target.weight > 0
        and target.model_version != chosen.model_version
    )


def choose_shadows(route: Route, draw: float) -> list[Target]:
    """The shadows that are asked too, each for its share of requests; `draw` is random, in [0, 1)."""
    return [
        target for target in route.targets if target.role is TargetRole.SHADOW and draw * 100 < target.weight
    ]


def _check_addressee(request: InferenceRequest | EmbedRequest) -> None:
    check_alias(request.alias)
    if request.model_version:
        check_model_version(request.model_version)


def _check_messages(messages: Sequence[Message]) -> None:
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidArgument(
            f"messages has {len(messages)} messages; it must have 1 to {MAX_MESSAGES}", "messages"
        )
    before: Message | None = None
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        _check_message(field, message)
        _check_order(field, index, message, before)
        before = message
    if before is not None and before.role not in (Role.USER, Role.TOOL):
        field = f"messages[{len(messages) - 1}].role"
        raise InvalidArgument(f"{field} is {before.role}; the last message must be from user or tool", field)


def _check_order(field: str, index: int, message: Message, before: Message | None) -> None:
    """Roles alternate: system (at most once, first), then user, assistant, user or tool, and so on."""
    opening = before is None or before.role is Role.SYSTEM
    wrong = {
        Role.SYSTEM: index > 0,
        Role.USER: not opening and before is not None and before.role is not Role.ASSISTANT,
        Role.ASSISTANT: opening or (before is not None and before.role is Role.ASSISTANT),
        Role.TOOL: before is None or not before.tool_calls,
    }
    if wrong[message.role]:
        place = "first" if before is None else f"after {before.role}"
        raise InvalidArgument(
            f"{field}.role is {message.role}, {place}; system may only be first, then user and assistant"
            " alternate, and tool follows the assistant's tool call",
            f"{field}.role",
        )
    if message.role is Role.TOOL and before is not None and message.tool_name != before.tool_calls[0].name:
        raise InvalidArgument(
            f"{field}.tool_name is {_quoted(message.tool_name)}; it must name the tool called just before,"
            f" {before.tool_calls[0].name}",
            f"{field}.tool_name",
        )


def _check_message(field: str, message: Message) -> None:
    _utf8(f"{field}.content", message.content)
    if message.tool_name and message.role is not Role.TOOL:
        raise InvalidArgument(
            f"{field}.tool_name is set on a message from {message.role}; only tool has one",
            f"{field}.tool_name",
        )
    if message.role is not Role.ASSISTANT:
        if message.tool_calls:
            raise InvalidArgument(
                f"{field}.tool_calls is set on a message from {message.role}; only assistant has them",
                f"{field}.tool_calls",
            )
        if not message.content and message.role is not Role.TOOL:
            raise InvalidArgument(f"{field}.content is empty", f"{field}.content")
        return
    _check_answer(field, message)


def _check_answer(field: str, message: Message) -> None:
    """An assistant's turn is text, or one tool call."""
    if len(message.tool_calls) > 1:
        raise InvalidArgument(
            f"{field}.tool_calls has {len(message.tool_calls)} calls; a turn is one tool call",
            f"{field}.tool_calls",
        )
    if bool(message.content) == bool(message.tool_calls):
        problem = "both content and a tool call" if message.content else "neither content nor a tool call"
        raise InvalidArgument(f"{field} has {problem}; an assistant's turn is one of them", field)
    for call in message.tool_calls:
        _tool_name(f"{field}.tool_calls[0].name", call.name)
        check_json(f"{field}.tool_calls[0].arguments_json", call.arguments)


def _check_demonstration(message: Message) -> None:
    if message.role is not Role.ASSISTANT:
        raise InvalidArgument(
            f"demonstration.role is {message.role}; a demonstration is a message from assistant",
            "demonstration.role",
        )
    _check_message("demonstration", message)
    size = len(message.content.encode()) + sum(_json_bytes(call.arguments) for call in message.tool_calls)
    if size > MAX_TEXT_BYTES:
        raise InvalidArgument(
            f"demonstration has {size} bytes; at most {MAX_TEXT_BYTES} are taken", "demonstration"
        )


def _check_tools(tools: Sequence[Tool], choice: ToolChoice) -> None:
    if len(tools) > MAX_TOOLS:
        raise InvalidArgument(f"tools has {len(tools)} tools; at most {MAX_TOOLS} are taken", "tools")
    if choice is ToolChoice.REQUIRED and not tools:
        raise InvalidArgument(
            "tool_choice is required, but tools is empty; offer at least one", "tool_choice"
        )
    names: set[str] = set()
    for index, tool in enumerate(tools):
        field = f"tools[{index}]"
        _tool_name(f"{field}.name", tool.name)
        if tool.name in names:
            raise InvalidArgument(f"{field}.name is {tool.name} again; names must be unique", f"{field}.name")
        names.add(tool.name)
        _utf8(f"{field}.description", tool.description)
        _check_parameters(f"{field}.parameters_json_schema", tool.parameters)


def _check_parameters(field: str, schema: JsonObject) -> None:
    check_json(field, schema)
    if schema.get("type") != "object":
        raise InvalidArgument(f'{field} is not of type object; write {{"type": "object", …}}', field)


def _check_sampling(sampling: Sampling) -> None:
    ranges: list[tuple[str, float, float, float]] = [
        ("temperature", sampling.temperature, 0, 2),
        ("top_k", sampling.top_k, 1, MAX_TOP_K),
        ("max_tokens", sampling.max_tokens, 1, MAX_TOKENS),
    ]
    for name, value, low, high in ranges:
        if not low <= value <= high:
            raise InvalidArgument(f"{name} is {value:g}; it must be from {low} to {high}", f"sampling.{name}")
    if not 0 < sampling.top_p <= 1:
        raise InvalidArgument(f"top_p is {sampling.top_p:g}; it must be above 0, to 1", "sampling.top_p")
    if sampling.seed is not None and not 0 <= sampling.seed < 2**32:
        raise InvalidArgument(f"seed is {sampling.seed}; it must be from 0 to {2**32 - 1}", "sampling.seed")
    if len(sampling.stop) > MAX_STOPS:
        raise InvalidArgument(
            f"stop has {len(sampling.stop)} strings; at most {MAX_STOPS} are taken", "sampling.stop"
        )
    for index, stop in enumerate(sampling.stop):
        field = f"sampling.stop[{index}]"
        _utf8(field, stop)
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise InvalidArgument(
                f"{field} has {len(stop)} characters; it must have 1 to {MAX_STOP_CHARACTERS}", field
            )


def _tool_name(field: str, name: str) -> None:
    if not _TOOL_NAME.fullmatch(name):
        raise InvalidArgument(
            f"{field} is {_quoted(name)}; it must be 1 to 128 letters, digits, '_', '.', '-'", field
        )


def _utf8(field: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"{field} holds a lone surrogate, which is no character", field) from None


def _quoted(text: str) -> str:
    """A name as it stands in an error: in ASCII, and cut, as it may be anything."""
    return ascii(text if len(text) <= 60 else f"{text[:57]}...")


def _text_bytes(request: ChatRequest) -> int:
    size = 0
    for message in request.messages:
        size += len(message.content.encode()) + sum(
            _json_bytes(call.arguments) for call in message.tool_calls
        )
    for tool in request.tools:
        size += len(tool.description.encode()) + _json_bytes(tool.parameters)
    return size + _json_bytes(request.response_schema or {})


def _json_bytes(value: Any) -> int:
    """About what a JSON value takes as text: the UTF-8 bytes of its texts, and the digits of its numbers."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, Mapping):
        return sum(len(key.encode()) + _json_bytes(item) for key, item in value.items())
    if isinstance(value, Sequence):
        return sum(_json_bytes(item) for item in value)
    return len(str(value))
