"""Where the processor's time goes while a server works: by process, and by part of the server.

The kernel counts what each thread was on a processor for; what the server's first thread, which has the event
loop, did meanwhile is told by py-spy, which looks at its stack many times a second: each look counts for the
innermost part that is on the stack.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import psutil

Result = TypeVar("Result")

LOOKS_PER_SECOND = 250
PARTS: dict[str, tuple[str, ...]] = {
    "gRPC": ("grpc_server/servicers/", "grpc_server/interceptors/", "grpc/"),
    "the engine's HTTP": (
        "grpc_server/adapters/ollama",
        "grpc_server/adapters/http_",
        "httpx/",
        "httpx_aiohttp/",
        "aiohttp/",
    ),
    "redaction": (
        "grpc_server/adapters/redact",
        "grpc_server/adapters/answering",
        "grpc_server/domain/withheld",
    ),
    "spool": ("grpc_server/adapters/spool", "grpc_server/adapters/record_json"),
    "Postgres": (
        "grpc_server/drain",
        "grpc_server/adapters/postgres",
        "grpc_server/adapters/erased",
        "psycopg",
    ),
    "metrics": ("grpc_server/metrics", "grpc_server/series", "prometheus_client/"),
    "pipeline": ("grpc_server/",),
}
"""Of the server, by the files of its frames; the first that fits the innermost frame that any fits."""
LOOP = "event loop"
THREADS = "other threads"
"""Those that fsync and read for Postgres, and gRPC's own."""


def spent(server: int, postgres: int, work: Callable[[], Result]) -> tuple[Result, dict[str, float]]:
    """What `work` gives, and µs of processor time meanwhile: of each part of `server`, and of others.

    Without py-spy's looks, where the kernel does not allow them, the event loop stands for all its parts.
    """
    before = _counted(server, postgres)
    result, shares = _looked_at(server, work)
    after = _counted(server, postgres)
    used = {key: count - before.get(key, 0.0) for key, count in after.items()}
    main = used.pop(str(server), 0.0)
    return result, {**{part: main * share for part, share in shares.items()}, **used}


def _counted(server: int, postgres: int) -> dict[str, float]:
    """µs so far: of the first thread of the server under its number, then by names."""
    found: defaultdict[str, float] = defaultdict(float)
    for name, process in _processes(server, postgres):
        for thread, count in _threads(process).items():
            if process == server:
                found[str(server) if thread == server else THREADS] += count
            else:
                found[name] += count
    return dict(found)


def _processes(server: int, postgres: int) -> Iterable[tuple[str, int]]:
    yield "server", server
    for child in psutil.Process(server).children(recursive=True):
        yield "redaction's process", child.pid
    for one in (psutil.Process(postgres), *psutil.Process(postgres).children(recursive=True)):
        yield "Postgres itself", one.pid


def _threads(process: int) -> dict[int, float]:
    """µs on a processor, by thread (Documentation/scheduler/sched-stats.rst of Linux)."""
    found = {}
    with contextlib.suppress(OSError):  # it, or a thread of it, has ended
        for task in Path(f"/proc/{process}/task").iterdir():
            found[int(task.name)] = int((task / "schedstat").read_text().split()[0]) / 1000
    return found


def _looked_at(server: int, work: Callable[[], Result]) -> tuple[Result, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stacks"
        looking = subprocess.Popen(
            [
                *(Path(sys.executable).with_name("py-spy"), "record", "--pid", str(server)),
                *("--rate", str(LOOKS_PER_SECOND), "--nonblocking", "--threads"),
                *("--format", "raw", "--output", path),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            result = work()
        finally:
            looking.send_signal(signal.SIGINT)
            looking.wait(30)
        return result, shares(path.read_text().splitlines() if path.exists() else [])


def shares(stacks: Iterable[str]) -> dict[str, float]:
    """What share of the looks at the first thread each part has; stacks as py-spy's `raw` format has them."""
    found: Counter[str] = Counter()
    for line in stacks:
        frames, _, count = line.rpartition(" ")
        thread, *calls = frames.split(";")
        if "MainThread" in thread:
            found[part_of(calls)] += int(count)
    total = sum(found.values())
    return {part: count / total for part, count in found.items()} if total else {LOOP: 1.0}


def part_of(calls: list[str]) -> str:
    """The innermost part among frames, which read `function (file:line)`, the outermost first."""
    for call in reversed(calls):
        file = call.rpartition(" (")[2]
        for part, files in PARTS.items():
            if file.startswith(files):
                return LOOP if file.startswith("grpc_server/__main__") else part
    return LOOP
