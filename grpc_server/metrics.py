"""What the server counts, in Prometheus' words where it has them, else OpenTelemetry's for generative AI."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from grpc_server.domain.errors import AgentLoopError, InvalidArgument
from grpc_server.domain.ports import SpoolState
from grpc_server.domain.types import InferenceEnded, InferenceStarted, Status

disable_created_metrics()  # type: ignore[no-untyped-call] # they double what is scraped, unread

# Buckets that OpenTelemetry's semantic conventions for generative AI advise, in seconds
# (docs/gen-ai/gen-ai-metrics.md: gen_ai.server.request.duration, gen_ai.server.time_to_first_token).
_DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)


class Metrics:
    """Every figure of one server, in a registry of its own."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        models = ("gen_ai_request_model", "gen_ai_response_model")
        self._inferences = Counter(
            "agentloop_inferences",
            "Accepted inferences that ended; error_type is InvalidArgument where the caller was wrong.",
            ("alias", "model_version", "target_role", "status", "finish_reason", "error_type"),
            registry=self.registry,
        )
        self._refused = Counter(
            "agentloop_refused",
            "Requests that were not accepted, by the kind of error.",
            ("reason",),
            registry=self.registry,
        )
        self._duration = Histogram(
            "gen_ai_server_request_duration_seconds",
            "From a request's arrival to the end of its answer, unless its caller cancelled, or was wrong.",
            models,
            buckets=_DURATION,
            registry=self.registry,
        )
        self._first_token = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From a request's arrival to the first token of its answer.",
            models,
            buckets=_FIRST_TOKEN,
            registry=self.registry,
        )
        self._tokens = Counter(
            "gen_ai_client_token_usage_tokens",
            "Tokens read and written.",
            ("gen_ai_response_model", "gen_ai_token_type"),
            registry=self.registry,
        )
        self._records = Counter(
            "agentloop_log_records",
            "Log records: accepted by the spool, stored in Postgres, set aside as dead letters.",
            ("state",),
            registry=self.registry,
        )
        for state in ("accepted", "stored", "dead_lettered"):
            self._records.labels(state)
        self._months_ahead = self._gauge(
            "agentloop_log_months_ahead",
            "Coming months that have a partition in the log; below 1 the next one is missing.",
        )
        self._without_month = self._gauge(
            "agentloop_log_rows_without_month", "Rows of months without a partition, counted up to 10,000."
        )
        self._months_dropped = Counter(
            "agentloop_log_months_dropped", "Months of the log that were too old.", registry=self.registry
        )
        self._engine_up = self._gauge("agentloop_engine_up", "1 while the engine answers.")
        self._store_up = self._gauge("agentloop_store_up", "1 while Postgres answers.")

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)

    def watch(
        self, *, spool: Callable[[], SpoolState], in_flight: Callable[[], int], queued: Callable[[], int]
    ) -> None:
        """Read these gauges at each scrape."""
        reads: list[tuple[str, str, Callable[[], float]]] = [
            ("agentloop_in_flight", "Generations that run.", in_flight),
            ("agentloop_queued", "Requests that wait for a place.", queued),
            ("agentloop_spool_records", "Log records not in Postgres yet.", lambda: spool().records),
            ("agentloop_spool_bytes", "Bytes of log records not in Postgres yet.", lambda: spool().bytes),
            ("agentloop_spool_oldest_seconds", "Age of the oldest of them.", lambda: spool().oldest_seconds),
        ]
        for name, description, read in reads:
            self._gauge(name, description).set_function(read)

    # The pipeline's hooks.

    def refused(self, error: AgentLoopError) -> None:
        """A request was not accepted."""
        self._refused.labels(type(error).__name__).inc()

    def accepted(self, start: InferenceStarted) -> None:
        """A start record is in the spool."""
        del start
        self.logged()

    def ended(self, start: InferenceStarted, end: InferenceEnded, error: BaseException | None = None) -> None:
        """An end record is in the spool; `error` is what ended it, if not itself."""
        self.logged()
        reason = "" if end.finish_reason is None else end.finish_reason.value
        kind = type(error).__name__ if end.status is Status.ERROR and error is not None else ""
        self._inferences.labels(
            start.alias, start.model_version, start.target_role.value, end.status.value, reason, kind
        ).inc()
        # How long it took was the caller's choice, or mistake, and not the model's.
        if end.status is not Status.CANCELLED and not isinstance(error, InvalidArgument):
            self._duration.labels(start.alias, start.model_version).observe(end.timings.total_ms / 1000)
        if end.timings.ttft_ms is not None:
            self._first_token.labels(start.alias, start.model_version).observe(end.timings.ttft_ms / 1000)
        self._tokens.labels(start.model_version, "input").inc(end.usage.input_tokens)
        self._tokens.labels(start.model_version, "output").inc(end.usage.output_tokens)

    # The log's hooks.

    def logged(self, records: int = 1) -> None:
        """The spool took records."""
        self._records.labels("accepted").inc(records)

    def stored(self, records: int) -> None:
        """Postgres took records."""
        self._records.labels("stored").inc(records)

    def dead_lettered(self, records: int) -> None:
        """Records that Postgres will never take were set aside."""
        self._records.labels("dead_lettered").inc(records)

    # The upkeep's hooks.

    def months_ahead(self, months: int) -> None:
        """The log's partitions were looked after: so many coming months have theirs."""
        self._months_ahead.set(months)

    def rows_without_month(self, rows: int) -> None:
        """So many rows lie in the default partition."""
        self._without_month.set(rows)

    def months_dropped(self, months: int) -> None:
        """So many months were too old."""
        self._months_dropped.inc(months)

    # The health checks' hooks.

    def engine_is(self, up: bool) -> None:
        """The engine was checked."""
        self._engine_up.set(up)

    def store_is(self, up: bool) -> None:
        """Postgres was checked."""
        self._store_up.set(up)

    def _gauge(self, name: str, description: str) -> Gauge:
        return Gauge(name, description, registry=self.registry)
