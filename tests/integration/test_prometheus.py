"""What this server counts, read by a real Prometheus; and the alert rules, checked and fired."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from agentloop.v1 import inference_pb2
from grpc_server.admission import Ask
from grpc_server.domain.errors import InvalidArgument
from grpc_server.domain.ports import Gpu
from tests.integration.grpc_bench import Bench, bearer, status_of
from tests.live_server import ROOT

RULES = ROOT / "infra" / "prometheus"
SECONDS = 30.0


class Prometheus:
    """Its HTTP API."""

    def __init__(self, url: str) -> None:
        self.client = httpx.AsyncClient(base_url=url, trust_env=False, timeout=10)

    async def value(self, query: str) -> float | None:
        """What a query gives now; None if that is nothing."""
        answer = (await self.client.get("/api/v1/query", params={"query": query})).raise_for_status().json()
        result = answer["data"]["result"]
        return float(result[0]["value"][1]) if result else None

    async def firing(self) -> set[str]:
        answer = (await self.client.get("/api/v1/alerts")).raise_for_status().json()
        return {a["labels"]["alertname"] for a in answer["data"]["alerts"] if a["state"] == "firing"}

    async def until(self, query: str, wanted: float) -> None:
        found: float | None = None
        for _ in range(int(SECONDS / 0.1)):
            found = await self.value(query)
            if found == wanted:
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"{query} is {found}, not {wanted}")


@contextlib.asynccontextmanager
async def scraping(address: str, place: Path) -> AsyncIterator[Prometheus]:
    """A Prometheus with our configuration, but for the address, and how often it looks."""
    config: dict[str, Any] = yaml.safe_load((RULES / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"}
    config["rule_files"] = [str(RULES / "alerts.yml")]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [address]
    (place / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    process = _start(place, listen)
    prometheus = Prometheus(f"http://{listen}")
    try:
        for _ in range(int(SECONDS / 0.1)):
            with contextlib.suppress(httpx.TransportError):
                if (await prometheus.client.get("/-/ready")).status_code == 200:
                    break
            assert process.poll() is None, (place / "prometheus.log").read_text()
            await asyncio.sleep(0.1)
        yield prometheus
    finally:
        process.terminate()
        process.wait(SECONDS)
        await prometheus.client.aclose()


def _start(place: Path, listen: str) -> subprocess.Popen[bytes]:
    with (place / "prometheus.log").open("wb") as log:
        return subprocess.Popen(
            [
                "prometheus",
                f"--config.file={place / 'prometheus.yml'}",
                f"--storage.tsdb.path={place / 'data'}",
                f"--web.listen-address={listen}",
            ],
            stdout=log,
            stderr=log,
        )


async def test_prometheus_reads_what_was_asked_and_lets_an_alert_fire(tmp_path: Path) -> None:
    async with Bench().run(tmp_path) as bench:
        assert bench.running is not None
        bench.metrics.dead_lettered(0)
        for _ in range(3):
            await bench.chat()
        await status_of(bench.chat_stub.Chat(inference_pb2.ChatRequest(), metadata=bearer("al_infer")))
        bench.metrics.gpus_are([Gpu("GPU-1", 0.5, 30, 80)])
        async with scraping(bench.running.http_address, tmp_path) as prometheus:
            await prometheus.until('up{job="agentloop"}', 1)
            await prometheus.until('sum(agentloop_inferences_total{status="ok"})', 3)
            await prometheus.until('agentloop_refused_total{reason="InvalidArgument"}', 1)
            await prometheus.until("gen_ai_server_time_to_first_token_seconds_count", 3)
            await prometheus.until("gen_ai_server_time_per_output_token_seconds_count", 3)
            await prometheus.until("gen_ai_server_request_duration_seconds_count", 3)
            await prometheus.until('gen_ai_client_token_usage_sum{gen_ai_token_type="output"}', 12)
            await prometheus.until('agentloop_queue_time_seconds_count{priority="interactive"}', 3)
            await prometheus.until("agentloop_spool_records", 6)
            await prometheus.until("agentloop_engine_up", 1)
            await prometheus.until("hw_gpu:utilization_ratio:avg10m", 0.5)
            assert await prometheus.value("process_resident_memory_bytes > 1e7") is not None
            assert "AgentloopDeadLetters" not in await prometheus.firing()
            bench.metrics.dead_lettered(1)
            await prometheus.until('ALERTS{alertname="AgentloopDeadLetters", alertstate="firing"}', 1)
            assert "AgentloopDeadLetters" in await prometheus.firing()


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "alerts.yml"),
        ("check", "config", "prometheus.yml"),
        ("test", "rules", "alerts.test.yml"),
    ],
)
def test_promtool_has_nothing_against_the_rules_and_their_tests_pass(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=RULES, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


async def test_every_figure_that_a_rule_reads_is_one_that_the_server_shows(tmp_path: Path) -> None:
    groups = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    made = {rule["record"] for rule in rules if "record" in rule}
    read = {name for rule in rules for name in re.findall(r"[a-z][a-z0-9_:]*_[a-z0-9_:]+", rule["expr"])}
    async with Bench().run(tmp_path) as bench:
        await bench.chat()
        bench.metrics.refused(InvalidArgument("no"))
        bench.metrics.gpus_are([Gpu("GPU-1", 0.5, 30, 80)])
        bench.metrics.watch_memory(lambda: 1, 1)
        async with bench.inference.admission.place(Ask()):
            pass
        families = text_string_to_metric_families(bench.metrics.text().decode())
        shown = {sample.name for family in families for sample in family.samples}
        labels = {
            label
            for family in text_string_to_metric_families(bench.metrics.text().decode())
            for sample in family.samples
            for label in sample.labels
        }
    functions = {"histogram_quantile", "avg_over_time"}
    states = {"dead_lettered"}
    assert read - functions - states - labels - made <= shown
    alerts = [rule["alert"] for rule in rules if "alert" in rule]
    tested = (RULES / "alerts.test.yml").read_text()
    assert not [alert for alert in alerts if f"alertname: {alert}" not in tested]
