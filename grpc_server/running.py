"""One request on its way through the pipeline: what is known of its answer so far, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from grpc_server.admission import Ask, Place, cost_of
from grpc_server.ahead import Ahead
from grpc_server.domain.errors import AgentLoopError, Cancelled, DeadlineExceeded
from grpc_server.domain.plain import message_to_plain
from grpc_server.domain.ports import Finished, Piece
from grpc_server.domain.types import (
    Attempt,
    Caller,
    ChatEvent,
    EmbedRequest,
    FinishReason,
    InferenceEnded,
    InferenceRequest,
    InferenceStarted,
    Message,
    Priority,
    Role,
    Status,
    Target,
    Timings,
    ToolCall,
    Usage,
)

Emit = Callable[[ChatEvent], Awaitable[None]]

DEADLINE_SLACK = 0.02
"""Share of a deadline. A caller's own deadline fires before ours: gRPC rounds timeouts up by at most 1 %."""
DEADLINE_SLACK_SECONDS = 0.05
"""The least slack: what a cancellation may take to arrive."""


@dataclass(slots=True, eq=False)
class Running:
    """One request on its way, and what is known of its answer so far. Times are `monotonic` seconds.

    `prompt_tokens` is an estimate. `answers` is false where tokens are only counted, or vectors made.
    `stopped` is the error that ends it from outside: a shutdown, or a cancellation by its id. `asked` is who
    is to answer, after those that `failed`; `announced` is whether the caller has been told. `ahead` is the
    first one's stream.
    """

    caller: Caller
    request: InferenceRequest | EmbedRequest
    emit: Emit
    seconds: float
    started_at: datetime
    arrived: float
    priority: Priority = Priority.INTERACTIVE
    prompt_tokens: int = 0
    answers: bool = True
    place: Place | None = None
    limit: asyncio.Timeout | None = None
    stopped: AgentLoopError | None = None
    placed: float = 0.0
    ahead: Ahead | None = None
    accepted: bool = False
    asked: Target | None = None
    failed: list[Attempt] = field(default_factory=list)
    announced: bool = False
    text: list[str] = field(default_factory=list)
    tokens: int = 0
    call: ToolCall | None = None
    first_token: float | None = None
    counted: Usage | None = None
    finished: Finished | None = None
    end: InferenceEnded | None = None

    @property
    def answering(self) -> str:
        """The model version that is asked, or was last."""
        return "" if self.asked is None else self.asked.model_version

    def stop(self, error: AgentLoopError) -> None:
        """End it now, with `error`."""
        if self.stopped is not None:
            return
        self.stopped = error
        if self.limit is not None and not self.limit.expired():
            self.limit.reschedule(asyncio.get_running_loop().time())

    def take(self, piece: Piece) -> None:
        """Some text has come."""
        self.text.append(piece.text)
        self.tokens += piece.tokens
        if piece.usage is not None or self.counted is not None:
            before = self.counted or Usage()
            self.counted = piece.usage or Usage(before.input_tokens, self.tokens)

    def fail_over(self, error: AgentLoopError) -> None:
        """Whoever was asked has failed, and another is to be."""
        if self.asked is not None:
            name, role = self.asked.model_version, self.asked.role
            self.failed.append(Attempt(name, role, type(error).__name__, str(error)))

    def attempts(self) -> tuple[Attempt, ...]:
        """Everyone who was asked, if that was more than one."""
        if not self.failed or self.asked is None:
            return ()
        return (*self.failed, Attempt(self.asked.model_version, self.asked.role))

    def message(self) -> Message:
        """The answer, or what there is of it."""
        if self.call is not None:
            return Message(Role.ASSISTANT, tool_calls=(self.call,))
        return Message(Role.ASSISTANT, "".join(self.text))

    def usage(self) -> Usage:
        """As the engine counted; where the answer was cut off, and the engine did not say, what came."""
        if self.finished is not None:
            return self.finished.usage
        return self.counted or Usage(0, self.tokens)

    def timings(self, now: float) -> Timings:
        """Until `now`."""
        ttft = None if self.first_token is None else (self.first_token - self.arrived) * 1000
        return Timings((self.placed - self.arrived) * 1000, ttft, (now - self.arrived) * 1000)

    def ask(self, model_version: str, *, shadow: bool) -> Ask:
        """What admission is to know; a shadow takes nobody's share.

        What does not answer does not take as long as answers of the version do: no version is named for it.
        """
        caller, cost = ("", 0.0) if shadow else (self.caller.name, cost_of(self.request, self.prompt_tokens))
        if not self.answers or isinstance(self.request, EmbedRequest):
            return Ask(caller, self.priority, cost, seconds=self.seconds)
        return Ask(caller, self.priority, cost, model_version, self.request.sampling.max_tokens, self.seconds)

    def used(self, tokens: int) -> None:
        """So many tokens were read and written; the caller's share of the places is reckoned by them."""
        if self.place is not None:
            self.place.used(tokens)

    def may_write(self) -> int:
        """At most so many tokens are written for it."""
        if not self.answers or isinstance(self.request, EmbedRequest):
            return 0
        return self.request.sampling.max_tokens

    def tokens_used(self) -> int:
        """What counts for the caller's quota: its prompt as estimated, where the engine has not told."""
        if self.answers:
            usage = self.usage()
            return (usage.input_tokens or self.prompt_tokens) + usage.output_tokens if self.accepted else 0
        return self.place.tokens if self.place is not None else 0

    def finish_reason(self) -> FinishReason | None:
        """Why the answer ended, if it ended by itself."""
        if self.call is not None:
            return FinishReason.TOOL_CALLS
        return None if self.finished is None else self.finished.finish_reason

    def ended(self, start: InferenceStarted, status: Status, error: str, timings: Timings) -> InferenceEnded:
        """The end record."""
        usage = self.usage()
        self.used(usage.input_tokens + usage.output_tokens)
        return InferenceEnded(
            id=start.id,
            status=status,
            finish_reason=self.finish_reason(),
            answer=message_to_plain(self.message()),
            usage=usage,
            timings=timings,
            error=error,
            # Not a second look at the clock, which may have been set back meanwhile.
            ended_at=self.started_at + timedelta(milliseconds=timings.total_ms),
            attempts=self.attempts(),
        )

    def failure(self, error: BaseException) -> tuple[Status, str]:
        """How it ended that did not end by itself, and what the log says of it (never a prompt)."""
        if isinstance(error, asyncio.CancelledError):
            if isinstance(self.stopped, Cancelled):
                return Status.CANCELLED, ""
            if self.stopped is not None:
                return Status.ERROR, "the server shut down before the answer was complete"
            return (Status.DEADLINE if self._out_of_time() else Status.CANCELLED), ""
        if isinstance(error, AgentLoopError):
            return Status.ERROR, str(error)
        return Status.ERROR, f"unexpected {type(error).__name__}"

    def out_of_time(self) -> AgentLoopError:
        """The error for a time limit that is over."""
        if self.stopped is not None:
            return self.stopped
        return DeadlineExceeded(f"no complete answer within {self.seconds:.3g} s")

    def _out_of_time(self) -> bool:
        """Whether a cancellation that arrives now is that of the deadline."""
        if self.limit is None:
            return False
        if self.limit.expired():
            return True
        when = self.limit.when()
        slack = max(DEADLINE_SLACK_SECONDS, self.seconds * DEADLINE_SLACK)
        return when is not None and when - asyncio.get_running_loop().time() <= slack
