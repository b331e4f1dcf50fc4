r"""ToolBench's training files (`toolllama_G123_dfs_train.json`): an array of `{"id", "conversations"}`.

A record is one step of a path: its last turn is what is taught, those before are records of their own, and
its id is `Step <n>: <query>`. The system turn lists the tools as Python writes them; its rest explains a way
of writing calls (`Thought:`, `Action:`, `Action Input:`) that is not ours, so only the tools are kept.
Thoughts are left out; the call `Finish` with a final answer is read as that answer: so our agent ends.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationInfo, field_validator

from grpc_server.domain.types import ChatRequest, Message, Role, Tool, ToolCall
from training.datasets.shown import Published, Record, Shown, parameters, strict_json

PAGE = "https://github.com/OpenBMB/ToolBench"

_LISTED = "you have access to the following APIs:"
_FINISH = "Finish"
_ACTION = re.compile(
    r"(?:^|\n)\s*Action:[ \t]*(?P<name>[^\n]*)\n\s*Action Input:\s*(?P<input>.*)\Z", re.DOTALL
)
_BEGIN = re.compile(r"\s*Begin!\s*\Z")
_STEP = re.compile(r"\AStep \d+: ")


class _Declared(Published):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


_Tools = TypeAdapter(list[_Declared])


class _Turn(Published):
    from_: Literal["system", "user", "assistant", "function"] = Field(alias="from")
    value: str

    @field_validator("value")
    @classmethod
    def _lists_tools(cls, text: str, info: ValidationInfo) -> str:
        if info.data.get("from_") == "system":
            _tools(text)
        return text


class _Record(Published):
    id: str
    conversations: list[_Turn] = Field(min_length=2)


def recognises(record: Record) -> bool:
    """Whether its first turn, of the system, lists the tools."""
    said = record.get("conversations")
    first = said[0] if isinstance(said, list) and said else None
    return (
        isinstance(first, dict)
        and first.get("from") == "system"
        and isinstance(first.get("value"), str)
        and _LISTED in first["value"]
    )


def shown(record: Record) -> Iterator[Shown | str]:
    """What one record shows: its last turn.

    Raises:
        pydantic.ValidationError: naming the field that is not as the page says.
    """
    read = _Record.model_validate(record)
    tools: list[Tool] = []
    messages: list[Message] = []
    name = ""
    for turn in read.conversations:
        if turn.from_ == "system":
            tools = [tool for tool in _tools(turn.value) if tool.name != _FINISH]
        elif turn.from_ == "assistant":
            said = _answer(turn.value)
            if isinstance(said, str):
                yield said
                return
            name = said.tool_calls[0].name if said.tool_calls else ""
            messages.append(said)
        elif turn.from_ == "function":
            messages.append(Message(Role.TOOL, turn.value, tool_name=name))
        else:
            messages.append(Message(Role.USER, _BEGIN.sub("", turn.value).strip()))
    if not messages or messages[-1].role is not Role.ASSISTANT:
        yield "no_demonstration"
        return
    request = ChatRequest(tuple(messages[:-1]), tools=tuple(tools))
    yield Shown(_STEP.sub("", read.id), request, messages[-1])


def _answer(text: str) -> Message | str:
    """A turn as a call or as text, or the reason why it is neither."""
    found = _ACTION.search(text)
    if found is None:
        return "invalid_demonstration"
    try:
        arguments = strict_json(found["input"].strip() or "{}")
    except ValueError:  # what a model wrote once, and nothing would read
        return "invalid_demonstration"
    if not isinstance(arguments, dict):
        return "invalid_demonstration"
    name = found["name"].strip()
    if name != _FINISH:
        return Message(Role.ASSISTANT, tool_calls=(ToolCall(name, arguments),))
    final = arguments.get("final_answer")
    if arguments.get("return_type") != "give_answer" or not isinstance(final, str):
        return "gave_up"
    return Message(Role.ASSISTANT, final)


def _tools(text: str) -> list[Tool]:
    """The tools that a system turn lists."""
    _, marked, listed = text.partition(_LISTED)
    if not marked:
        raise ValueError(f"it must list the tools after {_LISTED!r}")
    try:
        value = ast.literal_eval(listed.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError("the tools must be a list as Python writes it") from None
    try:
        declared = _Tools.validate_python(value)
    except ValueError:
        raise ValueError("each tool must have name, description and parameters") from None
    return [Tool(each.name, each.description or "", _schema(each.parameters)) for each in declared]


def _schema(declared: dict[str, Any] | None) -> Any:
    """Without `optional`, which says again what `required` does not."""
    return parameters({key: value for key, value in (declared or {}).items() if key != "optional"})
