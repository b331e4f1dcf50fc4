"""OpenAI's fine-tuning files: `{"messages": [...], "tools": [...]}`, one a line.

Every turn of the assistant is taught but those of `weight` 0. Text beside a call is left out: with us a turn
is one of both. The deprecated `functions` and `function_call` are read as `tools` and `tool_calls`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator

from grpc_server.domain.types import Message, Role, Tool, ToolCall
from training.datasets.shown import Published, Record, Shown, parameters, strict_json, turns

PAGE = "https://platform.openai.com/docs/guides/fine-tuning"
_ROLES = {"developer": Role.SYSTEM, "function": Role.TOOL}


class _Called(Published):
    name: str
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _object(cls, text: str) -> str:
        if not isinstance(strict_json(text), dict):
            raise ValueError("it must be the text of a JSON object")
        return text

    def call(self) -> ToolCall:
        return ToolCall(self.name, strict_json(self.arguments))


class _ToolCall(Published):
    id: str = ""
    function: _Called


class _Part(Published):
    type: Literal["text"]
    text: str


class _Message(Published):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[_Part] | None = None
    tool_calls: list[_ToolCall] | None = None
    function_call: _Called | None = None
    tool_call_id: str | None = None
    name: str | None = None
    weight: int | None = Field(default=None, ge=0, le=1)

    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def calls(self) -> tuple[ToolCall, ...]:
        if self.function_call is not None:
            return (self.function_call.call(),)
        return tuple(each.function.call() for each in self.tool_calls or ())


class _Function(Published):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None

    def tool(self) -> Tool:
        return Tool(self.name, self.description or "", parameters(self.parameters))


class _Tool(Published):
    function: _Function


class _Record(Published):
    id: str | int | None = None
    messages: list[_Message] = Field(min_length=1)
    tools: list[_Tool] | None = None
    functions: list[_Function] | None = None


def recognises(record: Record) -> bool:
    """Whether it has messages with roles."""
    messages = record.get("messages")
    return isinstance(messages, list) and bool(messages) and isinstance(messages[0], dict)


def shown(record: Record) -> Iterator[Shown | str]:
    """What one line shows.

    Raises:
        pydantic.ValidationError: naming the field that is not as the page says.
    """
    read = _Record.model_validate(record)
    tools = [each.function.tool() for each in read.tools or ()]
    tools += [each.tool() for each in read.functions or ()]
    messages: list[Message] = []
    called = {}
    for each in read.messages:
        role = _ROLES.get(each.role) or Role(each.role)
        calls = each.calls()
        called.update({one.id: one.function.name for one in each.tool_calls or ()})
        answered = each.name or called.get(each.tool_call_id or "", "")
        messages.append(
            Message(role, "" if calls else each.text(), calls, answered if role is Role.TOOL else "")
        )
    taught = [number for number, each in enumerate(read.messages) if each.weight != 0]
    yield from turns("" if read.id is None else str(read.id), messages, tools, taught)
