"""`agent-loop top`: what a server is doing, as it does it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from agentloop.cli_session import JsonOption, Session, print_json, printable, session
from agentloop.errors import RpcError
from agentloop.scrape import DEFAULT_HTTP, Scrape, ScrapeError, scrape
from agentloop.sync_client import Client
from agentloop.types import ModelVersion

SHARES = {"p50_ms": 0.5, "p95_ms": 0.95, "p99_ms": 0.99}
_FIRST_TOKEN = "gen_ai_server_time_to_first_token_seconds"  # noqa: S105 - a metric's name
_DURATION = "gen_ai_server_request_duration_seconds"


@dataclass(frozen=True, slots=True)
class Figures:
    """One moment of a server. Counts are since it started; rates and latencies over the last `seconds`.

    Where `seconds` is None nothing was seen before: latencies are then since the start, and there is no rate.
    """

    seconds: float | None
    requests: Mapping[str, float]
    refused: Mapping[str, float]
    requests_per_second: float | None
    output_tokens_per_second: float | None
    in_flight: float
    queued: float
    first_token: Mapping[str, float | None]
    duration: Mapping[str, float | None]
    tokens: Mapping[str, float]
    spool_records: float
    spool_oldest_seconds: float
    engine_up: bool
    store_up: bool
    by_model: Mapping[str, float]


def figures(now: Scrape, before: Scrape | None = None) -> Figures:
    """What `now` says, and what has changed since `before`."""
    seconds = None if before is None else max(now.at - before.at, 1e-9)

    def rate(name: str, label: str, value: str) -> float | None:
        if before is None or seconds is None:
            return None
        counts = [each.by(name, label) for each in (now, before)]
        sums = [sum(each.values()) if not value else each.get(value, 0.0) for each in counts]
        return max(0.0, sums[0] - sums[1]) / seconds  # a server that was restarted counts from 0

    tokens = "gen_ai_client_token_usage_sum"
    return Figures(
        seconds=seconds,
        requests=now.by("agentloop_inferences_total", "status"),
        refused=now.by("agentloop_refused_total", "reason"),
        requests_per_second=rate("agentloop_inferences_total", "status", ""),
        output_tokens_per_second=rate(tokens, "gen_ai_token_type", "output"),
        in_flight=now.total("agentloop_in_flight"),
        queued=now.total("agentloop_queued"),
        first_token=_latencies(_FIRST_TOKEN, now, before),
        duration=_latencies(_DURATION, now, before),
        tokens=now.by(tokens, "gen_ai_token_type"),
        spool_records=now.total("agentloop_spool_records"),
        spool_oldest_seconds=now.total("agentloop_spool_oldest_seconds"),
        engine_up=now.total("agentloop_engine_up") > 0,
        store_up=now.total("agentloop_store_up") > 0,
        by_model=now.by("agentloop_inferences_total", "model_version"),
    )


def _latencies(name: str, now: Scrape, before: Scrape | None) -> dict[str, float | None]:
    found = {key: now.quantile(name, share, before) for key, share in SHARES.items()}
    return {key: None if value is None else value * 1000 for key, value in found.items()}


def top(
    context: typer.Context,
    http: Annotated[
        str, typer.Option(envvar="AGENTLOOP_HTTP", help="The server's HTTP address: host:port, or a URL.")
    ] = DEFAULT_HTTP,
    interval: Annotated[float, typer.Option(help="Seconds between looks.", min=0.1, max=3600)] = 2,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show requests, latency, queue and models as they change; Ctrl-C ends it. Models need a token."""
    here = session(context)
    if not (once or as_json or Console().is_terminal):
        raise typer.BadParameter("standard output is no terminal; choose --once, or --json")
    with here.client(as_json=as_json) as client:
        now = scrape(http, here.ca_file)
        if once:
            _show(figures(now), _models(client), http, as_json)
            return
        with suppress(KeyboardInterrupt):
            if as_json:
                _stream(client, here, http, interval, now)
            else:
                _watch(client, here, http, interval, now)


def _show(found: Figures, models: list[ModelVersion] | str, http: str, as_json: bool) -> None:
    if as_json:
        print_json(_plain(found, models))
    else:
        Console().print(_screen(found, models, http))


def _stream(client: Client, here: Session, http: str, interval: float, before: Scrape) -> None:
    """A line of JSON at each look."""
    while True:
        time.sleep(interval)
        now = scrape(http, here.ca_file)
        print_json(_plain(figures(now, before), _models(client)))
        before = now


def _watch(client: Client, here: Session, http: str, interval: float, before: Scrape) -> None:
    """The screen, redrawn at each look; a server that does not answer is waited for."""
    with Live(_screen(figures(before), _models(client), http), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            try:
                now = scrape(http, here.ca_file)
            except ScrapeError as error:
                live.update(Panel(Text(f"{error}; trying again"), title="agent-loop top"), refresh=True)
                continue
            live.update(_screen(figures(now, before), _models(client), http), refresh=True)
            before = now


def _models(client: Client) -> list[ModelVersion] | str:
    """What is installed; or why that cannot be told."""
    try:
        return client.list_models(timeout_s=5)
    except RpcError as error:
        return str(error)


def _plain(found: Figures, models: list[ModelVersion] | str) -> dict[str, Any]:
    listed = None if isinstance(models, str) else [asdict(model) for model in models]
    return {**asdict(found), "models": listed}


def _screen(found: Figures, models: list[ModelVersion] | str, http: str) -> RenderableType:
    state = Table.grid(padding=(0, 2))
    window = "since the start" if found.seconds is None else f"last {found.seconds:.1f} s"
    state.add_row("engine", _up(found.engine_up), "Postgres", _up(found.store_up))
    state.add_row("in flight", f"{found.in_flight:.0f}", "queued", f"{found.queued:.0f}")
    rates = _number(found.requests_per_second), _number(found.output_tokens_per_second)
    state.add_row("requests/s", rates[0], "tokens/s", rates[1])
    oldest = f"{found.spool_oldest_seconds:.1f} s"
    state.add_row("spool", f"{found.spool_records:.0f} records", "oldest", oldest)
    latency = Table("ms", *[key.removesuffix("_ms") for key in SHARES], title=f"latency, {window}")
    latency.add_row("first token", *[_number(value) for value in found.first_token.values()])
    latency.add_row("whole answer", *[_number(value) for value in found.duration.values()])
    counts = Table("ended as", "requests", title="since the start")
    for status, count in sorted(found.requests.items()):
        counts.add_row(status, f"{count:.0f}")
    for reason, count in sorted(found.refused.items()):
        counts.add_row(f"refused: {reason}", f"{count:.0f}")
    return Panel(Group(state, latency, counts, _model_table(found, models)), title=f"agent-loop top · {http}")


def _model_table(found: Figures, models: list[ModelVersion] | str) -> RenderableType:
    if isinstance(models, str):
        return Text(printable(f"models are not shown: {models}", to_terminal=True))
    table = Table("model version", "loaded", "MB", "requests")
    for model in models:
        requests = f"{found.by_model.get(model.name, 0):.0f}"
        table.add_row(model.name, "yes" if model.loaded else "no", f"{model.size_bytes / 1e6:.0f}", requests)
    return table


def _up(up: bool) -> str:
    return "[green]up[/]" if up else "[red]down[/]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
