"""The one way to an answer: authorise, check, admit, route, record the start, stream, record the end.

Transports and agents call `Inference.chat`; nothing goes around it. An inference is *accepted* once its start
record is on disk, which is before its first event leaves; from then on exactly one end record follows,
whatever happens: a full answer, a caller who goes away, a deadline, an engine that breaks, a shutdown.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol
from uuid import UUID

from uuid6 import uuid7

from grpc_server.admission import Admission, Ask, Place, cost_of
from grpc_server.domain import chat_format, rules
from grpc_server.domain.errors import (
    AgentLoopError,
    DeadlineExceeded,
    EngineUnavailable,
    Exhausted,
    InvalidArgument,
    ShuttingDown,
)
from grpc_server.domain.plain import message_to_plain, request_to_plain
from grpc_server.domain.ports import Engine, Finished, Generation, Routes, Spool
from grpc_server.domain.types import (
    Caller,
    ChatEvent,
    ChatRequest,
    Completed,
    FinishReason,
    InferenceEnded,
    InferenceStarted,
    JsonObject,
    Message,
    Priority,
    Role,
    Started,
    Status,
    Target,
    TargetRole,
    TextDelta,
    Timings,
    ToolCall,
    ToolChoice,
    Usage,
)
from grpc_server.uninterrupted import uninterrupted

log = logging.getLogger(__name__)

Emit = Callable[[ChatEvent], Awaitable[None]]

DEADLINE_SLACK = 0.02
"""Share of a deadline. A caller's own deadline fires before ours: gRPC rounds timeouts up by at most 1 %."""
DEADLINE_SLACK_SECONDS = 0.05
"""The least slack: what a cancellation may take to arrive."""


class Observer(Protocol):
    """Who counts what happens."""

    def refused(self, error: AgentLoopError) -> None:
        """A request was not accepted."""

    def accepted(self, start: InferenceStarted) -> None:
        """A start record is on disk."""

    def ended(self, start: InferenceStarted, end: InferenceEnded, error: BaseException | None) -> None:
        """The end record of an accepted inference is on disk; `error` is what ended it, if not itself."""


@dataclass(slots=True, eq=False)
class _Running:
    """One request on its way, and what is known of its answer so far. Times are `monotonic` seconds."""

    caller: Caller
    request: ChatRequest
    emit: Emit
    seconds: float
    started_at: datetime
    arrived: float
    priority: Priority = Priority.INTERACTIVE
    limit: asyncio.Timeout | None = None
    place: Place | None = None
    interrupted: bool = False
    placed: float = 0.0
    accepted: bool = False
    text: list[str] = field(default_factory=list)
    call: ToolCall | None = None
    first_token: float | None = None
    finished: Finished | None = None

    def message(self) -> Message:
        if self.call is not None:
            return Message(Role.ASSISTANT, tool_calls=(self.call,))
        return Message(Role.ASSISTANT, "".join(self.text))

    def usage(self) -> Usage:
        """As the engine counted; where the answer was cut off, the pieces that arrived."""
        return self.finished.usage if self.finished is not None else Usage(0, len(self.text))

    def timings(self, now: float) -> Timings:
        ttft = None if self.first_token is None else (self.first_token - self.arrived) * 1000
        return Timings((self.placed - self.arrived) * 1000, ttft, (now - self.arrived) * 1000)

    def ask(self, model_version: str, *, shadow: bool) -> Ask:
        """What admission is to know; a shadow takes nobody's share."""
        caller, cost = ("", 0.0) if shadow else (self.caller.name, cost_of(self.request))
        return Ask(caller, self.priority, cost, model_version, self.request.sampling.max_tokens, self.seconds)

    def finish_reason(self) -> FinishReason | None:
        if self.call is not None:
            return FinishReason.TOOL_CALLS
        return None if self.finished is None else self.finished.finish_reason

    def out_of_time(self) -> bool:
        """Whether a cancellation that arrives now is that of the deadline."""
        if self.limit is None:
            return False
        if self.limit.expired():
            return True
        when = self.limit.when()
        slack = max(DEADLINE_SLACK_SECONDS, self.seconds * DEADLINE_SLACK)
        return when is not None and when - asyncio.get_running_loop().time() <= slack


class Inference:
    """The pipeline, with everything that it needs from the outside."""

    def __init__(
        self,
        engine: Engine,
        spool: Spool,
        routes: Routes,
        observer: Observer,
        *,
        admission: Admission | None = None,
        server_id: str = "server",
        default_deadline_seconds: float = 300,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
        new_id: Callable[[], UUID] = uuid7,
    ) -> None:
        self.admission = admission or Admission(engine.parallel)
        self._engine = engine
        self._spool = spool
        self._routes = routes
        self._observer = observer
        self._server_id = server_id
        self._default_deadline = default_deadline_seconds
        self._now = now
        self._monotonic = monotonic
        self._draw = draw
        self._new_id = new_id
        self._closing = False
        self._running: set[_Running] = set()
        self._shadows: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def chat(
        self,
        caller: Caller,
        request: ChatRequest,
        emit: Emit,
        *,
        seconds: float | None = None,
        priority: Priority = Priority.INTERACTIVE,
    ) -> None:
        """Answer `request` within `seconds`, awaiting `emit` for each event; returns after Completed.

        Before the request is accepted it raises PermissionDenied, InvalidArgument, NotFound, Exhausted,
        DeadlineExceeded or ShuttingDown. After that, when the log has a row, it raises what the engine
        raised, DeadlineExceeded, ShuttingDown, or CancelledError where the caller's task was cancelled.
        """
        seconds = self._default_deadline if seconds is None else seconds
        running = _Running(caller, request, emit, seconds, self._now(), self._monotonic(), priority)
        try:
            rules.authorise(caller, request)
            rules.check_chat(request)
            await self._within_limit(running)
        except AgentLoopError as error:
            if not running.accepted:
                self._observer.refused(error)
            raise

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new requests, let those that run finish, and end the rest when the grace period is over."""
        self._closing = True
        try:
            async with asyncio.timeout(grace_seconds):
                await self._idle.wait()
        except TimeoutError:
            for running in self._running:
                running.interrupted = True
                if running.limit is not None and not running.limit.expired():
                    running.limit.reschedule(asyncio.get_running_loop().time())
            await self._idle.wait()

    async def _within_limit(self, running: _Running, shadow: Target | None = None) -> None:
        if self._closing:
            raise ShuttingDown("this server is shutting down; ask again")
        self._running.add(running)
        self._idle.clear()
        try:
            async with asyncio.timeout(running.seconds) as running.limit:
                # An unknown alias, or a shadow without a free place, need not wait for one.
                expected = shadow.model_version if shadow else self._expected_version(running.request)
                ask = running.ask(expected, shadow=shadow is not None)
                async with self.admission.place(ask, wait=shadow is None) as running.place:
                    running.placed = self._monotonic()
                    await self._answer(running, shadow or self._target(running.request))
        except TimeoutError as error:
            if running.limit is None or not running.limit.expired():
                raise
            raise self._out_of_time(running) from error
        finally:
            self._running.discard(running)
            if not self._running:
                self._idle.set()

    def _expected_version(self, request: ChatRequest) -> str:
        """The version that most requests like this go to, before it is chosen. Raises NotFound."""
        if request.model_version:
            return request.model_version
        targets = self._routes.get(request.alias).targets
        return max(targets, key=lambda t: (t.role is not TargetRole.SHADOW, t.weight)).model_version

    def _target(self, request: ChatRequest) -> Target:
        if request.model_version:
            return Target(request.model_version, TargetRole.STABLE, 100)
        return rules.choose_target(self._routes.get(request.alias), request.session_id, self._draw())

    async def _answer(self, running: _Running, target: Target) -> None:
        request = running.request
        generation = _generation(request, target.model_version)
        start = InferenceStarted(
            id=self._new_id(),
            server_id=self._server_id,
            caller=running.caller.name,
            key_id=running.caller.key_id,
            alias=request.alias,
            model_version=target.model_version,
            target_role=target.role,
            session_id=request.session_id,
            request=request_to_plain(request),
            started_at=running.started_at,
        )
        try:
            await uninterrupted(self._accept(running, start))
            await running.emit(Started(start.id, start.model_version))
            self._ask_shadows(running, target)
            await self._stream(running, generation)
        except BaseException as error:
            if running.accepted:
                await self._record_failure(running, start, error)
            raise
        end = self._end(running, start, Status.OK, "")
        await uninterrupted(self._record(start, end))
        assert end.finish_reason is not None  # noqa: S101 - a stream that ended by itself says why
        await running.emit(Completed(end.finish_reason, end.usage, end.timings))

    async def _accept(self, running: _Running, start: InferenceStarted) -> None:
        await self._spool.append(start)
        running.accepted = True
        self._observer.accepted(start)

    async def _stream(self, running: _Running, generation: Generation) -> None:
        """Send text as it comes, but hold back to its end what begins like a tool call."""
        tools = running.request.tools if running.request.tool_choice is not ToolChoice.NONE else ()
        holding, held = bool(tools), ""
        async with aclosing(self._engine.generate(generation)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    running.finished = event
                    break
                if running.first_token is None:
                    running.first_token = self._monotonic()
                running.text.append(event.text)
                if not holding:
                    await running.emit(TextDelta(event.text))
                    continue
                held += event.text
                if held.strip() and not held.lstrip().startswith("{"):
                    await running.emit(TextDelta(held))
                    holding, held = False, ""
        if running.finished is None:
            raise EngineUnavailable("the engine's stream ended before the answer did; ask again")
        if not held:
            return
        running.call = _tool_call(held, tools)
        await running.emit(TextDelta(held) if running.call is None else running.call)

    def _end(self, running: _Running, start: InferenceStarted, status: Status, error: str) -> InferenceEnded:
        now = self._monotonic()
        timings = running.timings(now)
        usage = running.usage()
        if running.place is not None:
            running.place.used(usage.input_tokens + usage.output_tokens)
        if status is Status.OK and running.first_token is not None:
            first = running.first_token - running.placed
            self.admission.times.answered(
                start.model_version, first, now - running.placed, usage.output_tokens
            )
        # Not a second look at the clock, which may have been set back meanwhile.
        ended_at = running.started_at + timedelta(milliseconds=timings.total_ms)
        return InferenceEnded(
            id=start.id,
            status=status,
            finish_reason=running.finish_reason(),
            answer=message_to_plain(running.message()),
            usage=usage,
            timings=timings,
            error=error,
            ended_at=ended_at,
        )

    async def _record(
        self, start: InferenceStarted, end: InferenceEnded, error: BaseException | None = None
    ) -> None:
        await self._spool.append(end)
        self._observer.ended(start, end, error)

    async def _record_failure(self, running: _Running, start: InferenceStarted, error: BaseException) -> None:
        status, text = _failure(running, error)
        end = self._end(running, start, status, text)
        try:
            await uninterrupted(self._record(start, end, error))
        except Exception:  # the first error is the one to tell; the next start of the server marks it aborted
            log.exception("the end of an inference was not recorded", extra={"inference_id": str(start.id)})

    def _out_of_time(self, running: _Running) -> AgentLoopError:
        if running.interrupted:
            return ShuttingDown("this server shut down before the answer was complete; ask again")
        return DeadlineExceeded(f"no complete answer within {running.seconds:.3g} s")

    def _ask_shadows(self, running: _Running, target: Target) -> None:
        """Ask the route's shadows too, in the background and only where a place is free."""
        request = running.request
        if request.model_version or target.role is TargetRole.SHADOW:
            return
        for shadow in rules.choose_shadows(self._routes.get(request.alias), self._draw()):
            copy = _Running(
                running.caller, request, _discard, self._default_deadline, self._now(), self._monotonic()
            )
            task = asyncio.create_task(self._shadow(copy, shadow))
            self._shadows.add(task)
            task.add_done_callback(self._shadows.discard)

    async def _shadow(self, running: _Running, target: Target) -> None:
        try:
            await self._within_limit(running, target)
        except Exhausted:
            log.debug("a shadow was not asked: no free place")
        except Exception:
            log.warning("a shadow failed", extra={"model_version": target.model_version}, exc_info=True)


def _generation(request: ChatRequest, model_version: str) -> Generation:
    schema: JsonObject | None = request.response_schema
    if request.tool_choice is ToolChoice.REQUIRED:
        schema = chat_format.tool_call_schema(request.tools)
    try:
        prompt = chat_format.render(
            request.messages, request.tools, request.tool_choice, request.response_schema
        )
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"messages cannot be rendered: {error}", "messages") from error
    stop = tuple(dict.fromkeys((*chat_format.STOP, *request.sampling.stop)))
    return Generation(model_version, prompt, request.sampling, stop, schema)


def _tool_call(text: str, tools: tuple[Any, ...]) -> ToolCall | None:
    """The call that `text` is; none if its arguments hold half a surrogate pair, which UTF-8 cannot."""
    call = chat_format.parse_tool_call(text, tools)
    if call is None:
        return None
    try:
        rules.check_json("arguments", call.arguments)
    except InvalidArgument:
        return None
    return call


def _failure(running: _Running, error: BaseException) -> tuple[Status, str]:
    """How an inference ended that did not end by itself, and what the log says of it (never a prompt)."""
    if isinstance(error, asyncio.CancelledError):
        if running.interrupted:
            return Status.ERROR, "the server shut down before the answer was complete"
        return (Status.DEADLINE if running.out_of_time() else Status.CANCELLED), ""
    if isinstance(error, AgentLoopError):
        return Status.ERROR, str(error)
    return Status.ERROR, f"unexpected {type(error).__name__}"


async def _discard(event: ChatEvent) -> None:
    """A shadow's answer goes nowhere but the log."""
