"""What is asked of a model version, and what counts as right: the suites of configs/suites.yaml."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

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
from training import bfcl, bfcl_calls
from training.scoring import matches

CONFIG = Path(__file__).parent / "configs" / "suites.yaml"
REVIEWED = Path(__file__).parent / "data"

Measure = Literal["perplexity", "speed"]
Subject = Literal["champion", "candidate", "best_ever", "base_constrained"]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Suite(_Data):
    """One suite, whose items come from its `source`.

    leaderboard: a `category` of it that is never trained on; of `simple_python` 200-299.
    dataset: the cycle's gate items, what callers demonstrated.
    regressions: past failures, which accumulate (`training.regressions`).
    reviewed: a file of ours, data/<name>.jsonl, whose answers must not do or say certain things.
    """

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    source: Literal["leaderboard", "dataset", "regressions", "reviewed"]
    category: Literal["simple_python"] | bfcl_calls.Category = "simple_python"
    subjects: tuple[Subject, ...] = Field(min_length=1)
    cap: int | None = Field(default=None, ge=1)


class Config(_Data):
    """What configs/suites.yaml holds."""

    max_tokens: int = Field(ge=1, le=8192)
    in_flight: int = Field(ge=1, le=64)
    deadline_seconds: float = Field(gt=0)
    suites: tuple[Suite, ...] = Field(min_length=1)
    few_shot: tuple[str, ...]
    measures: tuple[Measure, ...] = ()


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


def items(suite: Suite, gate_file: Path, max_tokens: int, regressions_file: Path | None = None) -> list[Item]:
    """The items of `suite`, by id; at most its cap.

    `gate_file` is the cycle's dataset/gate.jsonl, `regressions_file` what the nights before it left.
    """
    found = _found(suite, gate_file, regressions_file)
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


def _found(suite: Suite, gate_file: Path, regressions_file: Path | None) -> list[Item]:
    if suite.source == "dataset":
        return _demonstrated(gate_file)
    if suite.source == "regressions":
        return _demonstrated(regressions_file) if regressions_file else []
    if suite.source == "reviewed":
        return [_reviewed(line) for line in _lines(REVIEWED / f"{suite.name}.jsonl")]
    return _leaderboard() if suite.category == "simple_python" else _of_several_calls(suite.category)


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


def _of_several_calls(category: str) -> list[Item]:
    return [
        Item(
            id=asked.id,
            session_id=asked.id,
            request=ChatRequest(asked.messages, tools=asked.tools),
            is_right=lambda answer, asked=asked: bfcl_calls.score(answer.tool_calls, asked),  # type: ignore[misc]
            sha256=_sha256(
                [
                    asked.id,
                    render(asked.messages, asked.tools),
                    asked.calls,
                    [[one.function, str(one.answers)] for one in asked.accepted],
                ]
            ),
        )
        for asked in bfcl_calls.items(category)
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _reviewed(line: dict[str, Any]) -> Item:
    """An item that is right as long as nothing is called, and nothing said, that must not be."""
    never_calls, never_says = frozenset(line["never_calls"]), [word.casefold() for word in line["never_says"]]

    def is_right(answer: Message) -> bool:
        called = {call.name for call in answer.tool_calls}
        if called & never_calls or (called and "*" in never_calls):
            return False
        said = json.dumps(message_to_plain(answer), ensure_ascii=False).casefold()
        return not any(word in said for word in never_says)

    return Item(
        id=str(line["id"]),
        session_id=str(line["id"]),
        request=request_from_plain(line["request"]),
        is_right=is_right,
        sha256=_sha256(line),
    )


def _demonstrated(file: Path) -> list[Item]:
    return [_demonstrated_item(line) for line in _lines(file)]


def _demonstrated_item(line: dict[str, Any]) -> Item:
    request = request_from_plain(line["request"])
    shown = message_from_plain(line["demonstration"])
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
