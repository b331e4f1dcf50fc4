"""Spans around an engine, a spool and a store; each does what it did, and knows nothing of them.

Names and attributes are those of OpenTelemetry's conventions for generative AI where they have one
(docs/gen-ai/gen-ai-spans.md).
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast
from uuid import UUID
from weakref import WeakKeyDictionary

from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, Tracer, get_current_span
from opentelemetry.util.types import AttributeValue

from grpc_server.domain.ports import Engine, Finished, Generation, LogStore, Piece, Spool
from grpc_server.domain.types import Embeddings, InferenceEnded, InferenceStarted, LogRecord
from grpc_server.tracing import KEY, context_of, failed, records, spanning, traceparent


def traced_engine(engine: Engine, tracer: Tracer) -> Engine:
    """`engine`, with a span for each generation, from the question to the last token."""
    return cast("Engine", _TracedEngine(engine, tracer)) if records(tracer) else engine


def traced_spool(spool: Spool, tracer: Tracer) -> Spool:
    """`spool`, with a span for each record, which says of an inference's start to which trace it belongs."""
    return cast("Spool", _TracedSpool(spool, tracer))


def traced_store(store: LogStore, tracer: Tracer) -> LogStore:
    """`store`, with a span for each batch, linked to the inferences that begin in it."""
    return cast("LogStore", _TracedStore(store, tracer)) if records(tracer) else store


class _Around:
    """Passes on whatever is not traced."""

    def __init__(self, inner: Any, tracer: Tracer) -> None:
        self._inner = inner
        self._tracer = tracer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _TracedEngine(_Around):
    async def generate(self, generation: Generation) -> AsyncGenerator[Piece | Finished, None]:
        """The engine's stream. The span is not the current one, as callers run between two pieces."""
        span = self._tracer.start_span(
            f"text_completion {generation.model_version}",
            kind=SpanKind.CLIENT,
            attributes={
                "gen_ai.operation.name": "text_completion",
                "gen_ai.provider.name": self._inner.name,
                "gen_ai.request.model": generation.model_version,
                "gen_ai.request.max_tokens": generation.sampling.max_tokens,
                "gen_ai.request.temperature": generation.sampling.temperature,
                "gen_ai.request.top_p": generation.sampling.top_p,
                "gen_ai.request.top_k": generation.sampling.top_k,
                "gen_ai.request.stream": True,
            },
        )
        asked, first, ended = time.monotonic(), True, False
        try:
            async with aclosing(self._inner.generate(generation)) as events:
                async for event in events:
                    if first:
                        span.set_attribute("gen_ai.response.time_to_first_chunk", time.monotonic() - asked)
                        first = False
                    if isinstance(event, Finished):
                        _finished(span, event)
                        ended = True
                    yield event
        except BaseException as error:
            if not ended:  # who has the last word closes the stream
                failed(span, error)
            raise
        finally:
            span.end()

    async def embed(self, model_version: str, texts: Sequence[str]) -> Embeddings:
        """The engine's vectors."""
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": "embeddings",
            "gen_ai.provider.name": self._inner.name,
            "gen_ai.request.model": model_version,
        }
        name = f"embeddings {model_version}"
        with spanning(self._tracer, name, kind=SpanKind.CLIENT, attributes=attributes) as span:
            embeddings: Embeddings = await self._inner.embed(model_version, texts)
            span.set_attribute("gen_ai.usage.input_tokens", embeddings.input_tokens)
            return embeddings


def _finished(span: Span, event: Finished) -> None:
    span.set_attribute("gen_ai.usage.input_tokens", event.usage.input_tokens)
    span.set_attribute("gen_ai.usage.output_tokens", event.usage.output_tokens)
    span.set_attribute("gen_ai.response.finish_reasons", [event.finish_reason.value])


class _TracedSpool(_Around):
    def __init__(self, inner: Any, tracer: Tracer) -> None:
        super().__init__(inner, tracer)
        self._tells_of: WeakKeyDictionary[Span, UUID] = WeakKeyDictionary()

    async def append(self, record: LogRecord) -> None:
        """Append; the call's own span is told which inference it is, and how that ended."""
        span = get_current_span()
        self._tell(span, record)
        if isinstance(record, InferenceStarted) and span.get_span_context().is_valid:
            record = replace(record, traceparent=traceparent())
        attributes = {"agentloop.record": type(record).__name__}
        with spanning(self._tracer, "spool append", attributes=attributes):
            await self._inner.append(record)

    def _tell(self, span: Span, record: LogRecord) -> None:
        """Of the first inference in a call: shadows, which may outlast it, have its span too."""
        if not span.is_recording() or not isinstance(record, InferenceStarted | InferenceEnded):
            return
        if self._tells_of.setdefault(span, record.id) != record.id:
            return
        span.set_attributes(_of_start(record) if isinstance(record, InferenceStarted) else _of_end(record))


def _of_start(record: InferenceStarted) -> dict[str, AttributeValue]:
    return {
        "gen_ai.response.id": str(record.id),
        "gen_ai.request.model": record.alias,
        "gen_ai.response.model": record.model_version,
        "agentloop.target.role": record.target_role.value,
    }


def _of_end(record: InferenceEnded) -> dict[str, AttributeValue]:
    reasons = [] if record.finish_reason is None else [record.finish_reason.value]
    return {
        "agentloop.status": record.status.value,
        "gen_ai.usage.input_tokens": record.usage.input_tokens,
        "gen_ai.usage.output_tokens": record.usage.output_tokens,
        "gen_ai.response.finish_reasons": reasons,
    }


class _TracedStore(_Around):
    async def store(self, records: Sequence[LogRecord]) -> None:
        """Store a batch, in a trace of its own: it may be hours later."""
        links = [link for record in records if (link := _link(record)) is not None]
        attributes = {"db.system.name": "postgresql", "agentloop.records": len(records)}
        with spanning(
            self._tracer,
            "log store",
            context=Context(),
            kind=SpanKind.CLIENT,
            links=links,
            attributes=attributes,
        ):
            await self._inner.store(records)


def _link(record: LogRecord) -> Link | None:
    if not isinstance(record, InferenceStarted) or not record.traceparent:
        return None
    context = get_current_span(context_of([(KEY, record.traceparent)])).get_span_context()
    return Link(context) if context.is_valid else None
