"""Traces, from a caller through the server to the log; over gRPC, over HTTP, and to a collector."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from agentloop import AsyncClient
from agentloop.v1 import inference_pb2
from grpc_server.adapters.otlp import tracing
from grpc_server.adapters.traced import traced_store
from grpc_server.bootstrap import service
from grpc_server.domain.errors import EngineFailed, StoreUnavailable
from grpc_server.domain.types import Route, Target, TargetRole
from grpc_server.json_logs import log_to
from grpc_server.settings import Settings
from tests.fakes import (
    BASE,
    FakeAuthenticator,
    FakeEngine,
    FakeLogReader,
    FakeLogStore,
    FakeRoutes,
    FakeRouteStore,
    FakeSpool,
)
from tests.integration.grpc_bench import Bench, bearer, hello, status_of, until

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


class Spans:
    """A tracer, and the spans that ended."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = provider.get_tracer("test")

    def __iter__(self) -> Iterator[ReadableSpan]:
        return iter(self.exporter.get_finished_spans())

    def names(self) -> list[str]:
        return sorted(span.name for span in self)

    def one(self, name: str) -> ReadableSpan:
        found = [span for span in self if span.name == name]
        assert len(found) == 1, self.names()
        return found[0]


@pytest.fixture
def spans() -> Spans:
    return Spans()


@pytest.fixture
async def bench(tmp_path: Path, spans: Spans) -> AsyncIterator[Bench]:
    async with Bench(tracer=spans.tracer).run(tmp_path) as running:
        yield running


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def parent(span: ReadableSpan) -> str:
    return "" if span.parent is None else trace.format_span_id(span.parent.span_id)


def own(span: ReadableSpan) -> str:
    assert span.context is not None
    return trace.format_span_id(span.context.span_id)


CHAT = "agentloop.v1.InferenceService/Chat"


async def test_a_call_over_grpc_is_traced_from_its_caller_to_the_spool(bench: Bench, spans: Spans) -> None:
    call = bench.chat_stub.Chat(hello(), metadata=(*bearer("al_infer"), ("traceparent", PARENT)))
    events = [event async for event in call]
    await until(lambda: CHAT in spans.names())
    assert spans.names() == sorted([CHAT, "queue", f"text_completion {BASE}", *["spool append"] * 2])
    request, engine = spans.one(CHAT), spans.one(f"text_completion {BASE}")
    assert parent(request) == SPAN
    assert {trace.format_trace_id(span.context.trace_id) for span in spans if span.context} == {TRACE}
    assert {parent(span) for span in spans if span is not request} == {own(request)}
    assert (request.kind, engine.kind) == (SpanKind.SERVER, SpanKind.CLIENT)
    assert attributes(request) == {
        "rpc.system": "grpc",
        "rpc.service": "agentloop.v1.InferenceService",
        "rpc.method": "Chat",
        "rpc.grpc.status_code": 0,
        "gen_ai.response.id": events[0].started.inference_id,
        "gen_ai.request.model": "default",
        "gen_ai.response.model": BASE,
        "agentloop.target.role": "stable",
        "agentloop.status": "ok",
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.response.finish_reasons": ("stop",),
    }
    told = attributes(engine)
    assert told.pop("gen_ai.response.time_to_first_chunk") >= 0
    assert told == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "embedded",
        "gen_ai.request.model": BASE,
        "gen_ai.request.max_tokens": 512,
        "gen_ai.request.temperature": 0.7,
        "gen_ai.request.top_p": 0.95,
        "gen_ai.request.top_k": 64,
        "gen_ai.request.stream": True,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.response.finish_reasons": ("stop",),
    }
    assert attributes(spans.one("queue")) == {"agentloop.priority": "interactive"}
    assert bench.spool.starts[0].traceparent == f"00-{TRACE}-{own(request)}-01"


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["nonsense"],
        [PARENT.upper()],
        [f"00-{'0' * 32}-{SPAN}-01"],
        ["00-" + "f" * 9000],
    ],
)
async def test_what_is_no_parent_begins_a_trace_of_its_own(
    bench: Bench, spans: Spans, given: list[str]
) -> None:
    call = bench.chat_stub.Chat(
        hello(), metadata=(*bearer("al_infer"), *(("traceparent", value) for value in given))
    )
    assert [event async for event in call]
    await until(lambda: CHAT in spans.names())
    assert spans.one(CHAT).parent is None


async def test_free_text_beside_the_parent_is_not_taken(bench: Bench, spans: Spans) -> None:
    extra = (("traceparent", PARENT), ("tracestate", "a=CANARY"), ("baggage", "b=CANARY"))
    assert [e async for e in bench.chat_stub.Chat(hello(), metadata=(*bearer("al_infer"), *extra))]
    await until(lambda: CHAT in spans.names())
    assert "CANARY" not in "".join(span.to_json() for span in spans)


async def test_health_checks_are_not_traced(bench: Bench, spans: Spans) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    await health_pb2_grpc.HealthStub(bench.channel).Check(health_pb2.HealthCheckRequest())
    assert spans.names() == []


async def test_an_engine_that_fails_is_seen_by_kind_and_a_caller_who_is_refused_is_no_error(
    tmp_path: Path, spans: Spans
) -> None:
    engine = FakeEngine(fail=EngineFailed("a secret"), hold_at=1)
    async with Bench(engine, tracer=spans.tracer).run(tmp_path) as bench:
        await status_of(bench.chat_stub.Chat(hello(), metadata=bearer("al_infer")))
        await until(lambda: CHAT in spans.names())
        request, generation = spans.one(CHAT), spans.one(f"text_completion {BASE}")
        assert attributes(request)["rpc.grpc.status_code"] == grpc.StatusCode.INTERNAL.value[0]
        assert attributes(request)["agentloop.status"] == "error"
        assert attributes(generation)["error.type"] == "EngineFailed"
        assert (request.status.status_code, generation.status.status_code) == (StatusCode.ERROR,) * 2
        assert "secret" not in "".join(span.to_json() for span in spans)
        spans.exporter.clear()
        await status_of(bench.chat_stub.Chat(hello(), metadata=bearer("nobody")))
        await until(lambda: CHAT in spans.names())
        assert spans.one(CHAT).status.status_code is StatusCode.UNSET


async def test_a_caller_who_goes_away_is_no_error_of_the_engine(tmp_path: Path, spans: Spans) -> None:
    engine = FakeEngine(hold=asyncio.Event(), hold_at=1)
    async with Bench(engine, tracer=spans.tracer).run(tmp_path) as bench:
        call = bench.chat_stub.Chat(hello(), metadata=bearer("al_infer"))
        await call.read()
        call.cancel()
        await until(lambda: CHAT in spans.names())
        generation = spans.one(f"text_completion {BASE}")
        assert generation.status.status_code is StatusCode.UNSET
        assert attributes(generation)["error.type"] in ("CancelledError", "GeneratorExit")
        assert attributes(spans.one(CHAT))["agentloop.status"] == "cancelled"


async def test_a_shadow_does_not_speak_for_the_answer(tmp_path: Path, spans: Spans) -> None:
    targets = (Target(BASE, TargetRole.STABLE, 100), Target("m:shadow", TargetRole.SHADOW, 100))
    routes = FakeRoutes(FakeRouteStore([Route("default", 1, targets)]))
    engine = FakeEngine(models=(BASE, "m:shadow"))
    async with Bench(engine, routes=routes, tracer=spans.tracer).run(tmp_path) as bench:
        events = await bench.chat()
        await bench.until_ended(2)
        await until(lambda: CHAT in spans.names())
        told = attributes(spans.one(CHAT))
    assert (told["gen_ai.response.model"], told["gen_ai.response.id"]) == (
        BASE,
        events[0].started.inference_id,
    )


async def test_a_call_over_http_is_traced_too(bench: Bench, spans: Spans) -> None:
    assert bench.running is not None
    url = f"http://{bench.running.http_address}"
    headers = {"authorization": "Bearer al_infer", "traceparent": PARENT}
    async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False) as client:
        body = {"model": "default", "messages": [{"role": "user", "content": "Hi"}]}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        assert (await client.post("/v1/embeddings", json={})).status_code == 400
        assert (await client.get("/v1/models/CANARY")).status_code == 404
        assert (await client.request("CANARY", "/v1/CANARY")).status_code == 404
        assert (await client.get("/healthz")).status_code == 200
    request = spans.one("POST /v1/chat/completions")
    assert parent(request) == SPAN
    assert attributes(request)["http.response.status_code"] == 200
    assert attributes(request)["gen_ai.response.id"] == str(bench.spool.starts[0].id)
    assert parent(spans.one(f"text_completion {BASE}")) == own(request)
    assert {"POST /v1/embeddings", "GET /v1/{path}", "_OTHER /v1/{path}"} < set(spans.names())
    assert "CANARY" not in "".join(span.to_json() for span in spans)


async def test_a_fault_of_the_server_over_http_is_an_error(tmp_path: Path, spans: Spans) -> None:
    async with Bench(FakeEngine(fail=EngineFailed("no")), tracer=spans.tracer).run(tmp_path) as bench:
        assert bench.running is not None
        url = f"http://{bench.running.http_address}/v1/chat/completions"
        body = {"model": "default", "messages": [{"role": "user", "content": "Hi"}]}
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.post(url, json=body, headers={"authorization": "Bearer al_infer"})
    assert answer.status_code == 500
    assert spans.one("POST /v1/chat/completions").status.status_code is StatusCode.ERROR


async def test_texts_that_are_embedded_are_traced(bench: Bench, spans: Spans) -> None:
    request = inference_pb2.EmbedRequest(texts=["CANARY one", "two"])
    await bench.chat_stub.Embed(request, metadata=bearer("al_infer"))
    await until(lambda: "agentloop.v1.InferenceService/Embed" in spans.names())
    told = attributes(spans.one(f"embeddings {BASE}"))
    assert told["gen_ai.operation.name"] == "embeddings"
    assert told["gen_ai.usage.input_tokens"] == 3
    assert "CANARY" not in "".join(span.to_json() for span in spans)


async def test_our_client_names_the_trace_of_its_caller(bench: Bench, spans: Spans) -> None:
    assert bench.running is not None
    with spans.tracer.start_as_current_span("the caller's") as mine:
        async with AsyncClient(bench.running.grpc_address, token="al_infer") as client:
            assert [event async for event in client.chat("Hi")]
    await until(lambda: CHAT in spans.names())
    assert parent(spans.one(CHAT)) == trace.format_span_id(mine.get_span_context().span_id)


async def test_stored_batches_lead_back_to_the_calls_that_began_in_them(bench: Bench, spans: Spans) -> None:
    for _ in range(2):
        await bench.chat()
    await until(lambda: spans.names().count(CHAT) == 2)
    store = traced_store(FakeLogStore(), spans.tracer)
    await store.store(bench.spool.records)
    stored = spans.one("log store")
    assert stored.parent is None
    linked = {trace.format_span_id(link.context.span_id) for link in stored.links}
    assert linked == {own(span) for span in spans if span.name == CHAT}
    assert attributes(stored) == {"db.system.name": "postgresql", "agentloop.records": 4}
    with pytest.raises(StoreUnavailable):
        await traced_store(FakeLogStore(down=True), spans.tracer).store([])
    assert [s.status.status_code for s in spans if s.name == "log store"] == [
        StatusCode.UNSET,
        StatusCode.ERROR,
    ]


async def test_a_whole_server_traces_each_call_down_to_its_row(tmp_path: Path, spans: Spans) -> None:
    parts = {
        "store": FakeLogStore(),
        "engine": FakeEngine(),
        "spool": FakeSpool(),
        "authenticator": FakeAuthenticator(),
        "routes": FakeRoutes(),
        "reader": FakeLogReader(),
    }
    settings = Settings(state_dir=tmp_path, grpc_address="127.0.0.1:0", http_address="127.0.0.1:0")
    async with (
        service(settings, tracer=spans.tracer, **parts) as running,  # type: ignore[arg-type]
        AsyncClient(running.grpc_address, token="al_admin_token") as client,
    ):
        assert [event async for event in client.chat("Hi")]
    stored = [span for span in spans if span.name == "log store"]
    assert own(spans.one(CHAT)) in {
        trace.format_span_id(link.context.span_id) for span in stored for link in span.links
    }
    assert {"queue", f"text_completion {BASE}", "spool append"} < set(spans.names())


async def test_log_lines_name_the_callers_trace_even_where_nothing_is_recorded(tmp_path: Path) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    written = io.StringIO()
    log_to(written, "ERROR")
    try:
        async with Bench(FakeEngine(fail=RuntimeError("no"))).run(tmp_path) as bench:
            metadata = (*bearer("al_infer"), ("traceparent", PARENT))
            await status_of(bench.chat_stub.Chat(hello(), metadata=metadata))
    finally:
        root.handlers[:], root.level = handlers, level
    line = json.loads(written.getvalue().splitlines()[0])
    assert (line["message"], line["trace_id"], line["span_id"]) == ("unexpected error", TRACE, SPAN)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """A real OTLP endpoint, which keeps the names of spans."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.services: set[str] = set()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        for group in request.resource_spans:
            self.services |= {
                a.value.string_value for a in group.resource.attributes if a.key == "service.name"
            }
            self.names += [span.name for scope in group.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


async def test_spans_reach_a_collector_before_the_server_has_stopped(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(1))
    add = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    add(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        async with (
            tracing(f"http://127.0.0.1:{port}", 1, "one") as tracer,
            Bench(tracer=tracer).run(tmp_path) as bench,
        ):
            await bench.chat()
    finally:
        server.stop(None)
    assert CHAT in collector.names
    assert collector.services == {"agentloop"}


async def test_a_collector_that_is_away_holds_up_neither_calls_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpc_server.adapters.otlp.SEND_SECONDS", 0.2)
    async with (
        tracing("http://127.0.0.1:9", 1, "one") as tracer,
        Bench(tracer=tracer).run(tmp_path) as bench,
    ):
        assert len(await bench.chat()) == 6


async def test_without_an_endpoint_no_span_is_recorded() -> None:
    async with tracing("", 1, "one") as tracer:
        with tracer.start_as_current_span("x") as span:
            assert not span.is_recording()
