"""A server on a fake engine with traffic on it, and the real playbooks against it; imported by tests."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from agentloop.v1 import inference_pb2, inference_pb2_grpc
from grpc_server.domain.ports import Generation
from grpc_server.domain.types import Route, Target, TargetRole
from tests.coverage_files import untraced
from tests.fakes import FakeEngine, FakeRoutes, FakeRouteStore, route_to
from tests.integration.grpc_bench import Bench, bearer, hello

CHECKOUT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CHAMPION = "m:20260101T000000Z"
CANDIDATE = "m:20260102T000000Z"
GGUF = b"GGUF candidate"

Reply = Callable[[], list[str]]


def good() -> list[str]:
    return ["Hello", "!"]


@dataclass
class World:
    """One server, its callers and one cycle whose candidate may be rolled out."""

    folder: Path
    replies: dict[str, Reply] = field(default_factory=dict)
    bench: Bench = field(default_factory=Bench)
    asking: bool = True
    answered: int = 0
    refused: list[str] = field(default_factory=list)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    @property
    def cycle_dir(self) -> Path:
        return self.folder / "cycles" / "20260102T000000Z"

    @property
    def route(self) -> Route:
        return self.bench.routes.get("default")

    @property
    def targets(self) -> list[tuple[str, str, int]]:
        return [(each.model_version, each.role.value, each.weight) for each in self.route.targets]

    @property
    def rollout(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.cycle_dir / "rollout.json").read_text())
        return found

    @property
    def marks(self) -> list[str]:
        file = self.folder / "marks"
        return file.read_text().splitlines() if file.exists() else []

    def set_route(self, *targets: Target) -> None:
        """Somebody else changes the route."""
        now = self.route
        self.on_loop(self.bench.routes.set(Route("default", now.revision, targets), "somebody else"))

    def on_loop(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def write_cycle(self, verdict: str = "pass") -> None:
        self.cycle_dir.mkdir(parents=True, exist_ok=True)
        (self.cycle_dir / "model.gguf").write_bytes(GGUF)
        gate = {
            "verdict": verdict,
            "reason": "better by 0.2" if verdict == "pass" else "no better",
            "candidate": {"model_version": CANDIDATE, "sha256": hashlib.sha256(GGUF).hexdigest()},
            "champion": {"model_version": CHAMPION, "sha256": "0" * 64},
        }
        (self.cycle_dir / "gate.json").write_text(json.dumps(gate))

    def environment(self, **more: str) -> dict[str, str]:
        assert self.bench.running is not None
        kept = {k: v for k, v in untraced().items() if not k.startswith(("AGENTLOOP", "ANSIBLE"))}
        return kept | {
            "ANSIBLE_CONFIG": str(CHECKOUT / "infra/ansible/ansible.cfg"),
            "ANSIBLE_HOME": str(self.folder / "ansible"),
            "AGENTLOOP_SERVER": self.bench.running.grpc_address,
            "AGENTLOOP_METRICS_URL": f"http://{self.bench.running.http_address}/metrics",
            "AGENTLOOP_TOKEN": "al_admin",
            "AGENTLOOP_PYTHON": str(self.folder / "python"),
            "AGENTLOOP_CYCLE_DIR": str(self.cycle_dir),
            "AGENTLOOP_CANARY_STEPS": "50",
            "AGENTLOOP_CANARY_MIN_REQUESTS": "8",
            "AGENTLOOP_CANARY_BAKE_SECONDS": "0",
            "AGENTLOOP_CANARY_WATCH_SECONDS": "0",
            "AGENTLOOP_CANARY_TIME_LIMIT": "20",
            "AGENTLOOP_CANARY_POLL_INTERVAL": "0.5",
            "MARKS": str(self.folder / "marks"),
            **more,
        }

    def start(self, playbook: str = "rollout", *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """ansible-playbook, in a session of its own so that a test can kill all of it."""
        return subprocess.Popen(
            [
                str(BIN / "ansible-playbook"),
                str(CHECKOUT / f"infra/ansible/playbooks/{playbook}.yml"),
                *arguments,
            ],
            cwd=CHECKOUT,
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def play(self, playbook: str = "rollout", *arguments: str, **environment: str) -> Played:
        process = self.start(playbook, *arguments, **environment)
        out, _ = process.communicate(timeout=240)
        return Played(process.returncode, out)

    async def ask_without_end(self) -> None:
        """A caller that asks again and again; what it gets is counted."""
        assert self.bench.running is not None
        async with grpc.aio.insecure_channel(self.bench.running.grpc_address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            while True:
                await asyncio.sleep(0.05)
                if not self.asking:
                    continue
                try:
                    call: Any = stub.Chat(
                        hello(sampling=inference_pb2.SamplingOptions(max_tokens=8)),
                        metadata=bearer("al_infer"),
                    )
                    async for _ in call:
                        pass
                    self.answered += 1
                except grpc.aio.AioRpcError as error:
                    self.refused.append(error.code().name)


@dataclass(frozen=True)
class Played:
    """How a playbook ended."""

    code: int
    out: str

    @property
    def changed(self) -> int:
        found = re.search(r"changed=(\d+)", self.out)
        assert found is not None, self.out
        return int(found[1])


@contextmanager
def world(folder: Path) -> Iterator[World]:
    """A server whose champion is CHAMPION, with a caller, and a cycle that passed the gate."""
    folder.mkdir(parents=True)
    here = World(folder)

    def reply(generation: Generation) -> list[str]:
        return here.replies.get(generation.model_version, good)()

    here.bench.engine = FakeEngine(reply, models=(CHAMPION,))
    here.bench.routes = FakeRoutes(FakeRouteStore([route_to(CHAMPION)]))
    here.write_cycle()
    python = folder / "python"
    python.write_text('#!/bin/bash\nshift 2\necho "$*" >>"$MARKS"\nexit "${MARK_EXIT:-0}"\n')
    python.chmod(0o755)
    ready, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with here.bench.run(folder):
            caller = asyncio.create_task(here.ask_without_end())
            ready.set()
            await stop.wait()
            caller.cancel()
            with suppress(asyncio.CancelledError):
                await caller

    thread = threading.Thread(target=here.loop.run_until_complete, args=[serve()])
    thread.start()
    try:
        assert ready.wait(30)
        yield here
    finally:
        here.loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        here.loop.close()


def stable(model_version: str) -> Target:
    return Target(model_version, TargetRole.STABLE, 100)
