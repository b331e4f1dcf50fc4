"""The figures and their names, which rollouts, dashboards and alerts read."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

from prometheus_client.parser import text_string_to_metric_families

from grpc_server.admission import Admission, Ask
from grpc_server.domain.errors import EngineUnavailable, Exhausted, InvalidArgument
from grpc_server.domain.ports import Gpu, SpoolState
from grpc_server.domain.types import (
    FinishReason,
    InferenceEnded,
    InferenceStarted,
    Priority,
    Status,
    TargetRole,
    Timings,
    Usage,
)
from grpc_server.metrics import Metrics
from grpc_server.series import VERSIONS
from tests import records

NOW = datetime(2026, 1, 1, tzinfo=UTC)
START = InferenceStarted(
    UUID(int=1), "one", "billing", "k", "default", "m:new", TargetRole.CANARY, "", {}, NOW
)
END = InferenceEnded(
    UUID(int=1),
    Status.OK,
    FinishReason.STOP,
    {},
    Usage(7, 3),
    Timings(queue_ms=1.0, ttft_ms=50.0, total_ms=2000.0),
    "",
    NOW,
)


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, frozenset(labels.items())]


def test_what_callers_call_good_or_bad_is_counted_by_the_version_that_answered() -> None:
    metrics = Metrics()
    metrics.ended(START, END)
    metrics.fed_back(records.feedback(START.id, boolean=False, caller=START.caller))
    metrics.fed_back(records.feedback(UUID(int=9), boolean=False, caller=START.caller))
    labels = {"alias": "default", "model_version": "m:new", "target_role": "canary", "opinion": "negative"}
    assert value(metrics, "agentloop_feedback_total", **labels) == 1
    assert value(metrics, "agentloop_log_records_total", state="accepted") == 3


def test_an_inference_is_counted_by_version_role_status_and_reason() -> None:
    metrics = Metrics()
    metrics.accepted(START)
    metrics.ended(START, END)
    labels = {
        "alias": "default",
        "model_version": "m:new",
        "target_role": "canary",
        "status": "ok",
        "finish_reason": "stop",
        "error_type": "",
    }
    assert value(metrics, "agentloop_inferences_total", **labels) == 1
    models = {"gen_ai_request_model": "default", "gen_ai_response_model": "m:new"}
    assert value(metrics, "gen_ai_server_request_duration_seconds_sum", **models) == 2
    assert value(metrics, "gen_ai_server_request_duration_seconds_bucket", le="2.56", **models) == 1
    assert value(metrics, "gen_ai_server_request_duration_seconds_bucket", le="1.28", **models) == 0
    assert value(metrics, "gen_ai_server_time_to_first_token_seconds_sum", **models) == 0.05
    assert value(metrics, "gen_ai_server_time_per_output_token_seconds_sum", **models) == 0.975
    tokens = "gen_ai_client_token_usage_sum"
    assert value(metrics, tokens, gen_ai_response_model="m:new", gen_ai_token_type="input") == 7
    assert value(metrics, tokens, gen_ai_response_model="m:new", gen_ai_token_type="output") == 3
    assert value(metrics, "agentloop_log_records_total", state="accepted") == 2


def test_an_inference_without_a_token_has_no_time_to_first_token() -> None:
    metrics = Metrics()
    metrics.ended(START, InferenceEnded(START.id, Status.ERROR, None, {}, Usage(), Timings(), "down", NOW))
    names = {name for name, _ in samples(metrics)}
    assert "gen_ai_server_time_to_first_token_seconds_sum" not in names
    assert "gen_ai_server_request_duration_seconds_sum" in names


def test_an_inference_that_its_caller_cancelled_is_counted_and_not_timed() -> None:
    metrics = Metrics()
    metrics.ended(START, replace(END, status=Status.CANCELLED, finish_reason=None))
    found = samples(metrics)
    assert not any(name.startswith("gen_ai_server_request_duration") for name, _ in found)
    assert [dict(labels)["status"] for name, labels in found if name == "agentloop_inferences_total"] == [
        "cancelled"
    ]


def test_an_error_is_counted_by_its_kind_and_a_callers_mistake_is_not_timed() -> None:
    metrics = Metrics()
    failed = replace(END, status=Status.ERROR, finish_reason=None)
    metrics.ended(START, failed, InvalidArgument("the prompt is too long"))
    assert not any(name.startswith("gen_ai_server_request_duration") for name, _ in samples(metrics))
    metrics.ended(START, failed, EngineUnavailable("the engine is down"))
    metrics.ended(START, replace(failed, status=Status.DEADLINE), TimeoutError())
    found = samples(metrics)
    kinds = {dict(labels)["error_type"] for name, labels in found if name == "agentloop_inferences_total"}
    assert kinds == {"InvalidArgument", "EngineUnavailable", ""}
    models = {"gen_ai_request_model": "default", "gen_ai_response_model": "m:new"}
    assert value(metrics, "gen_ai_server_request_duration_seconds_count", **models) == 2


def test_refusals_are_counted_by_kind() -> None:
    metrics = Metrics()
    metrics.refused(Exhausted("no place"))
    assert value(metrics, "agentloop_refused_total", reason="Exhausted") == 1


async def test_gauges_are_read_at_each_scrape() -> None:
    metrics, depth, admission = Metrics(), [3], Admission(2)
    metrics.watch(spool=lambda: SpoolState(depth[0], 300, 1.5, 1000), admission=admission)
    assert value(metrics, "agentloop_spool_records") == 3
    depth[0] = 4
    assert value(metrics, "agentloop_spool_records") == 4
    assert value(metrics, "agentloop_spool_bytes") == 300
    assert value(metrics, "agentloop_spool_max_bytes") == 1000
    assert value(metrics, "agentloop_spool_oldest_seconds") == 1.5
    async with admission.place(), admission.place(Ask(priority=Priority.BATCH)):
        waiting = asyncio.create_task(admission.place(Ask(priority=Priority.BATCH)).__aenter__())
        await asyncio.sleep(0)
        assert value(metrics, "agentloop_in_flight") == 2
        assert value(metrics, "agentloop_places") == 2
        assert value(metrics, "agentloop_queued", priority="batch") == 1
        assert value(metrics, "agentloop_queued", priority="interactive") == 0
    await waiting
    assert value(metrics, "agentloop_queue_time_seconds_count", priority="batch") == 2
    assert value(metrics, "agentloop_queue_time_seconds_count", priority="interactive") == 1


def test_memory_is_shown_beside_its_floor_and_the_process_beside_it() -> None:
    metrics = Metrics()
    metrics.watch_memory(lambda: 5000, 1000)
    assert value(metrics, "agentloop_memory_available_bytes") == 5000
    assert value(metrics, "agentloop_memory_floor_bytes") == 1000
    assert value(metrics, "process_resident_memory_bytes") > 1 << 20


def test_gpus_are_shown_while_they_answer() -> None:
    metrics = Metrics()
    metrics.gpus_are([Gpu("GPU-1", 0.85, 30, 80), Gpu("GPU-2", 0.0, 0, 80)])
    assert value(metrics, "hw_gpu_utilization_ratio", hw_id="GPU-1") == 0.85
    assert value(metrics, "hw_gpu_memory_usage_bytes", hw_id="GPU-1") == 30
    assert value(metrics, "hw_gpu_memory_limit_bytes", hw_id="GPU-2") == 80
    metrics.gpus_are([])
    assert not any(name.startswith("hw_gpu") for name, _ in samples(metrics))


def test_however_many_versions_and_aliases_are_named_the_figures_stay_few() -> None:
    metrics = Metrics()
    for number in range(1000):
        metrics.ended(replace(START, alias=f"alias {number}", model_version=f"m:{number}"), END)
    found = samples(metrics)
    versions = {
        dict(labels).get("model_version") for name, labels in found if name == "agentloop_inferences_total"
    }
    assert versions == {f"m:{number}" for number in range(1000 - VERSIONS, 1000)}
    assert {dict(labels).get("alias") for _, labels in found} == {None, "other"}
    assert len(found) < VERSIONS * 120


def test_no_figure_names_a_caller() -> None:
    metrics = Metrics()
    metrics.ended(START, END)
    assert "billing" not in metrics.text().decode()


def test_the_log_counts_what_became_of_its_records() -> None:
    metrics = Metrics()
    metrics.logged(5)
    metrics.stored(3)
    metrics.dead_lettered(1)
    states = {
        state: value(metrics, "agentloop_log_records_total", state=state)
        for state in ("accepted", "stored", "dead_lettered")
    }
    assert states == {"accepted": 5, "stored": 3, "dead_lettered": 1}


def test_parts_are_up_or_down() -> None:
    metrics = Metrics()
    metrics.engine_is(True)
    metrics.store_is(False)
    assert value(metrics, "agentloop_engine_up") == 1
    assert value(metrics, "agentloop_store_up") == 0


def test_texts_and_tokens_of_vectors_are_counted_by_model_version() -> None:
    metrics = Metrics()
    metrics.embedded("m:1", 3, 12)
    text = metrics.text().decode()
    assert 'agentloop_embedded_texts_total{model_version="m:1"} 3.0' in text
    assert 'gen_ai_client_token_usage_sum{gen_ai_response_model="m:1",gen_ai_token_type="input"} 12.0' in text


def test_the_hosts_of_an_engine_are_counted_by_how_they_fare() -> None:
    metrics, fare = Metrics(), {"well": 2, "ejected": 0, "down": 1}
    metrics.watch_hosts(lambda: fare)
    fare["ejected"] = 1
    assert value(metrics, "agentloop_engine_hosts", standing="ejected") == 1
    assert value(metrics, "agentloop_engine_hosts", standing="down") == 1
