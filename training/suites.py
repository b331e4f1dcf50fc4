"""What is asked of a model version, and what counts as right: the suites of configs/suites.yaml."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from grpc_server.domain.chat_format import render
from grpc_server.domain.plain import (
    message_from_plain,
    message_to_plain,
    request_from_plain,
    request_to_plain,
)
from grpc_server.domain.types import ChatRequest, Message, Role, Sampling, Tool, ToolCall, ToolChoice
from training import bfcl
from training.scoring import matches

CONFIG = Path(__file__).parent / "configs" / "suites.yaml"

Subject = Literal["champion", "candidate", "base_constrained"]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Suite(_Data):
    """One suite: its items are the leaderboard's held-out ones, or the cycle's gate items."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    source: Literal["leaderboard", "dataset"]
    subjects: tuple[Subject, ...] = Field(min_length=1)
    cap: int | None = Field(default=None, ge=1)


class Config(_Data):
    """What configs/suites.yaml holds."""

    max_tokens: int = Field(ge=1, le=8192)
    in_flight: int = Field(ge=1, le=64)
    deadline_seconds: float = Field(gt=0)
    suites: tuple[Suite, ...] = Field(min_length=1)
    few_shot: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a suite. `sha256` is of all that it is, its right answers included."""

    id: str
    session_id: str
    request: ChatRequest
    is_right: Callable[[Message], bool]
    sha256: str


def read_config(path: Path = CONFIG) -> Config:
    """The suites in a YAML file.

    Raises:
        pydantic.ValidationError: naming each key that is missing, unknown or out of range.
        ValueError: if an item that is shown first is one that must not be.
    """
    config = Config.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    barred = bfcl.barred_ids()
    for item_id in config.few_shot:
        category, _, number = item_id.rpartition("_")
        if category != "simple_python" or int(number) not in bfcl.TRAFFIC_SIMPLE or item_id in barred:
            raise ValueError(f"few_shot has {item_id}; it must be of simple_python 0-199 and not barred")
    return config


def items(suite: Suite, gate_file: Path, max_tokens: int) -> list[Item]:
    """The items of `suite`, by id; at most its cap. `gate_file` is the cycle's dataset/gate.jsonl."""
    found = _leaderboard() if suite.source == "leaderboard" else _demonstrated(gate_file)
    if suite.cap is not None:
        found = sorted(found, key=lambda item: hashlib.sha256(item.id.encode()).digest())[: suite.cap]
    greedy = Sampling(temperature=0.0, max_tokens=max_tokens, seed=0)
    return [
        replace(item, request=replace(item.request, sampling=greedy))
        for item in sorted(found, key=lambda item: item.id)
    ]


def sha256(found: Sequence[Item]) -> str:
    """What identifies these items, whatever files they came from."""
    return _sha256([item.sha256 for item in found])


def _leaderboard() -> list[Item]:
    return [
        Item(
            id=asked.id,
            session_id=asked.id,
            request=ChatRequest(asked.messages, tools=asked.tools),
            is_right=lambda answer, asked=asked: bfcl.score(_only_call(answer), asked),  # type: ignore[misc]
            sha256=_sha256([asked.id, render(asked.messages, asked.tools), str(asked.answers)]),
        )
        for asked in bfcl.evaluation_items()
    ]


def _demonstrated(gate_file: Path) -> list[Item]:
    with gate_file.open(encoding="utf-8") as lines:
        return [_demonstrated_item(json.loads(line)) for line in lines]


def _demonstrated_item(line: dict[str, object]) -> Item:
    request = request_from_plain(line["request"])  # type: ignore[arg-type]
    shown = message_from_plain(line["demonstration"])  # type: ignore[arg-type]
    if request.tool_choice is ToolChoice.REQUIRED:
        request = replace(request, tool_choice=ToolChoice.AUTO)  # unconstrained: what the model has learned
    return Item(
        id=str(line["inference_id"]),
        session_id=str(line["session_id"] or line["inference_id"]),
        request=request,
        is_right=lambda answer: matches(answer, shown),
        sha256=_sha256([request_to_plain(request), message_to_plain(shown)]),
    )


def constrained(request: ChatRequest, few_shot: Sequence[bfcl.Item]) -> ChatRequest:
    """`request`, held to its tools' schema, after examples with their answers as turns before it.

    Each question carries its own tools, as the renderer writes them, so that every turn looks alike.
    """
    said: list[Message] = []
    for shown in few_shot:
        said.append(Message(Role.USER, _with_tools(shown.messages[-1].content, shown.tools)))
        said.append(Message(Role.ASSISTANT, tool_calls=(shown.demonstration,)))
    *before, last = request.messages
    asked = replace(last, content=_with_tools(last.content, request.tools))
    return replace(request, messages=(*before, *said, asked), tool_choice=ToolChoice.REQUIRED)


def _with_tools(said: str, tools: Sequence[Tool]) -> str:
    turn = render((Message(Role.USER, said),), tools)
    return turn.removeprefix("<start_of_turn>user\n").partition("<end_of_turn>")[0]


def _only_call(answer: Message) -> ToolCall | None:
    return answer.tool_calls[0] if len(answer.tool_calls) == 1 else None


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
