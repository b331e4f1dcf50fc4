"""Rules that are checked and fire, read of a real server and a real host by a real Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from pydantic import SecretStr

from agentloop.v1 import inference_pb2
from grpc_server import bootstrap
from grpc_server.domain.errors import EngineFailed
from grpc_server.domain.ports import Finished, Generation, Gpu, Piece
from grpc_server.domain.types import Route, Target, TargetRole
from grpc_server.metrics import Metrics
from grpc_server.settings import Settings
from infra.prometheus import backup_age
from tests.ansible_modules import metrics as figures
from tests.ansible_modules import sources
from tests.fakes import BASE, FakeAuthenticator, FakeEngine, FakeRoutes, FakeRouteStore
from tests.integration import night_by_hand
from tests.integration.alertmanager_bench import alertmanager
from tests.integration.conftest_log import dsn, postgres  # noqa: F401 (fixtures)
from tests.integration.grpc_bench import TOKENS, Bench, bearer, hello, status_of
from tests.integration.prometheus_bench import (
    RULES,
    dashboard_queries,
    haproxy,
    node_exporter,
    rules,
    scraping,
    selectors,
    unfiltered,
)
from tests.live_server import ROOT
from training import cycle

RUNBOOKS = ROOT / "docs" / "runbooks"
ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}
NEW = "gemma-3-270m:new"


class OneVersionFails(FakeEngine):
    """Answers after a moment; the new version does not."""

    def __init__(self) -> None:
        super().__init__(parallel=2, models=(BASE, NEW))

    async def generate(self, generation: Generation) -> AsyncGenerator[Piece | Finished, None]:
        await asyncio.sleep(0.01)
        if generation.model_version == NEW:
            raise EngineFailed("no token")
        async for event in super().generate(generation):
            yield event


async def load(bench: Bench) -> int:
    """What callers do on a bad day; how many were answered."""
    chats = [bench.chat(hello("Call me on +41 44 668 18 00"), timeout=20) for _ in range(24)]
    ended = await asyncio.gather(*chats, return_exceptions=True)
    for error in ended:
        assert not isinstance(error, BaseException) or isinstance(error, grpc.aio.AioRpcError), error
    answered = sum(not isinstance(each, BaseException) for each in ended)
    metadata = bearer("al_infer")
    await status_of(bench.chat_stub.Chat(inference_pb2.ChatRequest(), metadata=metadata))
    named = hello(model_version=NEW)
    await status_of(bench.chat_stub.Chat(named, metadata=bearer("al_admin")))
    await bench.chat_stub.Embed(inference_pb2.EmbedRequest(texts=["a text"]), metadata=metadata)
    return answered


@contextlib.asynccontextmanager
async def served(place: Path, database: str, metrics: Metrics) -> AsyncIterator[tuple[str, Bench]]:
    """A whole server, but for its engine, which fails now and then; and stubs on it."""
    settings = Settings(
        state_dir=place / "state",
        cycles_dir=place / "cycles",
        database_url=SecretStr(database),
        grpc_address="127.0.0.1:0",
        http_address="127.0.0.1:0",
        grace_seconds=0.2,
        queue_size=4,
    )
    targets = (Target(BASE, TargetRole.STABLE, 50), Target(NEW, TargetRole.CANARY, 50))
    routes = FakeRoutes(FakeRouteStore([Route("default", 1, targets)]))
    authenticator = FakeAuthenticator(dict(TOKENS))
    parts: dict[str, Any] = {"engine": OneVersionFails(), "routes": routes, "authenticator": authenticator}
    async with (
        bootstrap.service(settings, metrics=metrics, **parts) as running,
        grpc.aio.insecure_channel(running.grpc_address) as channel,
    ):
        yield running.http_address, Bench().ask_through(channel)


def a_night(cycles: Path) -> None:
    """One that has ended."""
    note = {"outcome": "done", "ended_at": "2026-01-31T02:30:00+00:00"}
    directory = night_by_hand.make(cycles)
    cycle.write_json(directory / "steps" / "report.json", note)


async def test_every_query_of_every_rule_finds_something_of_a_server_under_load(
    dsn: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    a_night(tmp_path / "cycles")
    (tmp_path / "host").mkdir()
    backup = {"name": "main", "backup": [{"type": "full", "timestamp": {"stop": 1795395900}}]}
    backup_age.write(tmp_path / "host" / "backup.prom", backup_age.figures([backup]))
    metrics = Metrics()
    async with (
        served(tmp_path, dsn, metrics) as (address, bench),
        node_exporter(tmp_path / "host") as host,
        alertmanager(tmp_path / "alerts") as told,
        haproxy(tmp_path, address) as gateway,
        scraping(tmp_path, [address], [host], [told.address], [gateway]) as prometheus,
    ):
        # As where there are GPUs, and several Ollamas: this machine has neither.
        metrics.gpus_are([Gpu("GPU-1", 0.5, 30, 80)])
        metrics.watch_hosts(lambda: {"well": 1, "ejected": 0, "down": 0})
        answered = await load(bench)
        await prometheus.until('sum(agentloop_inferences_total{status="ok"})', answered)
        scraped = await asyncio.to_thread(sources.prometheus(prometheus.url, 'job="agentloop"'))
        assert figures.figures(scraped, "default", BASE).answered == answered
        assert figures.figures(scraped, "default", NEW).failed > 0
        await prometheus.until('count(ALERTS{alertname="AgentloopDeadLetters"}) or vector(0)', 0)
        metrics.dead_lettered(1)
        await prometheus.until('ALERTS{alertname="AgentloopDeadLetters", alertstate="firing"}', 1)
        await told.until_mailed("operations@example.com", "/docs/runbooks/AgentloopDeadLetters.md")
        asked = [rule["expr"] for rule in rules()] + dashboard_queries()
        asked += [rule["record"] for rule in rules() if "record" in rule]
        await prometheus.until_none_is_empty([unfiltered(query) for query in asked])
        await prometheus.until("hw_gpu:utilization_ratio:avg10m", 0.5)


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "recording.yml", "alerts.yml"),
        ("check", "config", "prometheus.yml"),
        ("test", "rules", "alerts.test.yml"),
        ("test", "rules", "objectives.test.yml"),
        ("test", "rules", "days.test.yml"),
    ],
)
def test_promtool_has_nothing_against_the_rules_and_their_tests_pass(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=RULES, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tested_where_it_fires_and_where_it_does_not() -> None:
    cases: set[tuple[str, bool]] = set()
    for file in RULES.glob("*.test.yml"):
        for group in yaml.safe_load(file.read_text())["tests"]:
            cases |= {(case["alertname"], bool(case["exp_alerts"])) for case in group["alert_rule_test"]}
    assert cases == {(alert, fires) for alert in ALERTS for fires in (True, False)}


def test_each_alert_leads_to_its_runbook_and_each_link_there_leads_somewhere() -> None:
    for alert, rule in ALERTS.items():
        assert rule["annotations"]["runbook_url"] == f"{{{{ $externalLabels.docs }}}}/runbooks/{alert}.md"
        assert rule["labels"]["severity"] in {"page", "ticket"}
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == set(ALERTS)
    for path in RUNBOOKS.glob("*.md"):
        text = path.read_text()
        assert text.startswith(f"# {path.stem}\n")
        assert all(f"**{part}" in text for part in ("What is so.", "Who is hurt.", "Look", "Do")), path
        for link in re.findall(r"\]\(([^)]+)\)", text):
            assert (path.parent / link).is_file(), f"{path}: {link}"


def test_what_a_query_reads_is_found_in_it() -> None:
    query = 'sum by (a, b) (rate(x_total{s=~"or|by", t!="y"}[5m])) / on (c) (m:y:z or vector(0)) > 2 * 1e3'
    assert selectors(query) == {'x_total{s=~"or|by", t!="y"}', "m:y:z"}
    assert unfiltered('a{b!="c"} == 0 and d >= 2') == 'a{b!="c"} == bool  0 and d >= bool  2'
