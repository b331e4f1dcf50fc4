"""The log as the client shows it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from agentloop.types import FinishReason, JsonObject, Message, Sampling, TargetRole, Tool, ToolChoice

InferenceStatus = Literal["started", "ok", "cancelled", "deadline", "error", "aborted"]


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked, every default filled in: messages, or a raw `prompt`."""

    messages: tuple[Message, ...]
    prompt: str
    tools: tuple[Tool, ...]
    tool_choice: ToolChoice
    sampling: Sampling
    json_schema: JsonObject | None


@dataclass(frozen=True, slots=True)
class Feedback:
    """What somebody said of an inference; one of the values is not None."""

    feedback_id: str
    caller: str
    created_at: datetime
    boolean: bool | None = None
    score: float | None = None
    comment: str | None = None
    demonstration: Message | None = None


@dataclass(frozen=True, slots=True)
class Inference:
    """A row of the log. Request, answer and feedback are only there where one inference was asked for."""

    inference_id: str
    caller: str
    key_id: str
    alias: str
    model_version: str
    target_role: TargetRole | None
    session_id: str
    status: InferenceStatus | None
    finish_reason: FinishReason | None
    error: str
    input_tokens: int
    output_tokens: int
    queue_ms: float
    ttft_ms: float
    total_ms: float
    started_at: datetime
    ended_at: datetime | None
    feedback_count: int
    request: Request | None = None
    answer: Message | None = None
    feedback: tuple[Feedback, ...] = ()


@dataclass(frozen=True, slots=True)
class InferencePage:
    """Some inferences, the newest first, and the token of the next page: "" if this is the last."""

    inferences: tuple[Inference, ...]
    next_page_token: str
