"""What this server adds between a caller and an engine, beside LiteLLM's proxy and beside a bare gRPC server.

Everything is on: a token is checked and its quotas are counted, a start record is fsynced before the first
byte leaves, the end is logged, both reach Postgres, metrics count. All are asked in turns of a few
requests, in an order drawn anew each turn, by one client in a process of its own; each prompt is new to the
engine. `added` is our percentile less that of the same engine asked directly; `±` lines are half of its 95
% bootstrap interval.

At 1 and at 8 streams the engine is Ollama with Gemma 3 270M (Q4_K_M) on half of the cores; servers, Postgres
and client are on the other half. At 64 streams it is an HTTP server that speaks Ollama's API, and writes the
first token after 200 ms and 40 tokens a second a stream; the client is on its cores. LiteLLM runs with one
worker, and without its own Postgres log (Prisma's engine is no package of a registry), in its favour.

Beside a grpc.aio server that has its answers in memory, at 64 streams of 256 tokens on 8 connections: tokens
a second that reach callers from an engine that does not wait, where the gateway joins those that are there at
once into one message, and the bare server sends each by itself; and messages for the same processor time,
where tokens come one by one, every 16 ms, at both. `us_…` lines divide the gateway's processor time: of a
request with an answer of one token, and of such a message.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from benchmarks.gateway import figures, litellm
from benchmarks.gateway.asking import Asked
from benchmarks.gateway.cores import OTHERS, SERVERS, on
from benchmarks.gateway.parts import COPY, MODEL, Worker, bare_server, gateway, ollama
from benchmarks.gateway.spent import spent
from benchmarks.line import Line
from grpc_server.adapters.local_postgres import LocalPostgres
from tests.scripted_ollama import Script, ScriptedOllama

BASE = Path(os.environ.get("AGENTLOOP_BASE_GGUF", "var/models/gemma-3-270m-q4_k_m.gguf")).resolve()
SHARE = float(os.environ.get("AGENTLOOP_BENCH_SHARE", "1"))
"""Of all samples: less than 1 to see that it runs."""
CONTEXT_TOKENS = 512
PLACES = 8
MANY = 64
CONNECTIONS = 8
ANSWER_TOKENS = 256
PACE_MS = 16
TOKENS = 1_000_000
FLAT_MIB = 8
Samples = dict[str, list[float]]


def run() -> Iterator[Line]:
    """Measure against Ollama, then against constant delays, then messages and memory."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=BASE.parent)))
        with on(SERVERS):
            postgres = stack.enter_context(LocalPostgres(folder / "postgres"))
        scripted = ScriptedOllama()
        with on(OTHERS):
            stack.enter_context(scripted)
        yield from asyncio.run(_against_ollama(folder, postgres))
        yield from _against_constant_delays(folder, postgres, scripted)


# Time to the first token


async def _against_ollama(folder: Path, postgres: LocalPostgres) -> list[Line]:
    binary = os.environ.get("AGENTLOOP_OLLAMA_BIN") or shutil.which("ollama") or "ollama"
    async with ollama(binary, folder / "ollama", BASE, parallel=PLACES, context_tokens=CONTEXT_TOKENS) as url:
        return await asyncio.to_thread(_ollama_lines, folder, postgres, url)


def _ollama_lines(folder: Path, postgres: LocalPostgres, url: str) -> list[Line]:
    options = {"num_ctx": CONTEXT_TOKENS}
    with (
        gateway(
            folder / "before_ollama", postgres, url, BASE, parallel=PLACES, context_tokens=CONTEXT_TOKENS
        ) as (server, token),
        _litellm(folder / "litellm_before_ollama", {"m": (url, COPY, options)}) as proxy,
        Worker("benchmarks.gateway.asking", SERVERS) as client,
    ):
        asked = _paths(url, server.grpc_address, token, proxy.url, tokens=2, cores=SERVERS)
        lines = []
        for streams, turns, requests in ((1, 50, 4), (PLACES, 10, 32)):
            samples = _in_turns(client, asked, streams, turns, requests)
            lines += _latency(samples, f"at_{streams}_stream{'s' if streams > 1 else ''}", "Ollama")
        return lines


def _against_constant_delays(
    folder: Path, postgres: LocalPostgres, scripted: ScriptedOllama
) -> Iterator[Line]:
    with (
        gateway(
            folder / "before_delays", postgres, scripted.url, BASE, parallel=MANY, context_tokens=512
        ) as (server, token),
        _litellm(folder / "litellm_before_delays", {"m": (scripted.url, MODEL, {})}) as proxy,
        Worker("benchmarks.gateway.asking", OTHERS) as client,
    ):
        scripted.play(Script(first_ms=200, token_ms=25))
        asked = _paths(scripted.url, server.grpc_address, token, proxy.url, tokens=32, cores=OTHERS)
        samples = _in_turns(client, asked, MANY, 6, 3 * MANY)
        yield from _latency(samples, f"at_{MANY}_streams", "an engine of constant delay")
        assert server.process is not None
        counted = _Counted(
            server.grpc_address, token, psutil.Process(server.process.pid), postgres.pid or 0, scripted
        )
        yield from counted.lines()


def _litellm(folder: Path, models: dict[str, tuple[str, str, dict[str, int]]]) -> litellm.LiteLLM:
    litellm.install()  # not on the cores that are measured
    with on(SERVERS):
        return litellm.LiteLLM(folder, models).start()


def _paths(
    engine: str, server: str, token: str, proxy: str, *, tokens: int, cores: frozenset[int]
) -> dict[str, Asked]:
    direct = Asked("direct", engine, MODEL, "", 1, 1, tokens, sorted(cores), CONTEXT_TOKENS)
    return {
        "direct": direct,
        "gateway": replace(direct, path="gateway", url=server, token=token),
        "litellm": replace(direct, path="litellm", url=proxy, model="m", token=litellm.KEY),
    }


def _in_turns(
    client: Worker, asked: dict[str, Asked], streams: int, turns: int, requests: int
) -> dict[str, list[float]]:
    """Milliseconds to the first token, by path; the first turn only warms. LiteLLM is asked half as often."""
    order = list(asked)
    samples: Samples = {path: [] for path in order}
    samples["failed"] = []
    chance = random.Random(1)
    for turn in range(1 + max(2, round(turns * SHARE))):
        chance.shuffle(order)
        for path in order:
            if path == "litellm" and turn % 2:
                continue
            times = client.ask(replace(asked[path], streams=streams, requests=requests))
            if path == "gateway":
                samples["failed"] += times["failed"]
            if turn:
                samples[path] += times["first"]
    return samples


def _latency(samples: Samples, at: str, engine: str) -> list[Line]:
    lines = []
    added = {}
    for name, share, goal in (("p50", 50, "<= 1"), ("p99", 99, "<= 10")):
        more, margin = figures.added(samples["gateway"], samples["direct"], share)
        direct = figures.percentile(samples["direct"], share)
        peer = f"{engine}, asked directly"
        lines.append(Line("gateway", f"added_ttft_{name}_{at}", more, "ms", peer, direct, goal))
        lines.append(Line("gateway", f"added_ttft_{name}_{at} ±", margin, "ms", peer, None))
        added[name] = more
    theirs, margin = figures.added(samples["litellm"], samples["direct"], 50)
    peer = f"LiteLLM {litellm.VERSION}'s proxy, without its Postgres log"
    ratio = added["p50"] / theirs if theirs > 0 else float("inf")
    lines.append(Line("gateway", f"litellm_added_ttft_p50_{at} ±", margin, "ms", peer, theirs))
    lines.append(Line("gateway", f"added_latency_vs_litellm_{at}", ratio, "ratio", peer, 1.0, "<= 0.1"))
    failed = sum(samples["failed"])
    lines.append(Line("gateway", f"failed_{at}", failed, "requests", "none may", 0.0, "<= 0"))
    count = len(samples["gateway"])
    lines.append(Line("gateway", f"samples_{at}", count, "requests", "LiteLLM's", len(samples["litellm"])))
    return lines


# Messages and memory


@dataclass
class _Counted:
    """The gateway beside a bare server: who is asked, and what stands behind it."""

    address: str
    token: str
    process: psutil.Process
    postgres: int
    scripted: ScriptedOllama
    client: Worker = field(init=False)

    def lines(self) -> Iterator[Line]:
        with Worker("benchmarks.gateway.counting", OTHERS) as self.client:
            yield from self._tokens()
            yield from self._messages()
            yield from self._request()
            yield from self._memory()

    def _count(
        self, address: str, *, tokens: int = ANSWER_TOKENS, seconds: float = 0, answers: int = 0
    ) -> dict[str, float]:
        asked = {"address": address, "token": self.token, "streams": MANY, "connections": CONNECTIONS}
        answer: dict[str, float] = self.client.ask(
            {**asked, "tokens": tokens, "seconds": seconds, "answers": answers}
        )
        return answer

    def _in_turns(
        self, bare: str, bare_process: psutil.Process, turns: int, seconds: float
    ) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """Tokens a second, and µs of the server's processor time a message, of both; the first turn warms."""
        processes = {self.address: self.process, bare: bare_process}
        rates: dict[str, list[float]] = {who: [] for who in processes}
        busy: dict[str, list[float]] = {who: [] for who in processes}
        for turn in range(1 + turns):
            for who, process in processes.items():
                before = _busy(process)
                found = self._count(who, seconds=seconds if turn else min(seconds, 1))
                if turn:
                    rates[who].append(found["answers"] * ANSWER_TOKENS / found["seconds"])
                    busy[who].append((_busy(process) - before) / found["messages"] * 1e6)
        return rates, busy

    def _tokens(self) -> Iterator[Line]:
        self.scripted.play(Script())
        with bare_server() as (bare, process):
            rates, _ = self._in_turns(bare, process, max(1, round(5 * SHARE)), 3)
        ours, theirs = (figures.percentile(rates[who], 50) for who in (self.address, bare))
        peer = "a bare grpc.aio server, a token a message"
        yield Line("gateway", "tokens_per_s", ours, "tokens/s", peer, theirs)
        yield Line("gateway", "tokens_vs_bare_grpc", ours / theirs, "ratio", peer, 1.0, ">= 0.8")

    def _messages(self) -> Iterator[Line]:
        self.scripted.play(Script(token_ms=PACE_MS))
        with bare_server(PACE_MS) as (bare, process):
            _, busy = self._in_turns(bare, process, max(1, round(3 * SHARE)), 0)
        ours, theirs = (figures.percentile(busy[who], 50) for who in (self.address, bare))
        peer = "a bare grpc.aio server"
        yield Line("gateway", "server_time_per_message", ours, "µs", peer, theirs)
        yield Line("gateway", "messages_vs_bare_grpc", theirs / ours, "ratio", peer, 1.0, ">= 0.8")
        yield from self._divided("message", "messages", lambda: self._count(self.address))

    def _request(self) -> Iterator[Line]:
        self.scripted.play(Script())
        self._count(self.address, tokens=1, seconds=1)
        yield from self._divided("request", "answers", lambda: self._count(self.address, tokens=1, seconds=4))

    def _divided(self, what: str, by: str, work: Callable[[], dict[str, float]]) -> Iterator[Line]:
        found, used = spent(self.process.pid, self.postgres, work)
        total = sum(used.values()) / found[by]
        for part, us in sorted(used.items(), key=lambda item: -item[1]):
            yield Line("gateway", f"us_a_{what}: {part}", us / found[by], "µs", "all together", total)

    def _memory(self) -> Iterator[Line]:
        answers = round(TOKENS * SHARE / ANSWER_TOKENS)
        growth = memory_growth(self.process, lambda: self._count(self.address, answers=answers))
        yield Line(
            "gateway",
            f"memory_growth_over_{answers * ANSWER_TOKENS}_tokens",
            growth,
            "MiB",
            "itself before",
            self.process.memory_info().rss / (1 << 20) - growth,
            f"<= {FLAT_MIB}",
        )


def _busy(process: psutil.Process) -> float:
    """Seconds of processor time that it has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def memory_growth(process: psutil.Process, work: Callable[[], object]) -> float:
    """MiB by which the most that was resident while `work` ran is above what was before."""
    before = process.memory_info().rss
    most = before
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.1):
            most = max(most, process.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        work()
    finally:
        done.set()
        watching.join()
    return float(max(most, process.memory_info().rss) - before) / (1 << 20)
