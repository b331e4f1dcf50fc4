"""What goes into the client and comes out of it: small, frozen, free of protobuf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

JsonObject = Mapping[str, Any]
Role = Literal["system", "user", "assistant", "tool"]
ToolChoice = Literal["auto", "none", "required"]
FinishReason = Literal["stop", "length", "tool_calls"]
TargetRole = Literal["stable", "canary", "shadow"]
InstallPhase = Literal["waiting", "checking", "copying", "loading"]
HandoverState = Literal["serving", "draining", "leased", "restoring"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of one of the request's tools."""

    name: str
    arguments: JsonObject


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `tool_calls` only from the assistant; `tool_name` only from a tool: which one answers."""

    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_name: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that the model may call; `parameters` is a JSON Schema of type object."""

    name: str
    description: str
    parameters: JsonObject


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; what is None takes the server's default. Temperature 0 is greedy."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


# What a chat streams, in this order: one Started, any TextDelta and ToolCall, one Completed.


@dataclass(frozen=True, slots=True)
class Started:
    """The request is accepted and will be in the log; feedback names `inference_id`."""

    inference_id: str
    model_version: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Completed:
    """The answer is complete. Milliseconds are measured at the server."""

    finish_reason: FinishReason
    input_tokens: int
    output_tokens: int
    queue_ms: float
    ttft_ms: float
    total_ms: float


ChatEvent = Started | TextDelta | ToolCall | Completed


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, collected from its events."""

    inference_id: str
    model_version: str
    text: str
    tool_calls: tuple[ToolCall, ...]
    completed: Completed


@dataclass(frozen=True, slots=True)
class TokenCount:
    """What a request would be read as, `<bos>` included, and by which model version."""

    input_tokens: int
    model_version: str


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector a text, in their order. Vectors of two model versions do not compare."""

    vectors: tuple[tuple[float, ...], ...]
    model_version: str
    input_tokens: int


@dataclass(frozen=True, slots=True)
class GpuLease:
    """The right to a server's GPU. Seconds are from when the server answered.

    It ends after `expires_in_s` unless it is renewed, which puts that off to `lease_s`, and after
    `remaining_s` in any case.
    """

    id: str
    holder: str
    expires_in_s: float
    remaining_s: float
    lease_s: float


@dataclass(frozen=True, slots=True)
class GpuHandover:
    """Who has a server's GPU; `mode` is `off`, `drain` or `shrink`. `lease` is None while serving has it."""

    state: HandoverState
    mode: str
    lease: GpuLease | None


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One immutable GGUF, named `<model>:<cycle id>`; size in bytes."""

    name: str
    sha256: str
    size_bytes: int
    loaded: bool


@dataclass(frozen=True, slots=True)
class ModelDetails:
    """A model version in full: what its file says of itself, where it comes from, which aliases lead to it.

    `cycle_id` and `base` are empty for an untouched base, what a file does not say is empty or 0.
    """

    model: ModelVersion
    architecture: str
    parameters: int
    quantization: str
    context_tokens: int
    cycle_id: str
    base: str
    aliases: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class InstallProgress:
    """How far an installation is: bytes of its phase, and on which of the engine's hosts, from 1."""

    phase: InstallPhase
    done_bytes: int
    total_bytes: int
    host: int
    hosts: int


@dataclass(frozen=True, slots=True)
class Target:
    """One model version of a route; weights are whole percents."""

    model_version: str
    role: TargetRole
    weight: int


@dataclass(frozen=True, slots=True)
class Route:
    """Where an alias leads; `revision` grows by one with each change."""

    alias: str
    revision: int
    targets: tuple[Target, ...]

    @property
    def stable(self) -> str:
        """The champion's name, or "" if the route has none."""
        return next((target.model_version for target in self.targets if target.role == "stable"), "")
