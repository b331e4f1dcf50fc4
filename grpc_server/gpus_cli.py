"""`python -m grpc_server gpu-monitor`: the GPUs as they work; without one, processor and memory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from grpc_server.adapters.gpus import Gpus
from grpc_server.domain.ports import GpuDetail

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
ALERT = 0.8
"""A share of memory, or of a processor, above which it is told in red."""
HOT = 83
"""Degrees Celsius at which NVIDIA's consumer cards begin to slow down."""


@app.command()
def gpu_monitor(
    interval: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    alert: Annotated[float, typer.Option(min=0, max=1, help="Share of memory above which to alert.")] = ALERT,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each look.")] = False,
) -> None:
    """Show utilisation, memory by process and temperature; alert above 80 %. --once exits with 3 then."""
    gpus = Gpus()
    try:
        _watch(gpus, interval, once=once, alert=alert, as_json=as_json)
    except KeyboardInterrupt:
        return
    finally:
        gpus.close()


def _watch(gpus: Any, interval: float, *, once: bool, alert: float, as_json: bool) -> None:
    psutil.cpu_percent()  # since when the first look counts
    time.sleep(min(interval, 0.2))
    console = Console()
    if once or as_json or not console.is_terminal:
        while True:
            found = look(gpus, alert)
            if as_json:
                typer.echo(json.dumps(found, sort_keys=True))
            else:
                console.print(page(found))
            if once:
                raise typer.Exit(3 if found["alerts"] else 0)
            time.sleep(interval)
    with Live(page(look(gpus, alert)), console=console, screen=True) as live:
        while True:
            time.sleep(interval)
            live.update(page(look(gpus, alert)))


def look(gpus: Any, alert: float, named: Callable[[int], str] | None = None) -> dict[str, Any]:
    """What there is now, and what of it is above `alert`."""
    memory = psutil.virtual_memory()
    found: dict[str, Any] = {
        "gpus": [_plain(each, named or _process_name) for each in gpus.details()],
        "cpu": psutil.cpu_percent() / 100,
        "memory_used": memory.total - memory.available,
        "memory_total": memory.total,
    }
    found["alerts"] = _alerts(found, alert)
    return found


def _plain(detail: GpuDetail, named: Callable[[int], str]) -> dict[str, Any]:
    return {
        "id": detail.gpu.id,
        "name": detail.name,
        "utilization": detail.gpu.utilization,
        "memory_used": detail.gpu.memory_used,
        "memory_total": detail.gpu.memory_total,
        "temperature": detail.temperature,
        "processes": [
            {"pid": pid, "name": named(pid), "memory_used": used} for pid, used in detail.processes
        ],
    }


def _process_name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "?"


def _alerts(found: dict[str, Any], alert: float) -> list[str]:
    said = []
    for gpu in found["gpus"]:
        share = gpu["memory_used"] / max(1, gpu["memory_total"])
        if share > alert:
            said.append(f"{gpu['name']} ({gpu['id']}): {share:.0%} of its memory is in use")
        if (gpu["temperature"] or 0) >= HOT:
            said.append(f"{gpu['name']} ({gpu['id']}): {gpu['temperature']} °C")
    share = found["memory_used"] / found["memory_total"]
    if share > alert:
        said.append(f"this machine: {share:.0%} of its memory is in use")
    return said


def page(found: dict[str, Any]) -> RenderableType:
    """A look, as tables."""
    parts: list[RenderableType] = []
    if not found["gpus"]:
        parts.append(Text("There is no NVIDIA GPU here, or no driver for it; the processor and its memory:"))
    for gpu in found["gpus"]:
        temperature = "" if gpu["temperature"] is None else f", {gpu['temperature']} °C"
        table = Table(title=f"{gpu['name']}: {gpu['utilization']:.0%} busy{temperature}", min_width=56)
        table.add_column("process")
        table.add_column("GiB", justify="right")
        for each in gpu["processes"]:
            table.add_row(Text(f"{each['name']} ({each['pid']})"), _gib(each["memory_used"]))
        table.add_section()
        table.add_row("all", f"{_gib(gpu['memory_used'])} of {_gib(gpu['memory_total'])}")
        parts.append(table)
    parts.append(
        Text(
            f"processor {found['cpu']:.0%} busy,"
            f" memory {_gib(found['memory_used'])} of {_gib(found['memory_total'])} GiB"
        )
    )
    parts += [Text(f"ALERT  {each}", style="bold red") for each in found["alerts"]]
    return Group(*parts)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
