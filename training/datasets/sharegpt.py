"""ShareGPT's form: `{"conversations": [{"from", "value"}], "system", "tools"}`; AgentInstruct adds `loss`.

Of names for the same speaker the usual ones are taken. Calls of tools are as LLaMA-Factory writes them: the
value of `function_call` is JSON of name and arguments, that of `observation` what the tool returned, and
`tools` JSON of a list. AgentInstruct says in `loss` which turns are taught; its actions are text, as its
tasks describe them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, TypeAdapter, field_validator

from grpc_server.domain.types import Message, Role, Tool, ToolCall
from training.datasets.shown import Published, Record, Shown, parameters, strict_json, turns

PAGE = "https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md"
AGENTINSTRUCT_PAGE = "https://huggingface.co/datasets/THUDM/AgentInstruct"

_ROLES = {
    "system": Role.SYSTEM,
    "human": Role.USER,
    "user": Role.USER,
    "gpt": Role.ASSISTANT,
    "assistant": Role.ASSISTANT,
    "chatgpt": Role.ASSISTANT,
    "bing": Role.ASSISTANT,
    "bard": Role.ASSISTANT,
    "function_call": Role.ASSISTANT,
    "observation": Role.TOOL,
    "tool": Role.TOOL,
}
_From = Literal[
    "system",
    "human",
    "user",
    "gpt",
    "assistant",
    "chatgpt",
    "bing",
    "bard",
    "function_call",
    "observation",
    "tool",
]


class _Call(Published):
    name: str
    arguments: dict[str, Any]


class _Tool(Published):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


_Tools = TypeAdapter(list[_Tool])


class _Turn(Published):
    from_: _From = Field(alias="from")
    value: str
    loss: bool | None = None

    def call(self) -> _Call | None:
        return _Call.model_validate(strict_json(self.value)) if self.from_ == "function_call" else None


class _Record(Published):
    id: str | int | None = None
    conversations: list[_Turn] = Field(min_length=1)
    system: str | None = None
    tools: str | list[Any] | None = None

    @field_validator("conversations")
    @classmethod
    def _calls(cls, said: list[_Turn]) -> list[_Turn]:
        for number, turn in enumerate(said):
            try:
                turn.call()
            except ValueError as error:
                raise ValueError(
                    f"the value of [{number}], a function_call, must be JSON of name and arguments"
                ) from error
        return said

    @field_validator("tools")
    @classmethod
    def _listed(cls, tools: str | list[Any] | None) -> str | list[Any] | None:
        try:
            _tools(tools)
        except ValueError as error:
            raise ValueError("it must be a list, or JSON of one, of name, description, parameters") from error
        return tools


def recognises(record: Record) -> bool:
    """Whether it has a conversation of turns with speakers."""
    said = record.get("conversations")
    return isinstance(said, list) and bool(said) and isinstance(said[0], dict) and "from" in said[0]


def recognises_agentinstruct(record: Record) -> bool:
    """Whether its turns say, too, whether they are taught."""
    return recognises(record) and "loss" in record["conversations"][0]


def shown(record: Record) -> Iterator[Shown | str]:
    """What one record shows.

    Raises:
        pydantic.ValidationError: naming the field that is not as the page says.
    """
    read = _Record.model_validate(record)
    messages = [Message(Role.SYSTEM, read.system)] if read.system else []
    first = len(messages)
    name = ""
    for turn in read.conversations:
        role, call = _ROLES[turn.from_], turn.call()
        if call is not None:
            name = call.name
            messages.append(Message(role, tool_calls=(ToolCall(call.name, call.arguments),)))
        else:
            messages.append(Message(role, turn.value, tool_name=name if role is Role.TOOL else ""))
    taught = [number + first for number, turn in enumerate(read.conversations) if turn.loss is not False]
    yield from turns("" if read.id is None else str(read.id), messages, _tools(read.tools), taught)


def _tools(declared: str | list[Any] | None) -> list[Tool]:
    if not declared:
        return []
    listed = strict_json(declared) if isinstance(declared, str) else declared
    return [
        Tool(each.name, each.description or "", parameters(each.parameters))
        for each in _Tools.validate_python(listed)
    ]
