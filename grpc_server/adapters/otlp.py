"""Sends spans to an OpenTelemetry collector over gRPC. Without an endpoint nothing is recorded, or leaves."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Tracer

from grpc_server.tracing import SCOPE, silent

SEND_SECONDS = 5.0
"""What the collector gets to take a batch, and the rest at shutdown."""
WAITING_SPANS = 4096
"""Spans that wait for the collector; more are dropped."""


@contextlib.asynccontextmanager
async def tracing(endpoint: str, share: float, server_id: str) -> AsyncIterator[Tracer]:
    """A tracer whose spans go to `endpoint` (`http://…`: without TLS); of calls without a parent, a `share`.

    A collector that is away costs nothing but its spans.
    """
    if not endpoint:
        yield silent()
        return
    exporter = OTLPSpanExporter(endpoint, timeout=SEND_SECONDS)
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(share)),
        resource=Resource.create({"service.name": SCOPE, "service.instance.id": server_id}),
        span_limits=SpanLimits(max_attributes=32, max_events=0, max_links=512, max_attribute_length=256),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(
        BatchSpanProcessor(
            exporter,
            max_queue_size=WAITING_SPANS,
            schedule_delay_millis=1000,
            export_timeout_millis=SEND_SECONDS * 1000,
        )
    )
    try:
        yield provider.get_tracer(SCOPE)
    finally:
        await _shut_down(provider)


async def _shut_down(provider: TracerProvider) -> None:
    """Send what waits. A collector that hangs keeps a thread, which this process does not wait for."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def shut_down() -> None:
        provider.shutdown()
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=shut_down, name="spans", daemon=True).start()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SEND_SECONDS):
            await done.wait()
