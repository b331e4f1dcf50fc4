"""What the server counts, in Prometheus' words where it has them, else OpenTelemetry's for generative AI.

How many series there are is bounded: labels take values from short lists, or from routes and model versions
(`VersionSeries`). No label names a caller: who used what is in the log, which is not open to everybody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from grpc_server.admission import Admission
from grpc_server.domain.errors import AgentLoopError, InvalidArgument
from grpc_server.domain.ports import Gpu, SpoolState
from grpc_server.domain.types import (
    Feedback,
    HandoverState,
    InferenceEnded,
    InferenceStarted,
    Priority,
    Status,
)
from grpc_server.handover import Handover
from grpc_server.opinions import RecentAnswers
from grpc_server.series import VersionSeries

disable_created_metrics()  # type: ignore[no-untyped-call] # they double what is scraped, unread

# Buckets that OpenTelemetry's semantic conventions for generative AI advise, in seconds
# (docs/gen-ai/gen-ai-metrics.md: gen_ai.server.request.duration, gen_ai.server.time_to_first_token, …);
# and 5 s, the objective of whole answers (infra/prometheus/recording.yml).
DURATION_BUCKETS = (
    0.01,
    0.02,
    0.04,
    0.08,
    0.16,
    0.32,
    0.64,
    1.28,
    2.56,
    5.0,
    5.12,
    10.24,
    20.48,
    40.96,
    81.92,
)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)
_QUEUE = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


ENDS = ("released", "expired", "overdue", "failed")
"""How leases of the GPU end."""

ALIASES = 64
"""Aliases that are shown by name."""


class Metrics:
    """Every figure of one server, in a registry of its own."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._series = VersionSeries()
        self._aliases: set[str] = set()
        self._answers = RecentAnswers()
        ProcessCollector(registry=self.registry)
        models = ("gen_ai_request_model", "gen_ai_response_model")
        self._inferences = Counter(
            "agentloop_inferences",
            "Accepted inferences that ended; error_type is InvalidArgument where the caller was wrong.",
            ("alias", "model_version", "target_role", "status", "finish_reason", "error_type"),
            registry=self.registry,
        )
        self._fallbacks = Counter(
            "agentloop_fallbacks",
            "Versions that failed before their first token, so that another one of the route was asked.",
            ("alias", "model_version", "target_role", "error_type"),
            registry=self.registry,
        )
        self._feedback = Counter(
            "agentloop_feedback",
            "Answers that their callers called good or bad, as far as this server gave them.",
            ("alias", "model_version", "target_role", "opinion"),
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
            "From a request's arrival to the end of its answer, unless its caller cancelled, or was wrong, or"
            " another version failed at it first.",
            models,
            buckets=DURATION_BUCKETS,
            registry=self.registry,
        )
        self._first_token = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From a request's arrival to the first token of its answer, unless another version failed first.",
            models,
            buckets=_FIRST_TOKEN,
            registry=self.registry,
        )
        self._per_token = Histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "From the first token to the end, for each token after the first, of whole answers.",
            models,
            buckets=_PER_TOKEN,
            registry=self.registry,
        )
        self._tokens = Histogram(
            "gen_ai_client_token_usage",
            "Tokens that an inference read (input) and wrote (output).",
            ("gen_ai_response_model", "gen_ai_token_type"),
            buckets=_TOKENS,
            registry=self.registry,
        )
        self._queue_time = Histogram(
            "agentloop_queue_time_seconds",
            "How long requests waited for a place that they got.",
            ("priority",),
            buckets=_QUEUE,
            registry=self.registry,
        )
        self._embedded = Counter(
            "agentloop_embedded_texts",
            "Texts that were turned into vectors.",
            ("model_version",),
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
        self._redacted = Counter(
            "agentloop_log_redacted",
            "Secrets and personal data that were kept out of the log; UNSCANNED: whole texts.",
            ("kind",),
            registry=self.registry,
        )
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
        self._gpu_busy = self._gauge(
            "hw_gpu_utilization_ratio", "How busy a GPU was in its last sampling period.", "hw_id"
        )
        self._gpu_used = self._gauge("hw_gpu_memory_usage_bytes", "Memory in use on a GPU.", "hw_id")
        self._gpu_total = self._gauge("hw_gpu_memory_limit_bytes", "Memory of a GPU.", "hw_id")

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)

    def watch(self, *, spool: Callable[[], SpoolState], admission: Admission) -> None:
        """Read these gauges at each scrape, and be told how long requests wait."""
        admission.on_wait = self.waited
        reads: list[tuple[str, str, Callable[[], float]]] = [
            ("agentloop_in_flight", "Generations that run.", lambda: admission.in_flight),
            ("agentloop_places", "Generations that may run at once.", lambda: admission.places),
            ("agentloop_spool_records", "Log records not in Postgres yet.", lambda: spool().records),
            ("agentloop_spool_bytes", "Bytes of log records not in Postgres yet.", lambda: spool().bytes),
            ("agentloop_spool_max_bytes", "At so many, new work is refused.", lambda: spool().max_bytes),
            ("agentloop_spool_oldest_seconds", "Age of the oldest of them.", lambda: spool().oldest_seconds),
        ]
        for name, description, read in reads:
            self._gauge(name, description).set_function(read)
        queued = self._gauge("agentloop_queued", "Requests that wait for a place.", "priority")
        for priority in Priority:
            queued.labels(priority.value).set_function(partial(admission.queued_of, priority))

    def watch_memory(self, available: Callable[[], int], floor: int) -> None:
        """Read at each scrape what memory is left; with less than `floor` bytes new work is refused."""
        name, about = "agentloop_memory_available_bytes", "Memory that this server can have without swapping."
        self._gauge(name, about).set_function(available)
        self._gauge("agentloop_memory_floor_bytes", "With less, new work is refused.").set(floor)

    def watch_handover(self, handover: Handover) -> None:
        """Read at each scrape who has the GPU, and count how leases of it end."""
        states = self._gauge("agentloop_gpu_handover", "1 for the state of the GPU's handover.", "state")
        for state in HandoverState:
            states.labels(state.value).set_function(partial(_is, handover, state))
        held = self._gauge("agentloop_gpu_lease_seconds", "How long the GPU has been away from serving.")
        held.set_function(lambda: handover.held_seconds)
        most = self._gauge("agentloop_gpu_lease_max_seconds", "How long it may be: then it is taken back.")
        most.set(handover.max_seconds)
        ended = Counter(
            "agentloop_gpu_leases",
            "Leases of the GPU that ended: released, expired (not renewed), overdue (too long), failed.",
            ("ended",),
            registry=self.registry,
        )
        for why in ENDS:
            ended.labels(why)
        handover.ended = lambda why: ended.labels(why).inc()

    def watch_hosts(self, standings: Callable[[], dict[str, int]]) -> None:
        """Read at each scrape how the hosts of an engine fare that has several."""
        hosts = self._gauge(
            "agentloop_engine_hosts", "The engine's hosts that are well, ejected, down.", "standing"
        )

        def count(standing: str) -> float:
            return standings()[standing]

        for standing in standings():
            hosts.labels(standing).set_function(partial(count, standing))

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
        version, target_role = end.asked(start)
        role, status, alias = target_role.value, end.status.value, self._alias(start.alias)
        self._series.of(self._inferences, version, alias, version, role, status, reason, kind).inc()
        if end.status is Status.OK:
            self._answers.add(start.id, start.caller, (alias, version, role))
        for failed in end.attempts[:-1]:
            name, role = failed.model_version, failed.target_role.value
            self._series.of(self._fallbacks, name, alias, name, role, failed.error_type).inc()
        self._series.of(self._tokens, version, version, "input").observe(end.usage.input_tokens)
        self._series.of(self._tokens, version, version, "output").observe(end.usage.output_tokens)
        if not end.attempts:  # else much of the time was that of a version that failed
            self._timed(alias, version, end, error)

    def _timed(self, alias: str, version: str, end: InferenceEnded, error: BaseException | None) -> None:
        # How long it took was the caller's choice, or mistake, and not the model's.
        if end.status is not Status.CANCELLED and not isinstance(error, InvalidArgument):
            self._series.of(self._duration, version, alias, version).observe(end.timings.total_ms / 1000)
        if end.timings.ttft_ms is not None:
            self._series.of(self._first_token, version, alias, version).observe(end.timings.ttft_ms / 1000)
            if end.status is Status.OK and end.usage.output_tokens > 1:
                seconds = (end.timings.total_ms - end.timings.ttft_ms) / 1000
                per_token = seconds / (end.usage.output_tokens - 1)
                self._series.of(self._per_token, version, alias, version).observe(per_token)

    def _alias(self, alias: str) -> str:
        """Beside routes' aliases, those that an administrator wrote who named a version: any text."""
        if alias in self._aliases or len(self._aliases) < ALIASES:
            self._aliases.add(alias)
            return alias
        return "other"

    def waited(self, priority: Priority, seconds: float) -> None:
        """A request got a place."""
        self._queue_time.labels(priority.value).observe(seconds)

    def embedded(self, model_version: str, texts: int, input_tokens: int) -> None:
        """Texts were turned into vectors."""
        self._series.of(self._embedded, model_version, model_version).inc(texts)
        self._series.of(self._tokens, model_version, model_version, "input").observe(input_tokens)

    # The log's hooks.

    def logged(self, records: int = 1) -> None:
        """The spool took records."""
        self._records.labels("accepted").inc(records)

    def fed_back(self, feedback: Feedback) -> None:
        """The spool took a caller's feedback."""
        self.logged()
        if heard := self._answers.heard(feedback):
            (alias, version, role), opinion = heard
            self._series.of(self._feedback, version, alias, version, role, opinion).inc()

    def stored(self, records: int) -> None:
        """Postgres took records."""
        self._records.labels("stored").inc(records)

    def dead_lettered(self, records: int) -> None:
        """Records that Postgres will never take were set aside."""
        self._records.labels("dead_lettered").inc(records)

    def redacted(self, kind: str, times: int) -> None:
        """So many secrets, or personal data, of a kind were kept out of the log."""
        self._redacted.labels(kind).inc(times)

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

    def gpus_are(self, gpus: Iterable[Gpu]) -> None:
        """The GPUs were asked; those that did not answer are shown no more."""
        for gauge in (self._gpu_busy, self._gpu_used, self._gpu_total):
            gauge.clear()
        for gpu in gpus:
            self._gpu_busy.labels(gpu.id).set(gpu.utilization)
            self._gpu_used.labels(gpu.id).set(gpu.memory_used)
            self._gpu_total.labels(gpu.id).set(gpu.memory_total)

    def _gauge(self, name: str, description: str, *labels: str) -> Gauge:
        return Gauge(name, description, labels, registry=self.registry)


def _is(handover: Handover, state: HandoverState) -> float:
    return float(handover.state is state)
