"""A host becomes a gateway, a database, an engine and a monitor that tells what is wrong (`make soak`)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import queue
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from grpc_server.adapters.ollama import OllamaEngine
from grpc_server.domain.ports import Generation
from grpc_server.domain.types import Sampling
from tests.estate import GATEWAY, PAGES_PORT, Estate, estate
from tests.integration.conftest_engine import BASE_SHA256, answer, ollama_binary

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

SECONDS = 300.0


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory, base_gguf: Path) -> Iterator[Estate]:
    folder = tmp_path_factory.mktemp("estate")
    archive = folder / "ollama.tar"
    prefix = Path(ollama_binary()).resolve().parents[1]
    subprocess.run(["tar", "-C", prefix, "-cf", archive, "bin", "lib"], check=True)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    engine = {"ollama_archive": str(archive), "ollama_sha256": digest, "ollama_parallel": 2}
    with estate(folder, base_gguf, [], {}, **engine) as there:
        yield there


@contextmanager
def pages(address: str) -> Iterator[queue.Queue[dict[str, Any]]]:
    """What Alertmanager tells a pager at this address."""
    told: queue.Queue[dict[str, Any]] = queue.Queue()

    class Pager(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/alerts":
                told.put(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer((address, PAGES_PORT), Pager) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield told
        server.shutdown()


def get(url: str) -> Any:
    """What a URL answers, as JSON."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answered:
        return json.load(answered)


async def generated(url: str, gguf: Path) -> str:
    async with OllamaEngine(url, context_tokens=512, parallel=2) as engine:
        await engine.install("m:base", gguf, BASE_SHA256)
        await engine.load("m:base")
        asked = Generation("m:base", "The capital of France is", Sampling(max_tokens=4))
        text, _ = await answer(engine, asked)
        return text


def test_one_run_brings_an_engine_and_a_monitor_and_the_next_changes_nothing(company: Estate) -> None:
    with pages(company.outside) as told:
        bare = company.play("site")
        assert bare.code == 0, bare.out
        again = company.play("site")
        assert (again.code, again.changed) == (0, {GATEWAY: 0}), again.out
        looked = company.play("site", "--check")
        assert (looked.code, looked.changed) == (0, {GATEWAY: 0}), looked.out
        host = company.hosts[GATEWAY]

        targets = get(f"http://{host.address}:9090/api/v1/targets?state=active")["data"]["activeTargets"]
        assert {target["labels"]["job"] for target in targets} == {"gateways", "hosts"}
        assert {target["labels"]["instance"] for target in targets} == {GATEWAY}
        # Nobody serves behind this gateway: that is an alert, which reaches the pager with its runbook.
        page = told.get(timeout=SECONDS)
        assert page["groupLabels"]["alertname"] == "AgentloopGatewayEmpty"
        (alert,) = page["alerts"]
        assert alert["labels"]["instance"] == GATEWAY
        assert alert["annotations"]["runbook_url"] == "https://docs/runbooks/AgentloopGatewayEmpty.md"

    url = f"http://{host.address}:11434"
    assert get(f"{url}/api/version") == {"version": "0.34.0"}
    assert asyncio.run(generated(url, company.base_gguf))
    score = host.run("systemd-analyze security ollama --no-pager | tail -1")
    assert float(score.split(":")[1].split()[0]) <= 2.0, score


def test_an_archive_with_another_checksum_is_refused_before_anything_changes(company: Estate) -> None:
    refused = company.play("site", "--tags", "ollama", "-e", f"ollama_sha256={'0' * 64}")
    assert (refused.code, refused.changed) == (2, {GATEWAY: 0})
    assert "has the SHA-256" in refused.out
    assert get(f"http://{company.hosts[GATEWAY].address}:11434/api/version")["version"] == "0.34.0"
