"""A request as what the engine is asked, and its answer as the tool call that it is."""

from __future__ import annotations

from grpc_server.domain import chat_format, rules
from grpc_server.domain.errors import InvalidArgument
from grpc_server.domain.ports import Generation
from grpc_server.domain.types import (
    Caller,
    GenerateRequest,
    InferenceRequest,
    JsonObject,
    Scope,
    Tool,
    ToolCall,
    ToolChoice,
)


def offered_tools(request: InferenceRequest) -> tuple[Tool, ...]:
    """The tools that may be called."""
    if isinstance(request, GenerateRequest) or request.tool_choice is ToolChoice.NONE:
        return ()
    return request.tools


def generation_of(caller: Caller, request: InferenceRequest, model_version: str) -> Generation:
    """What the engine is asked. Raises InvalidArgument for messages that cannot be rendered.

    Control tokens stay in a raw prompt only where an administrator asks: others could end turns with them.
    """
    schema: JsonObject | None = request.response_schema
    call_schema: JsonObject | None = None
    if isinstance(request, GenerateRequest):
        raw = caller.may(Scope.ADMIN)
        prompt = request.prompt if raw else chat_format.broken_up(request.prompt)
    else:
        if request.tool_choice is ToolChoice.REQUIRED:
            schema = chat_format.tool_call_schema(request.tools)
        elif schema is None and (offered := offered_tools(request)):
            call_schema = chat_format.tool_call_schema(offered)
        try:
            prompt = chat_format.render(
                request.messages, request.tools, request.tool_choice, request.response_schema
            )
        except (ValueError, RecursionError) as error:
            raise InvalidArgument(f"messages cannot be rendered: {error}", "messages") from error
    stop = tuple(dict.fromkeys((*chat_format.STOP, *request.sampling.stop)))
    return Generation(model_version, prompt, request.sampling, stop, schema, call_schema)


def tool_call(text: str, tools: tuple[Tool, ...]) -> ToolCall | None:
    """The call that `text` is; none if its arguments hold half a surrogate pair, which UTF-8 cannot."""
    call = chat_format.parse_tool_call(text, tools)
    if call is None:
        return None
    try:
        rules.check_json("arguments", call.arguments)
    except InvalidArgument:
        return None
    return call
