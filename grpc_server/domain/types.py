"""The values that cross the service's boundaries: immutable, and free of any transport or database."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

JsonObject = Mapping[str, Any]


class Role(StrEnum):
    """Who speaks a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of one tool, as the model wrote it."""

    name: str
    arguments: JsonObject


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `tool_name` is set on a TOOL message: the tool that answers."""

    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_name: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that a caller offers; `parameters` is a JSON Schema of type object."""

    name: str
    description: str
    parameters: JsonObject


class ToolChoice(StrEnum):
    """Whether the answer may, may not, or must be a tool call."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; ranges are checked by `rules.check_chat`."""

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 64
    max_tokens: int = 512
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One request to an alias (or, with the admin scope, to one `model_version`)."""

    messages: tuple[Message, ...]
    alias: str = "default"
    model_version: str = ""
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice.AUTO
    sampling: Sampling = field(default_factory=Sampling)
    response_schema: JsonObject | None = None
    session_id: str = ""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A raw prompt to go on from; what Chat and Generate share means the same in both."""

    prompt: str
    alias: str = "default"
    model_version: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    response_schema: JsonObject | None = None
    session_id: str = ""


InferenceRequest = ChatRequest | GenerateRequest


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """Texts to make vectors of."""

    texts: tuple[str, ...]
    alias: str = "default"
    model_version: str = ""


class Scope(StrEnum):
    """What a token allows. `admin` includes every other."""

    INFER = "infer"
    FEEDBACK = "feedback"
    MODELS_READ = "models:read"
    MODELS_WRITE = "models:write"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a caller may use, on each server; None: as much as there is.

    `tokens_per_minute` counts what is read and what is written. `aliases` are those that it may name.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_streams: int | None = None
    aliases: frozenset[str] | None = None


NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the token's key id, its name, what it allows, and how much of it."""

    key_id: str
    name: str
    scopes: frozenset[Scope]
    learning: bool = True  # whether the nights may learn from what it says
    text: bool = True  # whether the log may keep what it says
    limits: Limits = NO_LIMITS

    def may(self, scope: Scope) -> bool:
        """Whether this caller holds `scope`, or admin."""
        return scope in self.scopes or Scope.ADMIN in self.scopes


class Priority(StrEnum):
    """Who waits for a place: a person for the answer, or nobody."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class FinishReason(StrEnum):
    """Why generation stopped by itself (OpenTelemetry `gen_ai.response.finish_reasons`)."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


class Status(StrEnum):
    """How an inference ended. `started` is one that has not ended yet."""

    STARTED = "started"
    OK = "ok"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and written (`gen_ai.usage.input_tokens`, `gen_ai.usage.output_tokens`)."""

    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds: waiting for a place, until the first token, and in all."""

    queue_ms: float = 0.0
    ttft_ms: float | None = None
    total_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector a text, in their order, and the tokens read for them."""

    vectors: tuple[tuple[float, ...], ...]
    input_tokens: int


# What a chat streams, in this order: one Started, any TextDelta and ToolCall, one Completed.


@dataclass(frozen=True, slots=True)
class Started:
    """The first event: the inference is accepted (its start record is on disk)."""

    inference_id: UUID
    model_version: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Completed:
    """The last event of a stream that ended by itself."""

    finish_reason: FinishReason
    usage: Usage
    timings: Timings


ChatEvent = Started | TextDelta | ToolCall | Completed


class TargetRole(StrEnum):
    """What a model version is to a route."""

    STABLE = "stable"
    CANARY = "canary"
    SHADOW = "shadow"


@dataclass(frozen=True, slots=True)
class Target:
    """One model version of a route. Weights are whole percents; stable and canary add up to 100."""

    model_version: str
    role: TargetRole
    weight: int


@dataclass(frozen=True, slots=True)
class Route:
    """Where an alias leads. `revision` grows by one with each change (compare-and-set)."""

    alias: str
    revision: int
    targets: tuple[Target, ...]


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One immutable GGUF, named `<model>:<cycle id>`."""

    name: str
    sha256: str
    size_bytes: int
    loaded: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """Who changed what."""

    at: datetime
    kind: str
    actor: str
    subject: str
    detail: JsonObject


@dataclass(frozen=True, slots=True)
class ModelDetails:
    """What a GGUF's header says; empty or 0 where it does not. `context_tokens` is what it was made for."""

    architecture: str = ""
    parameters: int = 0
    quantization: str = ""
    context_tokens: int = 0


class InstallPhase(StrEnum):
    """What an installation does now."""

    WAITING = "waiting"
    CHECKING = "checking"
    COPYING = "copying"
    LOADING = "loading"


@dataclass(slots=True)
class InstallProgress:
    """How far an installation is, in bytes of its phase: the engine writes it, from any thread."""

    phase: InstallPhase = InstallPhase.WAITING
    done_bytes: int = 0
    total_bytes: int = 0
    host: int = 1
    hosts: int = 1

    def begin(self, phase: InstallPhase, total_bytes: int = 0) -> None:
        """The next phase."""
        self.phase, self.done_bytes, self.total_bytes = phase, 0, total_bytes


# What the log stores.


@dataclass(frozen=True, slots=True)
class InferenceStarted:
    """The start record: fsynced before the first byte of the answer leaves."""

    id: UUID
    server_id: str
    caller: str
    key_id: str
    alias: str
    model_version: str
    target_role: TargetRole
    session_id: str
    request: JsonObject  # messages, tools, tool_choice, sampling, response_schema as plain JSON
    started_at: datetime
    learning: bool = True  # whether a night may learn from it
    text: bool = True  # whether what was said may be kept
    redacted: Mapping[str, int] = field(default_factory=dict)  # what was found and replaced, by kind
    traceparent: str = ""
    """The span in whose trace it was asked (W3C Trace Context), where traces are recorded."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One model version that was asked. `error_type` is the name of one of `domain.errors`."""

    model_version: str
    target_role: TargetRole
    error_type: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class InferenceEnded:
    """The end record. `answer` is the message as plain JSON (content, tool_calls), partial if cut off.

    `attempts` is empty where only the start record's version was asked. Where that one failed before its
    first token, they are all that were asked, in this order; the answer, or the end, is that of the last.
    """

    id: UUID
    status: Status
    finish_reason: FinishReason | None
    answer: JsonObject
    usage: Usage
    timings: Timings
    error: str
    ended_at: datetime
    redacted: Mapping[str, int] = field(default_factory=dict)
    attempts: tuple[Attempt, ...] = ()

    def asked(self, start: InferenceStarted) -> tuple[str, TargetRole]:
        """Whose answer, or end, this is: the model version, and what it was to the route."""
        last = self.attempts[-1] if self.attempts else start
        return last.model_version, last.target_role


@dataclass(frozen=True, slots=True)
class ServerStarted:
    """Written when a server opens its spool: what it had begun before and not ended was aborted."""

    server_id: str
    started_at: datetime


@dataclass(frozen=True, slots=True)
class Feedback:
    """What a caller says later of an inference; exactly one of the values is set."""

    id: UUID
    inference_id: UUID
    caller: str
    key_id: str
    created_at: datetime
    boolean: bool | None = None
    score: float | None = None
    comment: str | None = None
    demonstration: Message | None = None
    learning: bool = True
    text: bool = True
    redacted: Mapping[str, int] = field(default_factory=dict)


class HandoverMode(StrEnum):
    """How serving gives way to a training that wants the GPU."""

    OFF = "off"
    DRAIN = "drain"
    SHRINK = "shrink"


class HandoverState(StrEnum):
    """Who has the GPU: serving, a training, or it is on its way between them."""

    SERVING = "serving"
    DRAINING = "draining"
    LEASED = "leased"
    RESTORING = "restoring"


@dataclass(frozen=True, slots=True)
class KeptLease:
    """A lease of the GPU, as it is told and kept: seconds are from now on.

    It ends after `expires_in_seconds` unless it is renewed, and after `remaining_seconds` in any case.
    """

    id: UUID
    holder: str
    expires_in_seconds: float
    remaining_seconds: float


LogRecord = InferenceStarted | InferenceEnded | ServerStarted | Feedback
