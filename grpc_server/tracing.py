"""Where a call's trace begins: W3C's `traceparent`, in gRPC's metadata and in HTTP's headers alike.

Spans tell which, when and how many; never what anybody wrote. Of the caller's context only ids are taken:
`tracestate` and `baggage` are free text, and stay outside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

KEY = "traceparent"
SCOPE = "agentloop"
"""Whose spans these are."""
_W3C = TraceContextTextMapPropagator()


def silent() -> trace.Tracer:
    """A tracer that records nothing, and passes the caller's ids on."""
    return trace.NoOpTracerProvider().get_tracer(SCOPE)


def records(tracer: trace.Tracer) -> bool:
    """Whether its spans are kept; where they are not, what would only make them stays out of the way."""
    return not isinstance(tracer, trace.NoOpTracer)


def context_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> Context:
    """The context that a caller sends; an empty one where it sends none, several, or what is none."""
    values = [value for key, value in metadata or () if key == KEY]
    if len(values) != 1 or not isinstance(values[0], str):
        return Context()
    return _W3C.extract({KEY: values[0]}, context=Context())


def traceparent() -> str:
    """The span that is being recorded now, as others may continue it; empty if there is none."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier)
    return carrier.get(KEY, "")


def failed(span: trace.Span, error: BaseException) -> None:
    """Mark a span; of the error only its kind is told, as its text may quote somebody.

    Who goes away before the end is no error.
    """
    span.set_attribute("error.type", type(error).__name__)
    if isinstance(error, Exception):
        span.set_status(trace.StatusCode.ERROR)


@contextlib.contextmanager
def spanning(tracer: trace.Tracer, name: str, **options: Any) -> Iterator[trace.Span]:
    """A span around the block, marked if that fails; options are those of `Tracer.start_as_current_span`."""
    if not records(tracer):
        yield trace.INVALID_SPAN
        return
    with tracer.start_as_current_span(
        name, record_exception=False, set_status_on_exception=False, **options
    ) as span:
        try:
            yield span
        except BaseException as error:
            failed(span, error)
            raise
