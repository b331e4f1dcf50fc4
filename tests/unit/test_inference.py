"""The pipeline with fakes: every ending, a cancellation at each point, and what the log then has."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest

from grpc_server.admission import Admission
from grpc_server.cancellation import CallerGone
from grpc_server.domain.errors import (
    AgentLoopError,
    DeadlineExceeded,
    EngineFailed,
    EngineUnavailable,
    Exhausted,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ShuttingDown,
    SpoolFull,
)
from grpc_server.domain.types import (
    Caller,
    ChatEvent,
    ChatRequest,
    Completed,
    EmbedRequest,
    FinishReason,
    InferenceEnded,
    InferenceStarted,
    Limits,
    Message,
    Priority,
    Role,
    Route,
    Sampling,
    Scope,
    Started,
    Status,
    Target,
    TargetRole,
    TextDelta,
    Tool,
    ToolCall,
    ToolChoice,
    Usage,
)
from grpc_server.inference import Inference
from tests.fakes import BASE, FakeClock, FakeEngine, FakeRoutes, FakeRouteStore, FakeSpool, route_to

CALLER = Caller("key", "billing", frozenset({Scope.INFER}))
ADMIN = Caller("root", "ops", frozenset({Scope.ADMIN}))
WEATHER = Tool("weather.get", "The weather", {"type": "object", "properties": {"city": {"type": "string"}}})
CALL = '{"name": "weather.get", "arguments": {"city": "Oslo"}}'


class Seen:
    """Keeps events and counts."""

    def __init__(self) -> None:
        self.events: list[ChatEvent] = []
        self.refusals: list[AgentLoopError] = []
        self.starts: list[InferenceStarted] = []
        self.ends: list[InferenceEnded] = []
        self.errors: list[BaseException | None] = []
        self.vectors: list[tuple[str, int, int]] = []

    async def emit(self, event: ChatEvent) -> None:
        self.events.append(event)

    def refused(self, error: AgentLoopError) -> None:
        self.refusals.append(error)

    def accepted(self, start: InferenceStarted) -> None:
        self.starts.append(start)

    def ended(self, start: InferenceStarted, end: InferenceEnded, error: BaseException | None) -> None:
        self.ends.append(end)
        self.errors.append(error)

    def embedded(self, model_version: str, texts: int, input_tokens: int) -> None:
        self.vectors.append((model_version, texts, input_tokens))

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, TextDelta))


class Bench:
    """A pipeline on fakes."""

    def __init__(
        self,
        engine: FakeEngine | None = None,
        spool: FakeSpool | None = None,
        routes: FakeRoutes | None = None,
        *,
        deadline: float = 5,
        draw: float = 0.5,
        admission: Admission | None = None,
    ) -> None:
        self.engine = engine or FakeEngine()
        self.spool = spool or FakeSpool()
        self.routes = routes or FakeRoutes()
        self.seen = Seen()
        self.pipeline = Inference(
            self.engine,
            self.spool,
            self.routes,
            self.seen,
            admission=admission,
            server_id="one",
            default_deadline_seconds=deadline,
            draw=lambda: draw,
        )

    async def chat(
        self, request: ChatRequest | None = None, *, caller: Caller = CALLER, seconds: float | None = None
    ) -> None:
        await self.pipeline.chat(caller, request or ask(), self.seen.emit, seconds=seconds)

    def end(self) -> InferenceEnded:
        """The one end record, of the one start record."""
        assert [start.id for start in self.spool.starts] == [end.id for end in self.spool.ends]
        assert [type(record) for record in self.spool.records] == [InferenceStarted, InferenceEnded]
        assert self.seen.ends == self.spool.ends
        return self.spool.ends[0]


def ask(
    text: str = "Hi",
    *,
    tools: Sequence[Tool] = (),
    choice: ToolChoice = ToolChoice.AUTO,
    alias: str = "default",
    model_version: str = "",
    session_id: str = "",
    max_tokens: int = 512,
    stop: tuple[str, ...] = (),
) -> ChatRequest:
    return ChatRequest(
        (Message(Role.USER, text),),
        alias=alias,
        model_version=model_version,
        tools=tuple(tools),
        tool_choice=choice,
        session_id=session_id,
        sampling=Sampling(max_tokens=max_tokens, stop=stop),
    )


async def until(condition: asyncio.Event) -> None:
    await asyncio.wait_for(condition.wait(), 5)


# Answers


async def test_a_full_answer_is_started_streamed_and_completed_and_its_end_is_logged() -> None:
    bench = Bench()
    await bench.chat()
    started, *deltas, completed = bench.seen.events
    assert isinstance(started, Started)
    assert started.model_version == BASE
    assert deltas == [TextDelta("Hello"), TextDelta(", "), TextDelta("world"), TextDelta("!")]
    assert isinstance(completed, Completed)
    assert completed.finish_reason is FinishReason.STOP
    end = bench.end()
    assert end.id == started.inference_id
    assert (end.status, end.finish_reason, end.error) == (Status.OK, FinishReason.STOP, "")
    assert end.answer == {"role": "assistant", "content": "Hello, world!", "tool_calls": [], "tool_name": ""}
    assert end.usage == completed.usage == Usage(3, 4)
    assert end.timings == completed.timings
    assert end.timings.ttft_ms is not None
    assert 0 <= end.timings.queue_ms <= end.timings.ttft_ms <= end.timings.total_ms


async def test_the_start_is_on_disk_before_the_first_event_leaves() -> None:
    bench = Bench()
    on_disk: list[int] = []

    async def emit(event: ChatEvent) -> None:
        on_disk.append(len(bench.spool.starts))

    await bench.pipeline.chat(CALLER, ask(), emit)
    assert on_disk[0] == 1


async def test_the_end_is_on_disk_before_completed_leaves() -> None:
    bench = Bench()
    ends: list[int] = []

    async def emit(event: ChatEvent) -> None:
        if isinstance(event, Completed):
            ends.append(len(bench.spool.ends))

    await bench.pipeline.chat(CALLER, ask(), emit)
    assert ends == [1]


async def test_the_start_record_says_who_asked_what_of_which_version() -> None:
    bench = Bench()
    await bench.chat(ask("What?", session_id="s-1"))
    start = bench.spool.starts[0]
    assert (start.caller, start.key_id, start.alias, start.session_id) == ("billing", "key", "default", "s-1")
    assert (start.model_version, start.target_role, start.server_id) == (BASE, TargetRole.STABLE, "one")
    assert start.request["messages"][0]["content"] == "What?"
    assert start.id.version == 7
    assert start.started_at.tzinfo is not None


async def test_a_clock_that_is_set_back_meanwhile_does_not_end_an_answer_before_its_start() -> None:
    bench, clock = Bench(), FakeClock()
    pipeline = Inference(
        bench.engine, bench.spool, bench.routes, bench.seen, now=clock.now, monotonic=clock.monotonic
    )

    async def emit(event: ChatEvent) -> None:
        if isinstance(event, Started):
            clock.advance(2)
            clock.time -= timedelta(hours=1)

    await pipeline.chat(CALLER, ask(), emit)
    start, end = bench.spool.starts[0], bench.end()
    assert end.ended_at - start.started_at == timedelta(seconds=2)
    assert (end.timings.ttft_ms, end.timings.total_ms) == (2000, 2000)


async def test_the_engine_gets_the_rendered_prompt_and_where_to_stop() -> None:
    bench = Bench()
    await bench.chat(ask("Hi", stop=("\n\n",)))
    generation = bench.engine.asked[0]
    assert generation.prompt == "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    assert generation.stop == ("<end_of_turn>", "\n\n")
    assert generation.json_schema is None


async def test_an_answer_cut_by_max_tokens_says_length() -> None:
    bench = Bench()
    await bench.chat(ask(max_tokens=2))
    assert bench.end().finish_reason is FinishReason.LENGTH
    assert bench.seen.text == "Hello, "


async def test_a_response_schema_holds_the_generation() -> None:
    bench = Bench(FakeEngine(["{", "}"]))
    schema = {"type": "object"}
    await bench.chat(ChatRequest((Message(Role.USER, "Hi"),), response_schema=schema))
    assert bench.engine.asked[0].json_schema == schema
    assert bench.seen.text == "{}"


# Tool calls


async def test_a_valid_call_becomes_one_tool_call_and_no_text() -> None:
    bench = Bench(FakeEngine([CALL[:10], CALL[10:30], CALL[30:]]))
    await bench.chat(ask(tools=[WEATHER]))
    call = ToolCall("weather.get", {"city": "Oslo"})
    assert bench.seen.events[1:-1] == [call]
    end = bench.end()
    assert end.finish_reason is FinishReason.TOOL_CALLS
    assert end.answer["tool_calls"] == [{"name": "weather.get", "arguments": {"city": "Oslo"}}]
    assert end.answer["content"] == ""


async def test_text_that_begins_like_a_call_is_held_back_and_sent_whole_when_it_is_none() -> None:
    bench = Bench(FakeEngine(["{", '"name": ', '"nobody"}']))
    await bench.chat(ask(tools=[WEATHER]))
    assert bench.seen.events[1:-1] == [TextDelta('{"name": "nobody"}')]
    assert bench.end().answer["content"] == '{"name": "nobody"}'
    assert bench.end().finish_reason is FinishReason.STOP


async def test_a_call_cut_by_max_tokens_is_sent_as_text_that_says_length() -> None:
    bench = Bench(FakeEngine([CALL[:10], CALL[10:30], CALL[30:]]))
    await bench.chat(ask(tools=[WEATHER], choice=ToolChoice.REQUIRED, max_tokens=2))
    assert bench.seen.text == CALL[:30]
    assert bench.end().finish_reason is FinishReason.LENGTH


async def test_other_text_streams_although_tools_are_offered() -> None:
    bench = Bench(FakeEngine([" ", "\n", "It", " rains"]))
    await bench.chat(ask(tools=[WEATHER]))
    assert bench.seen.events[1:-1] == [TextDelta(" \nIt"), TextDelta(" rains")]


async def test_only_blanks_are_sent_at_the_end() -> None:
    bench = Bench(FakeEngine([" ", "\n"]))
    await bench.chat(ask(tools=[WEATHER]))
    assert bench.seen.text == " \n"


async def test_without_tools_a_brace_is_not_held_back() -> None:
    bench = Bench(FakeEngine(["{", "}"]))
    await bench.chat(ask())
    assert bench.seen.events[1:-1] == [TextDelta("{"), TextDelta("}")]


async def test_with_tool_choice_none_nothing_is_held_back_and_no_tool_is_shown() -> None:
    bench = Bench(FakeEngine(["{", "}"]))
    await bench.chat(ask(tools=[WEATHER], choice=ToolChoice.NONE))
    assert bench.seen.events[1:-1] == [TextDelta("{"), TextDelta("}")]
    assert "weather" not in bench.engine.asked[0].prompt


async def test_a_required_call_is_held_to_the_tools_schema() -> None:
    bench = Bench(FakeEngine([CALL]))
    await bench.chat(ask(tools=[WEATHER], choice=ToolChoice.REQUIRED))
    schema = bench.engine.asked[0].json_schema
    assert schema is not None
    assert schema["properties"]["name"] == {"const": "weather.get"}
    assert bench.end().finish_reason is FinishReason.TOOL_CALLS


async def test_a_call_with_half_a_surrogate_pair_is_text_because_utf8_cannot_hold_it() -> None:
    text = '{"name": "weather.get", "arguments": {"city": "\\ud800"}}'
    bench = Bench(FakeEngine([text]))
    await bench.chat(ask(tools=[WEATHER]))
    assert bench.seen.text == text
    assert bench.end().finish_reason is FinishReason.STOP


# Refusals, which leave no trace in the log


@pytest.mark.parametrize(
    ("request_", "caller", "error"),
    [
        (ask(), Caller("k", "n", frozenset({Scope.FEEDBACK})), PermissionDenied),
        (ask(model_version=BASE), CALLER, PermissionDenied),
        (ask(max_tokens=0), CALLER, InvalidArgument),
        (ask(alias="nowhere"), CALLER, NotFound),
    ],
)
async def test_what_is_refused_is_neither_generated_nor_logged(
    request_: ChatRequest, caller: Caller, error: type[AgentLoopError]
) -> None:
    bench = Bench()
    with pytest.raises(error):
        await bench.chat(request_, caller=caller)
    assert (bench.seen.events, bench.engine.asked, bench.spool.records) == ([], [], [])
    assert [type(refusal) for refusal in bench.seen.refusals] == [error]


async def test_a_full_spool_refuses_before_anything_is_generated() -> None:
    bench = Bench(spool=FakeSpool(full=True))
    with pytest.raises(SpoolFull):
        await bench.chat()
    assert (bench.seen.events, bench.engine.asked) == ([], [])
    assert bench.pipeline.admission.in_flight == 0


async def test_a_spool_that_becomes_full_still_takes_the_end() -> None:
    hold = asyncio.Event()
    bench = Bench(FakeEngine(hold=hold))
    task = asyncio.create_task(bench.chat())
    await until(bench.engine.streaming)
    bench.spool.full = True
    hold.set()
    await task
    assert bench.end().status is Status.OK


async def test_an_admin_may_name_one_version() -> None:
    bench = Bench(FakeEngine(models=(BASE, "gemma-3-270m:new")))
    await bench.chat(ask(model_version="gemma-3-270m:new"), caller=ADMIN)
    assert bench.spool.starts[0].model_version == "gemma-3-270m:new"


async def test_a_version_that_is_not_installed_is_not_found_and_has_a_row() -> None:
    bench = Bench()
    with pytest.raises(NotFound):
        await bench.chat(ask(model_version="gemma-3-270m:gone"), caller=ADMIN)
    assert bench.end().status is Status.ERROR


async def test_a_session_stays_with_the_canary_that_its_number_falls_to() -> None:
    route = Route("default", 1, (Target(BASE, TargetRole.STABLE, 50), Target("m:new", TargetRole.CANARY, 50)))
    bench = Bench(FakeEngine(models=(BASE, "m:new")), routes=FakeRoutes(FakeRouteStore([route])))
    for _ in range(3):
        await bench.chat(ask(session_id="session-a"))
    assert len({start.model_version for start in bench.spool.starts}) == 1


# Endings that are not the answer's own


@pytest.mark.parametrize(
    ("fail", "raised", "text"),
    [
        (EngineUnavailable("the engine is down"), EngineUnavailable, "the engine is down"),
        (EngineFailed("nonsense"), EngineFailed, "nonsense"),
        (InvalidArgument("the prompt is too long"), InvalidArgument, "the prompt is too long"),
        (RuntimeError("the caller wrote: secret"), RuntimeError, "unexpected RuntimeError"),
        (TimeoutError("secret"), TimeoutError, "unexpected TimeoutError"),
    ],
)
async def test_an_engine_that_fails_in_mid_stream_leaves_an_error_with_the_partial_answer(
    fail: Exception, raised: type[Exception], text: str
) -> None:
    bench = Bench(FakeEngine(fail=fail, hold_at=2))
    with pytest.raises(raised):
        await bench.chat()
    end = bench.end()
    assert (end.status, end.error, end.finish_reason) == (Status.ERROR, text, None)
    assert end.answer["content"] == "Hello, "
    assert end.usage.output_tokens == 2
    assert "secret" not in repr(end)
    assert bench.seen.errors == [fail]
    assert bench.pipeline.admission.in_flight == 0
    assert bench.seen.refusals == []


async def test_an_engine_that_is_down_has_a_row() -> None:
    bench = Bench(FakeEngine(down=True))
    with pytest.raises(EngineUnavailable):
        await bench.chat()
    assert (bench.end().status, bench.end().timings.ttft_ms) == (Status.ERROR, None)


async def test_a_stream_without_its_last_word_is_an_unavailable_engine() -> None:
    class Broken(FakeEngine):
        async def generate(self, generation):  # type: ignore[no-untyped-def]
            async for event in super().generate(generation):
                if hasattr(event, "text"):
                    yield event

    bench = Bench(Broken())
    with pytest.raises(EngineUnavailable):
        await bench.chat()
    assert bench.end().status is Status.ERROR


@pytest.mark.parametrize("hold_at", [0, 2, 4])
async def test_a_caller_who_goes_away_while_it_streams_stops_the_engine_and_is_logged_as_cancelled(
    hold_at: int,
) -> None:
    bench = Bench(FakeEngine(hold=asyncio.Event(), hold_at=hold_at))
    task = asyncio.create_task(bench.chat())
    await until(bench.engine.streaming)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.end().status is Status.CANCELLED
    assert (bench.engine.running, len(bench.engine.stopped)) == (0, 1)
    assert bench.pipeline.admission.in_flight == 0


async def test_a_caller_who_goes_away_in_the_queue_leaves_no_trace() -> None:
    hold = asyncio.Event()
    bench = Bench(FakeEngine(hold=hold, parallel=1))
    first = asyncio.create_task(bench.chat())
    await until(bench.engine.streaming)
    second = asyncio.create_task(bench.chat())
    while bench.pipeline.admission.queued == 0:  # noqa: ASYNC110 - no sleep, only a turn of the loop
        await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    hold.set()
    await first
    assert bench.end().status is Status.OK
    assert (bench.pipeline.admission.queued, bench.pipeline.admission.in_flight) == (0, 0)


async def test_a_caller_who_goes_away_while_the_start_is_written_is_logged_as_cancelled() -> None:
    bench = Bench()
    bench.spool.hold = asyncio.Event()
    task = asyncio.create_task(bench.chat())
    while not bench.pipeline.admission.in_flight:  # noqa: ASYNC110
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()  # once more: neither may tear the record from its end
    bench.spool.hold.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.end().status is Status.CANCELLED
    assert bench.engine.running == 0


async def test_a_caller_who_goes_away_while_the_end_is_written_is_logged_as_ok() -> None:
    bench = Bench()
    writing = asyncio.Event()

    async def emit(event: ChatEvent) -> None:
        if event == TextDelta("!"):
            bench.spool.hold = asyncio.Event()
            writing.set()

    task = asyncio.create_task(bench.pipeline.chat(CALLER, ask(), emit))
    await until(writing)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    assert bench.spool.hold is not None
    bench.spool.hold.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.end().status is Status.OK


async def test_a_caller_who_goes_away_while_an_event_is_sent_is_logged_as_cancelled() -> None:
    bench = Bench()

    async def emit(event: ChatEvent) -> None:
        if isinstance(event, TextDelta):
            raise CallerGone

    with pytest.raises(CallerGone):
        await bench.pipeline.chat(CALLER, ask(), emit)
    assert bench.end().status is Status.CANCELLED
    assert bench.engine.running == 0


@pytest.mark.parametrize("at", [0, 2])
async def test_a_cancellation_that_nobody_asked_for_is_the_engines_failure(at: int) -> None:
    bench = Bench(FakeEngine(fail=asyncio.CancelledError(), hold_at=at))
    with pytest.raises(EngineUnavailable, match="broke off"):
        await bench.chat()
    assert bench.end().status is Status.ERROR
    assert bench.engine.running == 0


async def test_the_callers_deadline_ends_it() -> None:
    bench = Bench(FakeEngine(hold=asyncio.Event(), hold_at=1))
    with pytest.raises(DeadlineExceeded):
        await bench.chat(seconds=0.02)
    assert bench.end().status is Status.DEADLINE
    assert bench.engine.running == 0


async def test_the_default_deadline_ends_it_when_the_caller_has_none() -> None:
    bench = Bench(FakeEngine(hold=asyncio.Event(), hold_at=1), deadline=0.02)
    with pytest.raises(DeadlineExceeded):
        await bench.chat()
    assert bench.end().status is Status.DEADLINE


async def test_a_cancellation_right_before_the_deadline_is_that_of_the_deadline() -> None:
    bench = Bench(FakeEngine(hold=asyncio.Event(), hold_at=1))
    task = asyncio.create_task(bench.chat(seconds=0.04))
    await until(bench.engine.streaming)
    task.cancel()  # as gRPC does when the caller's own clock runs out first
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.end().status is Status.DEADLINE


async def test_a_deadline_that_passes_in_the_queue_leaves_no_row() -> None:
    hold = asyncio.Event()
    bench = Bench(FakeEngine(hold=hold, parallel=1))
    first = asyncio.create_task(bench.chat())
    await until(bench.engine.streaming)
    with pytest.raises(DeadlineExceeded):
        await bench.chat(seconds=0.02)
    hold.set()
    await first
    assert len(bench.spool.starts) == 1
    assert [type(error) for error in bench.seen.refusals] == [DeadlineExceeded]


async def test_a_full_queue_refuses() -> None:
    hold = asyncio.Event()
    bench = Bench(FakeEngine(hold=hold), admission=Admission(1, queue_size=0))
    first = asyncio.create_task(bench.chat())
    await until(bench.engine.streaming)
    with pytest.raises(Exhausted):
        await bench.chat()
    hold.set()
    await first


async def test_a_batch_request_lets_a_later_interactive_one_go_first() -> None:
    hold = asyncio.Event()
    bench = Bench(FakeEngine(hold=hold, parallel=1))
    tasks = [asyncio.create_task(bench.chat())]
    await until(bench.engine.streaming)
    for priority in (Priority.BATCH, Priority.INTERACTIVE):
        chat = bench.pipeline.chat(CALLER, ask(priority), bench.seen.emit, priority=priority)
        tasks.append(asyncio.create_task(chat))
    while bench.pipeline.admission.queued < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    hold.set()
    await asyncio.gather(*tasks)
    asked = [start.request["messages"][0]["content"] for start in bench.spool.starts]
    assert asked == ["Hi", "interactive", "batch"]


async def test_what_an_answer_took_is_what_the_next_is_expected_to_take() -> None:
    bench = Bench()
    for _ in range(8):
        await bench.chat()
    times = bench.pipeline.admission.times
    assert times.mean is not None
    assert times.typical(BASE, 100) is not None
    with pytest.raises(DeadlineExceeded, match="nine of ten answers"):
        await bench.chat(seconds=1e-9)
    assert len(bench.spool.starts) == 8


async def test_an_end_that_cannot_be_written_is_not_completed() -> None:
    bench = Bench()

    async def emit(event: ChatEvent) -> None:
        bench.seen.events.append(event)
        bench.spool.broken = OSError("disk")

    with pytest.raises(OSError, match="disk"):
        await bench.pipeline.chat(CALLER, ask(), emit)
    assert not [event for event in bench.seen.events if isinstance(event, Completed)]


async def test_an_end_that_cannot_be_written_does_not_hide_what_ended_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench(FakeEngine(fail=EngineFailed("nonsense"), hold_at=1))

    async def emit(event: ChatEvent) -> None:
        bench.spool.broken = OSError("disk")

    with pytest.raises(EngineFailed):
        await bench.pipeline.chat(CALLER, ask(), emit)
    assert "the end of an inference was not recorded" in caplog.text


# Shutdown


async def test_draining_lets_a_stream_finish_and_refuses_new_ones() -> None:
    hold = asyncio.Event()
    bench = Bench(FakeEngine(hold=hold))
    task = asyncio.create_task(bench.chat())
    await until(bench.engine.streaming)
    drained = asyncio.create_task(bench.pipeline.drain(5))
    await asyncio.sleep(0)
    with pytest.raises(ShuttingDown):
        await bench.chat()
    hold.set()
    await task
    await drained
    assert bench.end().status is Status.OK


async def test_draining_ends_what_is_left_when_the_grace_period_is_over() -> None:
    bench = Bench(FakeEngine(hold=asyncio.Event(), hold_at=1))
    task = asyncio.create_task(bench.chat())
    await until(bench.engine.streaming)
    await bench.pipeline.drain(0.01)
    with pytest.raises(ShuttingDown):
        await task
    assert bench.end().status is Status.ERROR
    assert bench.end().error == "the server shut down before the answer was complete"
    assert bench.end().answer["content"] == "Hello"


async def test_draining_an_idle_pipeline_is_immediate() -> None:
    await asyncio.wait_for(Bench().pipeline.drain(60), 1)


# Shadows


def shadowed(weight: int) -> FakeRoutes:
    targets = (Target(BASE, TargetRole.STABLE, 100), Target("m:shadow", TargetRole.SHADOW, weight))
    return FakeRoutes(FakeRouteStore([Route("default", 1, targets)]))


async def test_a_shadow_is_asked_too_and_its_answer_goes_only_to_the_log() -> None:
    bench = Bench(FakeEngine(models=(BASE, "m:shadow")), routes=shadowed(100))
    await bench.chat()
    await bench.pipeline.drain(5)
    assert {start.target_role: start.model_version for start in bench.spool.starts} == {
        TargetRole.STABLE: BASE,
        TargetRole.SHADOW: "m:shadow",
    }
    assert {end.status for end in bench.spool.ends} == {Status.OK}
    assert bench.seen.text == "Hello, world!"


async def test_a_shadow_is_not_asked_where_it_would_take_a_callers_place() -> None:
    bench = Bench(FakeEngine(models=(BASE, "m:shadow"), parallel=1), routes=shadowed(100))
    await bench.chat()
    await bench.pipeline.drain(5)
    assert [start.target_role for start in bench.spool.starts] == [TargetRole.STABLE]


async def test_a_shadow_that_stalls_holds_up_nobody() -> None:
    """Not one token comes of it, while the stable version answers again and again."""

    class Stalling(FakeEngine):
        async def generate(self, generation):  # type: ignore[no-untyped-def]
            if generation.model_version == "m:shadow":
                self.asked.append(generation)
                await asyncio.Event().wait()
            async for event in super().generate(generation):
                yield event

    engine = Stalling(models=(BASE, "m:shadow"), parallel=4)
    bench = Bench(engine, routes=shadowed(100))
    for _ in range(20):
        await bench.chat()
    shadows = [asked for asked in engine.asked if asked.model_version == "m:shadow"]
    assert len([event for event in bench.seen.events if isinstance(event, Completed)]) == 20
    assert 1 <= len(shadows) <= 3, "it takes free places only"
    await bench.pipeline.drain(0.01)
    assert bench.pipeline.admission.in_flight == 0
    assert len(bench.spool.ends) == len(bench.spool.starts) == 20 + len(shadows)


async def test_a_caller_who_would_have_to_wait_takes_the_place_of_a_shadow() -> None:
    class Stalling(FakeEngine):
        async def generate(self, generation):  # type: ignore[no-untyped-def]
            if generation.model_version == "m:shadow":
                self.asked.append(generation)
                await asyncio.Event().wait()
            async for event in super().generate(generation):
                yield event

    engine = Stalling(models=(BASE, "m:shadow"), parallel=3)
    bench = Bench(engine, routes=shadowed(100), admission=Admission(3, queue_seconds=5))
    for _ in range(2):
        await bench.chat()
    assert bench.pipeline.admission.in_flight == 2, "two shadows stall"
    engine.hold = asyncio.Event()
    tasks = [asyncio.create_task(bench.chat()) for _ in range(3)]
    async with asyncio.timeout(5):
        while engine.running < 3:  # noqa: ASYNC110 - no sleep, only a turn of the loop
            await asyncio.sleep(0)
    engine.hold.set()
    await asyncio.gather(*tasks)
    await bench.pipeline.drain(0.01)
    ended = {end.id: end.status for end in bench.spool.ends}
    roles = [(start.target_role, ended[start.id]) for start in bench.spool.starts]
    assert roles.count((TargetRole.STABLE, Status.OK)) == 5
    assert roles.count((TargetRole.SHADOW, Status.CANCELLED)) >= 2


async def test_a_shadow_that_fails_is_logged_and_nobody_notices() -> None:
    bench = Bench(routes=shadowed(100))  # the shadow's version is not installed
    await bench.chat()
    await bench.pipeline.drain(5)
    assert sorted(end.status for end in bench.spool.ends) == [Status.ERROR, Status.OK]


async def test_a_shadow_is_asked_for_its_share_only() -> None:
    bench = Bench(FakeEngine(models=(BASE, "m:shadow")), routes=shadowed(10), draw=0.5)
    await bench.chat()
    await bench.pipeline.drain(5)
    assert len(bench.spool.starts) == 1


async def test_another_alias_leads_elsewhere() -> None:
    routes = FakeRoutes(FakeRouteStore([route_to(), route_to("m:agent", alias="agent")]))
    bench = Bench(FakeEngine(models=(BASE, "m:agent")), routes=routes)
    await bench.chat(ask(alias="agent"))
    assert bench.spool.starts[0].model_version == "m:agent"


# Quotas


def limited(**limits: Any) -> Caller:
    return Caller("key", "billing", frozenset({Scope.INFER}), limits=Limits(**limits))


async def test_a_quota_is_settled_with_what_the_engine_counted() -> None:
    bench = Bench()
    caller = limited(tokens_per_minute=600)
    await bench.chat(ask(max_tokens=512), caller=caller)  # reserves 513 of 600
    used = bench.end().usage
    left = 600 - used.input_tokens - used.output_tokens
    with pytest.raises(Exhausted, match=f"{600 - left} are in use, and this request needs {left + 1}"):
        await bench.chat(ask(max_tokens=left), caller=caller)
    await bench.chat(ask(max_tokens=left - 1), caller=caller)
    assert [type(error) for error in bench.seen.refusals] == [Exhausted]


async def test_a_cancelled_stream_counts_its_prompt_and_what_it_wrote() -> None:
    bench = Bench(FakeEngine(hold=asyncio.Event(), hold_at=2))
    caller = limited(tokens_per_minute=100)
    task = asyncio.create_task(bench.chat(ask("x" * 80, max_tokens=80), caller=caller))
    await until(bench.engine.streaming)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    with pytest.raises(Exhausted, match="5 are in use"):
        await bench.chat(ask(max_tokens=99), caller=caller)


async def test_what_was_never_accepted_uses_no_tokens_and_holds_no_stream() -> None:
    bench = Bench(spool=FakeSpool(full=True))
    caller = limited(tokens_per_minute=513, concurrent_streams=1)
    for _ in range(3):
        with pytest.raises(SpoolFull):
            await bench.chat(caller=caller)
    bench.spool.full = False
    await bench.chat(caller=caller)


async def test_a_caller_runs_as_many_streams_as_it_may_and_others_are_not_hindered() -> None:
    hold = asyncio.Event()
    bench = Bench(FakeEngine(hold=hold, parallel=8))
    caller = limited(concurrent_streams=2)
    running = [asyncio.create_task(bench.chat(caller=caller)) for _ in range(2)]
    await until(bench.engine.streaming)
    with pytest.raises(Exhausted, match="concurrent_streams of this caller is 2"):
        await bench.chat(caller=caller)
    running.append(asyncio.create_task(bench.chat(caller=CALLER)))
    hold.set()
    await asyncio.gather(*running)
    await bench.chat(caller=caller)


async def test_an_alias_that_a_caller_may_not_name_is_denied_before_anything_is_counted() -> None:
    bench = Bench()
    caller = Caller("key", "n", frozenset({Scope.INFER}), limits=Limits(1, aliases=frozenset({"default"})))
    with pytest.raises(PermissionDenied, match="may not ask the alias 'agent'"):
        await bench.chat(ask(alias="agent"), caller=caller)
    await bench.chat(caller=caller)
    with pytest.raises(Exhausted, match="requests_per_minute"):
        await bench.chat(caller=caller)


async def test_vectors_and_counting_use_tokens_too_and_no_more_than_they_read() -> None:
    bench = Bench()
    caller = limited(tokens_per_minute=100)
    texts = EmbedRequest(("x" * 200, "x" * 120))
    embedded, _ = await bench.pipeline.embed(caller, texts)
    counted, _ = await bench.pipeline.count_tokens(caller, ask("x" * 40, max_tokens=8192))
    used = embedded.input_tokens + counted
    with pytest.raises(Exhausted, match=f"100, {used} are in use"):
        await bench.pipeline.embed(caller, EmbedRequest(("x" * 400,)))


async def test_the_engine_is_asked_while_the_disk_takes_the_start_and_nothing_leaves_before() -> None:
    bench = Bench()
    bench.spool.hold = asyncio.Event()
    asked = asyncio.create_task(bench.chat())
    while not bench.engine.asked:  # noqa: ASYNC110 - only turns of the loop
        await asyncio.sleep(0)
    for _ in range(10):
        await asyncio.sleep(0)
    assert bench.seen.events == []
    assert bench.spool.records == []
    bench.spool.hold.set()
    await asked
    assert isinstance(bench.seen.events[0], Started)
    assert bench.seen.text == "Hello, world!"
    assert bench.end().status is Status.OK
    assert len(bench.engine.asked) == 1


async def test_an_engine_that_was_asked_for_a_request_that_the_disk_refuses_is_stopped() -> None:
    bench = Bench(FakeEngine(hold=asyncio.Event(), hold_at=1))
    bench.spool.broken = SpoolFull("the disk is full")
    with pytest.raises(SpoolFull):
        await bench.chat()
    assert len(bench.engine.asked) == 1
    assert bench.engine.running == 0
    assert bench.seen.events == []
    assert bench.seen.refusals


async def test_a_spool_that_is_known_to_be_full_spares_the_engine() -> None:
    bench = Bench(spool=FakeSpool(full=True))
    with pytest.raises(SpoolFull):
        await bench.chat()
    assert bench.engine.asked == []


async def test_an_engine_that_fails_before_the_disk_has_the_start_fails_an_accepted_inference() -> None:
    bench = Bench(FakeEngine(fail=EngineUnavailable("down")))
    bench.spool.hold = asyncio.Event()
    asked = asyncio.create_task(bench.chat())
    while not bench.engine.asked:  # noqa: ASYNC110 - only turns of the loop
        await asyncio.sleep(0)
    bench.spool.hold.set()
    with pytest.raises(EngineUnavailable, match="down"):
        await asked
    assert bench.end().status is Status.ERROR


async def test_a_caller_who_goes_while_the_disk_takes_the_start_stops_the_engine() -> None:
    bench = Bench(FakeEngine(hold=asyncio.Event(), hold_at=1))
    bench.spool.hold = asyncio.Event()
    asked = asyncio.create_task(bench.chat())
    while not bench.engine.asked:  # noqa: ASYNC110 - only turns of the loop
        await asyncio.sleep(0)
    asked.cancel()
    await asyncio.sleep(0)
    bench.spool.hold.set()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert bench.end().status is Status.CANCELLED
    assert bench.engine.running == 0
