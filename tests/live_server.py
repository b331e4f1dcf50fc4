"""A real server in a process of its own: `python -m grpc_server serve`, on free ports, in its own folder."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from grpc_server.adapters.credentials import new_token
from grpc_server.adapters.local_postgres import LocalPostgres
from grpc_server.adapters.postgres import PostgresStore
from grpc_server.domain.ports import TokenRecord
from grpc_server.domain.types import NO_LIMITS, Limits, Scope

ROOT = Path(__file__).parents[1]
START_SECONDS = 120.0
STOP_SECONDS = 60.0


class LiveServer:
    """Start it, ask it, stop it (or kill it), start it again; `settings` are AGENTLOOP_… in lower case."""

    def __init__(self, state_dir: Path, **settings: Any) -> None:
        self.state_dir = state_dir
        self.grpc_address = ""
        self.http_address = ""
        self.process: subprocess.Popen[bytes] | None = None
        self.log_path = state_dir / "server.log"
        given = {
            "state_dir": state_dir,
            "cycles_dir": state_dir / "cycles",
            "grpc_address": "127.0.0.1:0",
            "http_address": "127.0.0.1:0",
            "parallel": 2,
            "threads": 1,  # see tests/conftest.py
            "context_tokens": 1024,
            **settings,
        }
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("AGENTLOOP_", "GRPC_"))}
        self.environment = {**outside, **{f"AGENTLOOP_{k.upper()}": str(v) for k, v in given.items()}}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.stop()
        finally:
            self._end_postgres()

    @property
    def announcement(self) -> Path:
        """Where the server tells its addresses."""
        return self.state_dir / "server.json"

    def start(self) -> None:
        """Start it and wait until it takes calls."""
        self.state_dir.mkdir(parents=True, exist_ok=True)
        self.announcement.unlink(missing_ok=True)
        with self.log_path.open("ab") as log_file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "grpc_server", "serve"],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,
            )
        until = time.monotonic() + START_SECONDS
        while not self.announcement.exists():
            if self.process.poll() is not None or time.monotonic() > until:
                self.kill()
                self._end_postgres()
                raise AssertionError(f"the server did not start:\n{self.log()}")
            time.sleep(0.05)
        found = json.loads(self.announcement.read_text())
        self.grpc_address, self.http_address = found["grpc_address"], found["http_address"]

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send it a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Its exit code."""
        assert self.process is not None
        return self.process.wait(seconds)

    def stop(self) -> int:
        """End it as an operator would; its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.signal()
            try:
                return self.wait()
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        return self.process.returncode

    def kill(self) -> None:
        """End it as a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def run(self, *arguments: str) -> str:
        """What `python -m grpc_server …` prints, with this server's settings."""
        done = subprocess.run(
            [sys.executable, "-m", "grpc_server", *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def token(self, *scopes: str, name: str = "test", limits: Limits = NO_LIMITS) -> str:
        """A new token with these scopes; `admin` where none is named. No process is started for it."""
        allowed = frozenset(Scope(scope) for scope in scopes or ("admin",))
        text, record = new_token(name, allowed, datetime.now(UTC), None, limits)
        with ThreadPoolExecutor(1) as thread:  # the caller's may run an event loop
            thread.submit(asyncio.run, self._keep(record)).result()
        return text

    async def _keep(self, record: TokenRecord) -> None:
        store = PostgresStore(self.environment.get("AGENTLOOP_DATABASE_URL") or self._postgres.dsn())
        await store.open()
        try:
            await store.create(record)
        finally:
            await store.close()

    @property
    def _postgres(self) -> LocalPostgres:
        """The server's own, not entered."""
        return LocalPostgres(self.state_dir / "postgres")

    def _end_postgres(self) -> None:
        """End the server's own Postgres, unless somebody uses it: a server that was killed leaves it."""
        if self._postgres.pid is not None:
            with self._postgres:
                pass

    def log(self) -> str:
        """What it wrote."""
        return self.log_path.read_text() if self.log_path.exists() else ""
