"""What the service needs from the outside, as protocols. Adapters and fakes pass one conformance suite."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol
from uuid import UUID

from grpc_server.domain.errors import AgentLoopError
from grpc_server.domain.log_query import LogFilter, LoggedInference, LogPage
from grpc_server.domain.types import (
    NO_LIMITS,
    Caller,
    Embeddings,
    FinishReason,
    InferenceEnded,
    InferenceStarted,
    InstallProgress,
    JsonObject,
    KeptLease,
    Limits,
    LogRecord,
    ModelDetails,
    ModelVersion,
    Route,
    Sampling,
    Scope,
    Usage,
)


@dataclass(frozen=True, slots=True)
class Generation:
    """What an engine is asked: a rendered prompt (no `<bos>`), and how to go on from it.

    `call_schema` is what a tool call is held to once one has begun: by `held_call`, not by engines.
    """

    model_version: str
    prompt: str
    sampling: Sampling
    stop: tuple[str, ...] = ()
    json_schema: JsonObject | None = None
    call_schema: JsonObject | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Some generated text, never empty: a token, or as many as were there at once.

    `usage` is what was read and written so far, if the engine tells.
    """

    text: str
    usage: Usage | None = None
    tokens: int = 1


@dataclass(frozen=True, slots=True)
class Finished:
    """The engine's last word; `finish_reason` is STOP or LENGTH."""

    finish_reason: FinishReason
    usage: Usage


class Engine(Protocol):
    """Generates tokens.

    Every method raises EngineUnavailable when the engine is down, NotFound for a model version that is not
    installed, EngineFailed when it answers nonsense.
    """

    @property
    def name(self) -> str:
        """`embedded` or `ollama`."""

    @property
    def parallel(self) -> int:
        """How many generations run at once; admission keeps to it."""

    def generate(self, generation: Generation) -> AsyncGenerator[Piece | Finished, None]:
        """Stream the continuation; closing the generator stops the engine within a second.

        Ends with exactly one Finished; an end without it is raised as EngineUnavailable.
        """

    async def embed(self, model_version: str, texts: Sequence[str]) -> Embeddings:
        """One vector per text. Raises PromptTooLong for a text that does not fit into the context."""

    async def count_tokens(self, model_version: str, prompt: str) -> int:
        """The tokens of a prompt as `Usage.input_tokens` counts them; it may be longer than the context.

        The engine may have to read the prompt for it, as to answer: it takes as long, and a place.
        """

    async def list_models(self) -> list[ModelVersion]:
        """The installed versions, by name."""

    async def load(self, model_version: str) -> None:
        """Bring a version into memory; it stays until unloaded."""

    async def unload(self, model_version: str) -> None:
        """Free its memory."""

    async def show(self, model_version: str) -> ModelDetails:
        """What a version's file says of itself."""

    async def install(
        self, name: str, path: Path, sha256: str, progress: InstallProgress | None = None
    ) -> bool:
        """Take a GGUF as a new version; False if it was there already. It writes down how far it is.

        Raises AlreadyExists (same name, other bytes), Precondition (no such file, other sha256, no GGUF), and
        Exhausted (a full disk).
        """

    async def remove(self, name: str) -> bool:
        """Delete a version; False if there was none."""

    async def shrink(self, context_tokens: int) -> None:
        """Let go of the GPU: unload everything, and load on the processor from now on, with this context."""

    async def grow(self) -> None:
        """Unload everything, and load as before `shrink` from now on."""

    async def check(self) -> None:
        """Return if the engine answers; raises EngineUnavailable otherwise."""

    async def close(self) -> None:
        """Stop what this adapter started."""


@dataclass(frozen=True, slots=True)
class SpoolState:
    """Depth of the spool: records and bytes not yet stored, seconds since the oldest was written."""

    records: int
    bytes: int
    oldest_seconds: float
    max_bytes: int

    @property
    def full(self) -> bool:
        """Whether new work must be refused."""
        return self.bytes >= self.max_bytes


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU now: how busy it was in its last sampling period (0 to 1), and its memory in bytes."""

    id: str
    utilization: float
    memory_used: int
    memory_total: int


@dataclass(frozen=True, slots=True)
class GpuDetail:
    """A GPU as an operator wants to see it: its temperature in degrees Celsius, and bytes by process id.

    What the driver does not tell is None, or not there: a container may not see the host's processes.
    """

    gpu: Gpu
    name: str
    temperature: int | None
    processes: tuple[tuple[int, int], ...]


class Spool(Protocol):
    """The durable queue in front of Postgres: an append returns when its record is on disk."""

    async def append(self, record: LogRecord) -> None:
        """Fsync one record. Raises SpoolFull, for a start record or feedback, when there is no room.

        An end record is always taken: room for the ends of all accepted inferences is kept back.
        """

    def state(self) -> SpoolState:
        """Depth now."""

    async def close(self) -> None:
        """Refuse further records and close the files."""


class LogStore(Protocol):
    """Where the spool's records end up; storing one twice changes nothing."""

    async def store(self, records: Sequence[LogRecord]) -> None:
        """Store a batch in order, in one transaction. Raises StoreUnavailable.

        Raises ValueError for a record that the database will never take (it is then dead-lettered alone).
        """

    async def history(self) -> str:
        """A name, in ASCII, that is another once the database may lack what it has acknowledged.

        As after a restore, or where a standby took over. Raises StoreUnavailable.
        """


class Observer(Protocol):
    """Who counts what happens."""

    def refused(self, error: AgentLoopError) -> None:
        """A request was not accepted."""

    def accepted(self, start: InferenceStarted) -> None:
        """A start record is on disk."""

    def ended(self, start: InferenceStarted, end: InferenceEnded, error: BaseException | None) -> None:
        """The end record of an accepted inference is on disk; `error` is what ended it, if not itself."""

    def embedded(self, model_version: str, texts: int, input_tokens: int) -> None:
        """Texts were turned into vectors."""


class Elsewhere(Protocol):
    """The other servers that share this one's log."""

    async def cancel(self, inference_id: UUID, caller: str | None) -> bool:
        """Have whichever runs it end it, if it is of `caller` (None: anybody's); False if none runs it.

        Takes about a second at most. Raises Unavailable where that cannot be known: the database is down, or
        the server that runs it does not answer; Exhausted where too many wait already.
        """


class LogReader(Protocol):
    """The stored log, read back. Raises StoreUnavailable."""

    async def get(self, inference_id: UUID, caller: str) -> LoggedInference | None:
        """One inference with its texts and newest feedback; of `caller`, if that is not empty."""

    async def page(self, wanted: LogFilter, below: UUID | None, size: int) -> LogPage:
        """At most `size` inferences by falling id, those below `below`, without their texts.

        A page looks at a bounded number of rows, and may hold none and still have a next one.
        """


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A token as stored: a hash of its secret, never the secret."""

    key_id: str
    name: str
    secret_sha256: bytes
    scopes: frozenset[Scope]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    limits: Limits = NO_LIMITS
    learning: bool = True
    text: bool = True

    def caller(self) -> Caller:
        """The caller that this token speaks for."""
        return Caller(
            self.key_id,
            self.name,
            self.scopes,
            learning=self.learning and self.text,  # where there is no text there is nothing to learn
            text=self.text,
            limits=self.limits,
        )


class TokenStore(Protocol):
    """API tokens. Raises StoreUnavailable."""

    async def all_tokens(self) -> list[TokenRecord]:
        """Every token, the revoked ones too."""

    async def create(self, token: TokenRecord, by: str = "") -> None:
        """Store a new token; `by` is who made it, for its event."""

    async def revoke(self, key_id: str, at: datetime, by: str = "") -> bool:
        """Revoke it; False if there is none, or it is revoked already."""

    async def limit(self, key_id: str, limits: Limits, by: str = "") -> bool:
        """Replace its limits; False if there is none, or it is revoked."""


class EventStore(Protocol):
    """Who changed what. Raises StoreUnavailable."""

    async def note(self, kind: str, actor: str, subject: str, detail: JsonObject) -> None:
        """Keep an event."""


class LeaseStore(Protocol):
    """Whom this server has lent its GPU to. Raises StoreUnavailable."""

    async def keep(self, lease: KeptLease) -> None:
        """Keep the lease, in place of any other."""

    async def find(self) -> KeptLease | None:
        """The lease, by the store's clock; its seconds may be negative."""

    async def forget(self, lease_id: UUID) -> None:
        """Keep it no longer."""


class RouteStore(Protocol):
    """Routes. Raises StoreUnavailable."""

    async def all_routes(self) -> list[Route]:
        """Every route."""

    async def set_route(self, route: Route, changed_by: str) -> Route:
        """Compare-and-set by `route.revision`; returns it with its new revision. Raises Conflict."""


class Authenticator(Protocol):
    """Turns a bearer token into a caller."""

    async def authenticate(self, token: str) -> Caller:
        """Raises Unauthenticated."""


class Routes(Protocol):
    """The routes in force, read from memory."""

    def get(self, alias: str) -> Route:
        """The route of `alias`. Raises NotFound."""

    def all(self) -> list[Route]:
        """Every route, by alias."""

    async def set(self, route: Route, changed_by: str) -> Route:
        """Compare-and-set by `route.revision`. Raises Conflict, StoreUnavailable."""
