# ruff: noqa: N818 - the names are the words of gRPC, which every caller knows
"""Every error that the service raises on purpose; its text is for the caller, so it never quotes a prompt.

AgentLoopError
├── InvalidArgument        the request is wrong; `field` names what
│   └── PromptTooLong      more tokens than the context holds
├── Unauthenticated        no token, or none that is valid; no hint of which part was wrong
├── PermissionDenied       the token is valid, its scopes do not allow this
├── NotFound               no such alias, model version, …
├── AlreadyExists          the name is taken, by other bytes
├── Precondition           true later, or after another step (`FAILED_PRECONDITION`)
├── Conflict               compare-and-set lost: read again, then try again (`ABORTED`)
├── Exhausted              no place left (`RESOURCE_EXHAUSTED`)
│   ├── SpoolFull          the log has no room, so no new work is accepted
│   ├── QueueFull          all places are taken, and as many wait as may
│   ├── CallerQueueFull    as many of this caller's requests wait as may
│   ├── QueueTimeout       no place became free in time
│   ├── CannotFinish       the answer could not be complete, or begin, within its deadline
│   ├── GpuLent            the GPU is lent to somebody else
│   └── MemoryLow          less memory is free than is kept
├── DeadlineExceeded       the caller's deadline, or the default one, has passed
├── Cancelled              the caller, or an administrator, cancelled the inference by its id
├── Unavailable            try again later
│   ├── EngineUnavailable  the engine is down, or its stream broke off
│   ├── HandedOver         the GPU trains, or is on its way there or back
│   ├── StoreUnavailable   Postgres is down
│   └── ShuttingDown       this server is going away
└── EngineFailed           the engine answered nonsense (`INTERNAL`)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpc_server.domain.types import InferenceEnded


class AgentLoopError(Exception):
    """What the caller reads is `str(error)`: what was wrong, which value, what to do.

    `ended` is how an inference ended that had begun, where the error is its end.
    """

    ended: InferenceEnded | None = None


class InvalidArgument(AgentLoopError):
    """The request is wrong. `field` is the path of the wrong field, as in the proto."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class PromptTooLong(InvalidArgument):
    """The prompt has more tokens than the context holds: `tokens`, None where the engine does not say."""

    def __init__(self, message: str, tokens: int | None = None) -> None:
        super().__init__(message, "messages")
        self.tokens = tokens

    @classmethod
    def by(cls, tokens: int | None, context: int | None) -> PromptTooLong:
        """With both numbers, where they are known."""
        return cls(
            f"the prompt has {'too many' if tokens is None else tokens} tokens, and the context holds"
            f" {'fewer' if context is None else context}; shorten it",
            tokens,
        )


class Unauthenticated(AgentLoopError):
    """No token, or none that is valid. The text is always the same: no hint of which part was wrong."""

    def __init__(self, message: str = "a valid token is needed: authorization: Bearer al_…") -> None:
        super().__init__(message)


class PermissionDenied(AgentLoopError):
    """The token is valid, but its scopes do not allow this."""


class NotFound(AgentLoopError):
    """There is no such alias, model version or record."""


class AlreadyExists(AgentLoopError):
    """The name is taken by something else."""


class Precondition(AgentLoopError):
    """The state of things does not allow this now."""


class Conflict(AgentLoopError):
    """A compare-and-set found another revision than the one given."""


class Exhausted(AgentLoopError):
    """There is no place left: try again later, or elsewhere.

    `retry_after_seconds` is when that may help, None where time alone does not (a full disk). `subject` is
    whose quota is used up: "server" for what all callers share, else "caller:<name>".
    """

    def __init__(
        self, message: str, *, retry_after_seconds: float | None = 1.0, subject: str = "server"
    ) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
        self.subject = subject


class SpoolFull(Exhausted):
    """The spool has no room: no new work is accepted until Postgres has taken some."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after_seconds=5.0)


class QueueFull(Exhausted):
    """All places are taken, and as many requests wait as may."""


class CallerQueueFull(Exhausted):
    """As many of this caller's requests wait as may."""


class QueueTimeout(Exhausted):
    """No place became free in time."""


class CannotFinish(Exhausted):
    """By what was measured, the answer could not be complete, or not even begin, within its deadline."""


class GpuLent(Exhausted):
    """The GPU is lent already; the text says to whom, and until when."""


class ModelsFull(Exhausted):
    """The models would take more bytes than they may."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after_seconds=None)


class MemoryLow(Exhausted):
    """This machine has less free memory than is kept."""


class DeadlineExceeded(AgentLoopError):
    """The deadline has passed."""


class Cancelled(AgentLoopError):
    """The inference was cancelled by its id, which its caller and administrators may."""


class Unavailable(AgentLoopError):
    """Something that is needed is down; try again after `retry_after_seconds`."""

    def __init__(self, message: str, *, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class EngineUnavailable(Unavailable):
    """The engine is down, or its stream ended without its last word."""


class HandedOver(Unavailable):
    """The GPU is lent to a training, or on its way there or back."""


class StoreUnavailable(Unavailable):
    """Postgres is down or cannot be reached."""


class ShuttingDown(Unavailable):
    """This server is going away; another may answer."""


class EngineFailed(AgentLoopError):
    """The engine answered nonsense."""


ELSEWHERE = (EngineUnavailable, EngineFailed, NotFound)
"""What another version, or another engine, may do better. A caller's mistake is wrong everywhere."""
