"""A real Prometheus with our configuration, and what our rules and dashboards ask it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.live_server import ROOT

RULES = ROOT / "infra" / "prometheus"
SECONDS = 60.0

_BRACES_OR_COMPARISON = re.compile(r"\{[^}]*\}|(==|!=|<=|>=|<|>)")
_LABELS = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_SELECTOR = re.compile(r"(?<![\w.:])([a-zA-Z_:][\w:]*)(\s*\{[^}]*\})?(?!\w)(?!\s*\()")
_LABEL_VALUES = re.compile(r"label_values\((.*), \w+\)")
_WORDS = {"and", "or", "unless", "bool", "offset"}


def rules() -> list[dict[str, Any]]:
    """Every rule of ours, in order."""
    files: list[str] = yaml.safe_load((RULES / "prometheus.yml").read_text())["rule_files"]
    groups = [group for file in files for group in yaml.safe_load((RULES / file).read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def dashboard_queries() -> list[str]:
    """What the committed dashboards ask, their variables filled in; what fills a variable, too."""
    asked: list[str] = []
    for file in sorted((ROOT / "infra" / "grafana" / "dashboards").glob("*.json")):
        dashboard = json.loads(file.read_text())
        asked += [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
        filling = [str(variable.get("query", "")) for variable in dashboard["templating"]["list"]]
        asked += [found[1] for text in filling for found in [_LABEL_VALUES.fullmatch(text)] if found]
    return [query.replace("$__rate_interval", "1m").replace("$instance", ".*") for query in asked]


def unfiltered(query: str) -> str:
    """The query with comparisons that give 0 or 1: nothing then means that there is nothing to compare."""
    return _BRACES_OR_COMPARISON.sub(lambda found: f"{found[1]} bool " if found[1] else found[0], query)


def selectors(query: str) -> set[str]:
    """What it reads: each name, with the labels that are asked of it."""
    bare = re.sub(r"\[[^\]]*\]", "", _LABELS.sub("", query))
    return {found[0].strip() for found in _SELECTOR.finditer(bare) if found[1] not in _WORDS}


class Prometheus:
    """Its HTTP API."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = httpx.AsyncClient(base_url=url, trust_env=False, timeout=10)

    async def results(self, query: str) -> list[dict[str, Any]]:
        """The series that a query gives now."""
        answer = await self.client.get("/api/v1/query", params={"query": query})
        assert answer.status_code == 200, f"{query}: {answer.text}"
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found

    async def value(self, query: str) -> float | None:
        """What a query gives now; None if that is nothing."""
        found = await self.results(query)
        return float(found[0]["value"][1]) if found else None

    async def until(self, query: str, wanted: float) -> None:
        """Until the query gives that."""
        found: float | None = None
        for _ in range(int(SECONDS / 0.1)):
            found = await self.value(query)
            if found == wanted:
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"{query} is {found}, not {wanted}")

    async def until_none_is_empty(self, queries: Sequence[str]) -> None:
        """Until each query, and each selector in it, gives something; the error names those that do not."""
        left = sorted({*queries, *(part for query in queries for part in selectors(query))})
        for _ in range(int(SECONDS / 0.5)):
            left = [query for query in left if not await self.results(query)]
            if not left:
                return
            await asyncio.sleep(0.5)
        raise AssertionError("these give nothing:\n" + "\n".join(left))


@contextlib.asynccontextmanager
async def scraping(
    place: Path,
    servers: Sequence[str],
    hosts: Sequence[str] = (),
    alertmanagers: Sequence[str] = (),
    gateways: Sequence[str] = (),
) -> AsyncIterator[Prometheus]:
    """A Prometheus with our configuration, but for the addresses, and how often it looks."""
    config: dict[str, Any] = yaml.safe_load((RULES / "prometheus.yml").read_text())
    config["global"] |= {
        "scrape_interval": "200ms",
        "scrape_timeout": "200ms",
        "evaluation_interval": "200ms",
    }
    config["rule_files"] = [str(RULES / file) for file in config["rule_files"]]
    config["alerting"]["alertmanagers"] = [{"static_configs": [{"targets": list(alertmanagers)}]}]
    for job, targets in zip(config["scrape_configs"], (servers, gateways, hosts), strict=True):
        job["static_configs"] = [{"targets": list(targets)}]
    (place / "prometheus.yml").write_text(yaml.safe_dump(config))
    listen = free_address()
    arguments = [
        "prometheus",
        f"--config.file={place / 'prometheus.yml'}",
        f"--storage.tsdb.path={place / 'data'}",
        f"--web.listen-address={listen}",
    ]
    with running(arguments, place / "prometheus.log") as process:
        prometheus = Prometheus(f"http://{listen}")
        async with prometheus.client:
            await answers(f"{prometheus.url}/-/ready", process, place / "prometheus.log")
            yield prometheus


@contextlib.asynccontextmanager
async def node_exporter(place: Path) -> AsyncIterator[str]:
    """The address of a real node exporter that reads text files in `place`."""
    listen = free_address()
    arguments = [
        "prometheus-node-exporter",
        f"--web.listen-address={listen}",
        f"--collector.textfile.directory={place}",
    ]
    with running(arguments, place / "exporter.log") as process:
        await answers(f"http://{listen}/metrics", process, place / "exporter.log")
        yield listen


_HAPROXY = """
defaults
  mode http
  timeout connect 1s
  timeout client 1s
  timeout server 1s
frontend metrics
  bind {listen}
  http-request use-service prometheus-exporter if {{ path /metrics }}
backend grpc
  server a-blue {server}
"""


@contextlib.asynccontextmanager
async def haproxy(place: Path, server: str) -> AsyncIterator[str]:
    """Where a real HAProxy shows its figures; its one server is named as the role gateway names them."""
    listen = free_address()
    (place / "haproxy.cfg").write_text(_HAPROXY.format(listen=listen, server=server))
    with running(["haproxy", "-db", "-f", str(place / "haproxy.cfg")], place / "haproxy.log") as process:
        await answers(f"http://{listen}/metrics", process, place / "haproxy.log")
        yield listen


def free_address() -> str:
    """One of this machine that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


@contextlib.contextmanager
def running(arguments: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program, while the block runs."""
    with log.open("wb") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(SECONDS)


async def answers(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the program answers there."""
    async with httpx.AsyncClient(trust_env=False) as client:
        for _ in range(int(SECONDS / 0.1)):
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(url)).status_code == 200:
                    return
            if process.poll() is not None:
                break
            await asyncio.sleep(0.1)
    said = log.read_text()  # noqa: ASYNC240 - nobody waits
    raise AssertionError(f"{url} does not answer:\n{said}")
