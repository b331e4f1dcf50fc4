"""The one way to an answer: authorise, check, admit, route, record the start, stream, record the end.

Transports and agents call `Inference`; nothing goes around it. An inference is *accepted* once its start
record is on disk, which is before its first event leaves; from then on exactly one end record follows,
whatever happens: a full answer, a caller who goes away, a deadline, an engine that breaks, a shutdown.
Counting tokens and making vectors take the same way to a place, and leave no record.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from typing import TypeVar
from uuid import UUID

from uuid6 import uuid7

from grpc_server.admission import Admission
from grpc_server.ahead import Ahead
from grpc_server.cancellation import asked_for
from grpc_server.domain import rules
from grpc_server.domain.errors import (
    ELSEWHERE,
    AgentLoopError,
    Cancelled,
    EngineUnavailable,
    Exhausted,
    NotFound,
    PromptTooLong,
    ShuttingDown,
)
from grpc_server.domain.held_call import held
from grpc_server.domain.plain import request_to_plain
from grpc_server.domain.ports import Elsewhere, Engine, Finished, Generation, Observer, Piece, Routes, Spool
from grpc_server.domain.types import (
    Caller,
    ChatEvent,
    ChatRequest,
    Completed,
    Embeddings,
    EmbedRequest,
    GenerateRequest,
    InferenceEnded,
    InferenceRequest,
    InferenceStarted,
    Priority,
    Scope,
    Started,
    Status,
    Target,
    TargetRole,
    TextDelta,
    Usage,
)
from grpc_server.generation import generation_of, offered_tools, tool_call
from grpc_server.quotas import Quotas
from grpc_server.running import Emit, Running
from grpc_server.uninterrupted import uninterrupted

log = logging.getLogger(__name__)

Result = TypeVar("Result")

LATE_COUNT_SECONDS = 2.0
"""What an engine gets to count the prompt of an answer that was cut off. It holds that prompt already."""


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
        quotas: Quotas | None = None,
        elsewhere: Elsewhere | None = None,
        server_id: str = "server",
        default_deadline_seconds: float = 300,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
        new_id: Callable[[], UUID] = uuid7,
    ) -> None:
        self.admission = admission or Admission(engine.parallel)
        self._quotas = quotas or Quotas(monotonic=monotonic)
        self._elsewhere = elsewhere
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
        self._paused: Callable[[], AgentLoopError] | None = None
        self._running: set[Running] = set()
        self._accepted: dict[UUID, Running] = {}
        self._shadows: set[asyncio.Task[None]] = set()
        self._shadowing: dict[Running, None] = {}  # by age
        self._idle = asyncio.Event()
        self._idle.set()

    async def chat(
        self,
        caller: Caller,
        request: InferenceRequest,
        emit: Emit,
        *,
        seconds: float | None = None,
        priority: Priority = Priority.INTERACTIVE,
    ) -> None:
        """Answer `request` within `seconds`, awaiting `emit` for each event; returns after Completed.

        A raw prompt takes the same way; control tokens in it count only where an administrator asks.

        Before the request is accepted it raises PermissionDenied, InvalidArgument, NotFound, Exhausted (for a
        quota too), DeadlineExceeded or ShuttingDown. After that, when the log has a row, it raises what the
        engine raised, DeadlineExceeded, ShuttingDown, Cancelled (by its id), or CancelledError where the
        caller's task was cancelled; the `ended` of these errors is the end record.
        """
        running = self._arrived(caller, request, emit, seconds, priority)

        async def answer(target: Target) -> None:
            await self._answer(running, request, target)

        await self._guarded(running, lambda: self._target(request), answer)

    async def count_tokens(
        self,
        caller: Caller,
        request: InferenceRequest,
        *,
        seconds: float | None = None,
        priority: Priority = Priority.INTERACTIVE,
    ) -> tuple[int, str]:
        """The tokens that `request` would be read as, and the model version that would read them.

        Raises as `chat` before it is accepted, and what the engine raises.
        """
        running = self._arrived(caller, request, _discard, seconds, priority)
        running.answers = False

        async def count(target: Target) -> tuple[int, str]:
            generation = generation_of(caller, request, target.model_version)
            tokens = await self._engine.count_tokens(target.model_version, generation.prompt)
            running.used(tokens)
            return tokens, target.model_version

        return await self._guarded(running, lambda: self._target(request), count)

    async def embed(
        self,
        caller: Caller,
        request: EmbedRequest,
        *,
        seconds: float | None = None,
        priority: Priority = Priority.INTERACTIVE,
    ) -> tuple[Embeddings, str]:
        """One vector a text, and the model version that made them: the stable one, as no two compare.

        Raises as `chat` before it is accepted, what the engine raises, and Precondition where it makes none.
        """
        running = self._arrived(caller, request, _discard, seconds, priority)
        running.answers = False

        def target() -> Target:
            named = _named(request.model_version)
            return named or rules.stable_target(self._routes.get(request.alias))

        async def embed(target: Target) -> tuple[Embeddings, str]:
            made = await self._engine.embed(target.model_version, request.texts)
            running.used(made.input_tokens)
            self._observer.embedded(target.model_version, len(request.texts), made.input_tokens)
            return made, target.model_version

        return await self._guarded(running, target, embed)

    async def cancel(self, caller: Caller, inference_id: UUID) -> None:
        """End an inference with Cancelled, on whichever server: the caller's own by name, an admin's any.

        Raises:
            NotFound: for every other id, with the same text.
            Unavailable, Exhausted: it does not run here, and that it runs nowhere cannot be told.
        """
        name = None if caller.may(Scope.ADMIN) else caller.name
        if self.end_here(inference_id, name):
            return
        if self._elsewhere is None or not await self._elsewhere.cancel(inference_id, name):
            raise NotFound(f"no inference {inference_id} of yours is running")

    def end_here(self, inference_id: UUID, caller: str | None) -> bool:
        """End it if it runs on this server, and is of that caller (None: of anybody); whether it was so."""
        running = self._accepted.get(inference_id)
        if running is None or caller not in (None, running.caller.name):
            return False
        running.stop(Cancelled("the inference was cancelled by its id"))
        return True

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new requests, let those that run finish, and end the rest when the grace period is over."""
        self._closing = True
        text = "this server shut down before the answer was complete; ask again"
        await self._ended(grace_seconds, lambda: ShuttingDown(text))

    async def pause(self, refusal: Callable[[], AgentLoopError], grace_seconds: float) -> None:
        """Refuse new requests so until `resume`; returns when none runs. What lasts longer ends so, too."""
        self._paused = refusal
        await self._ended(grace_seconds, refusal)

    def resume(self) -> None:
        """Take requests again."""
        self._paused = None

    async def _ended(self, grace_seconds: float, error: Callable[[], AgentLoopError]) -> None:
        try:
            async with asyncio.timeout(grace_seconds):
                await self._idle.wait()
        except TimeoutError:
            for running in self._running:
                running.stop(error())
            await self._idle.wait()

    def _arrived(
        self,
        caller: Caller,
        request: InferenceRequest | EmbedRequest,
        emit: Emit,
        seconds: float | None,
        priority: Priority = Priority.INTERACTIVE,
    ) -> Running:
        seconds = self._default_deadline if seconds is None else seconds
        return Running(caller, request, emit, seconds, self._now(), self._monotonic(), priority)

    async def _guarded(
        self, running: Running, target: Callable[[], Target], work: Callable[[Target], Awaitable[Result]]
    ) -> Result:
        """Do the work of a request that is allowed and sound, and tell who counts of one that is refused."""
        try:
            rules.authorise(running.caller, running.request)
            _check(running.request)
            running.prompt_tokens = rules.estimated_tokens(running.request)
            with self._quotas.hold(running.caller, running.prompt_tokens + running.may_write()) as held:
                try:
                    return await self._within_limit(running, target, work)
                finally:
                    held.used = running.tokens_used()
        except AgentLoopError as error:
            if isinstance(error, PromptTooLong):
                error.field = _prompt_field(running.request)
            error.ended = running.end
            if not running.accepted:
                self._observer.refused(error)
            raise

    async def _within_limit(
        self,
        running: Running,
        target: Callable[[], Target],
        work: Callable[[Target], Awaitable[Result]],
        *,
        shadow: Target | None = None,
    ) -> Result:
        if self._closing:
            raise ShuttingDown("this server is shutting down; ask again")
        if self._paused is not None:
            raise self._paused()
        self._running.add(running)
        self._idle.clear()
        try:
            async with asyncio.timeout(running.seconds) as running.limit:
                # An unknown alias, or a shadow without a free place, need not wait for one.
                expected = shadow.model_version if shadow else self._expected_version(running.request)
                ask = running.ask(expected, shadow=shadow is not None)
                if shadow is None:
                    self._make_room()
                async with self.admission.place(ask, wait=shadow is None) as running.place:
                    running.placed = self._monotonic()
                    return await work(target())
        except TimeoutError as error:
            if running.limit is None or not running.limit.expired():
                raise
            raise running.out_of_time() from error
        finally:
            self._running.discard(running)
            if not self._running:
                self._idle.set()

    def _expected_version(self, request: InferenceRequest | EmbedRequest) -> str:
        """The version that most requests like this go to, before it is chosen. Raises NotFound."""
        if request.model_version:
            return request.model_version
        targets = self._routes.get(request.alias).targets
        return max(targets, key=lambda t: (t.role is not TargetRole.SHADOW, t.weight)).model_version

    def _target(self, request: InferenceRequest) -> Target:
        named = _named(request.model_version)
        return named or rules.choose_target(self._routes.get(request.alias), request.session_id, self._draw())

    def _fallbacks(self, alias: str, chosen: Target) -> tuple[Target, ...]:
        """Whom to ask in place of `chosen`; nobody in that of a shadow."""
        if chosen.role is TargetRole.SHADOW:
            return ()
        return rules.fallbacks(self._routes.get(alias), chosen)

    async def _answer(self, running: Running, request: InferenceRequest, target: Target) -> None:
        running.asked = target
        others = () if _named(request.model_version) else self._fallbacks(request.alias, target)
        generation = generation_of(running.caller, request, target.model_version)
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
            learning=running.caller.learning,
            text=running.caller.text,
        )
        try:
            if not self._spool.state().full:
                running.ahead = Ahead(self._generate(generation))
            await uninterrupted(self._accept(running, start))
            self._ask_shadows(running, request, target)
            for other in others:
                if await self._answered(running, request, start, generation):
                    break
                running.asked = other
            else:
                # There is no other to ask: whoever is asked now is the one that answers, or nobody does.
                await self._announce(running, start)
                await self._stream(running, request, start, generation)
        except BaseException as error:
            if running.accepted:
                await self._record_failure(running, start, generation, error)
            raise
        finally:
            self._accepted.pop(start.id, None)
            if running.ahead is not None:
                await running.ahead.aclose()
        now = self._monotonic()
        end = running.ended(start, Status.OK, "", running.timings(now))
        if running.first_token is not None and not running.failed:
            first = running.first_token - running.placed
            self.admission.times.answered(
                start.model_version, first, now - running.placed, end.usage.output_tokens
            )
        await uninterrupted(self._record(start, end))
        assert end.finish_reason is not None  # noqa: S101 - a stream that ended by itself says why
        await running.emit(Completed(end.finish_reason, end.usage, end.timings))

    async def _accept(self, running: Running, start: InferenceStarted) -> None:
        await asyncio.sleep(0)  # the engine's question leaves first: the record's way wakes other processes
        await self._spool.append(start)
        running.accepted = True
        self._accepted[start.id] = running
        self._observer.accepted(start)

    async def _answered(
        self, running: Running, request: InferenceRequest, start: InferenceStarted, generation: Generation
    ) -> bool:
        """Stream the answer of who is asked; False if it failed before its first token."""
        try:
            await self._stream(running, request, start, generation)
        except ELSEWHERE as error:
            if running.announced:
                raise
            running.fail_over(error)
            return False
        return True

    async def _announce(self, running: Running, start: InferenceStarted) -> None:
        """Tell the caller who answers, before anything else."""
        running.announced = True
        await running.emit(Started(start.id, running.answering))

    async def _stream(
        self, running: Running, request: InferenceRequest, start: InferenceStarted, generation: Generation
    ) -> None:
        """Send the answer as it comes. A cancellation that nobody asked for is the engine's failure."""
        try:
            await self._streamed(running, request, start, generation)
        except asyncio.CancelledError as error:
            if asked_for(error):
                raise
            raise EngineUnavailable("the engine's stream broke off; ask again") from error

    def _generate(self, generation: Generation) -> AsyncGenerator[Piece | Finished, None]:
        if generation.call_schema is None:
            return self._engine.generate(generation)
        return held(self._engine, generation)

    async def _streamed(
        self, running: Running, request: InferenceRequest, start: InferenceStarted, generation: Generation
    ) -> None:
        """Send text as it comes, but hold back to its end what begins like a tool call."""
        tools = offered_tools(request)
        holding, held = bool(tools), ""
        if running.ahead is not None and not running.failed:
            stream: Ahead | AsyncGenerator[Piece | Finished, None] = running.ahead
        else:
            stream = self._generate(replace(generation, model_version=running.answering))
        async with aclosing(stream) as events:
            async for event in events:
                if not running.announced:
                    await self._announce(running, start)
                if isinstance(event, Finished):
                    running.finished = event
                    break
                if running.first_token is None:
                    running.first_token = self._monotonic()
                running.take(event)
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
        running.call = tool_call(held, tools)
        await running.emit(TextDelta(held) if running.call is None else running.call)

    async def _record(
        self, start: InferenceStarted, end: InferenceEnded, error: BaseException | None = None
    ) -> None:
        await self._spool.append(end)
        self._observer.ended(start, end, error)

    async def _record_failure(
        self, running: Running, start: InferenceStarted, generation: Generation, error: BaseException
    ) -> None:
        timings = running.timings(self._monotonic())
        status, text = running.failure(error)
        try:
            if status in (Status.CANCELLED, Status.DEADLINE):
                generation = replace(generation, model_version=running.answering)
                await uninterrupted(self._count_late(running, generation))
        finally:
            running.end = end = running.ended(start, status, text, timings)
            try:
                await uninterrupted(self._record(start, end, error))
            except Exception:  # the first error is the one to tell; the next start marks it aborted
                log.exception(
                    "the end of an inference was not recorded", extra={"inference_id": str(start.id)}
                )

    async def _count_late(self, running: Running, generation: Generation) -> None:
        """Have the prompt of an answer counted that was cut off, by an engine that did not count as it went.

        Without a first token the prompt was not read, or not wholly: then nothing is known of it.
        """
        known = running.usage()
        if running.first_token is None or known.input_tokens or self._closing:
            return
        try:
            async with asyncio.timeout(LATE_COUNT_SECONDS):
                tokens = await self._engine.count_tokens(generation.model_version, generation.prompt)
            running.counted = Usage(tokens, known.output_tokens)
        except (AgentLoopError, TimeoutError) as error:
            log.debug("a prompt was not counted: %s", type(error).__name__)

    def _make_room(self) -> None:
        """A caller who would have to wait takes the place of the oldest shadow."""
        if self.admission.in_flight < self.admission.places:
            return
        for running in self._shadowing:
            if running.stopped is None:
                running.stop(Cancelled("a caller needed the place of this shadow"))
                return

    def _ask_shadows(self, running: Running, request: InferenceRequest, target: Target) -> None:
        """Ask the route's shadows too, in the background and only where a place is free."""
        if request.model_version or target.role is TargetRole.SHADOW:
            return
        for shadow in rules.choose_shadows(self._routes.get(request.alias), self._draw()):
            copy = self._arrived(running.caller, request, _discard, None)
            task = asyncio.create_task(self._shadow(copy, request, shadow))
            self._shadows.add(task)
            task.add_done_callback(self._shadows.discard)

    async def _shadow(self, running: Running, request: InferenceRequest, shadow: Target) -> None:
        async def answer(target: Target) -> None:
            await self._answer(running, request, target)

        self._shadowing[running] = None
        try:
            await self._within_limit(running, lambda: shadow, answer, shadow=shadow)
        except Exhausted:
            log.debug("a shadow was not asked: no free place")
        except Cancelled:
            log.debug("a shadow was ended: a caller needed its place")
        except Exception:
            log.warning("a shadow failed", extra={"model_version": shadow.model_version}, exc_info=True)
        finally:
            del self._shadowing[running]


def _check(request: InferenceRequest | EmbedRequest) -> None:
    match request:
        case ChatRequest():
            rules.check_chat(request)
        case GenerateRequest():
            rules.check_generate(request)
        case EmbedRequest():
            rules.check_embed(request)


def _prompt_field(request: InferenceRequest | EmbedRequest) -> str:
    """The field that a prompt which is too long came in."""
    names = {ChatRequest: "messages", GenerateRequest: "prompt", EmbedRequest: "texts"}
    return names[type(request)]


def _named(model_version: str) -> Target | None:
    """The one model version that a request asks for, if it does."""
    return Target(model_version, TargetRole.STABLE, 100) if model_version else None


async def _discard(event: ChatEvent) -> None:
    """A shadow's answer goes nowhere but the log."""
