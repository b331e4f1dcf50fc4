"""How `make test` deals the tests out to two processes: a file is dealt out whole, the longest first.

Session fixtures, and the engines and servers in them, are made once a process: files that share a costly one
go to the same process. Without `-n` none of this does anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# By what the files share: a server, real engines, a library that takes seconds to import.
GROUPS = {
    "live-server": ("test_live_server", "test_http_live", "test_examples", "test_evaluate", "test_readme"),
    "gateway": ("test_gateway_floods", "test_gateway_memory", "test_gateway_faults"),
    "engines": ("test_engine_conformance", "test_engine_processes"),
    "validation": ("test_validation", "test_validation_nights"),
    "registry": ("test_register", "test_tracking"),
}
# So that neither process is left alone with something long at the end: `make test` prints the slowest tests.
LONGEST_FIRST = (
    "test_nothing_leaves",
    "test_rollout",
    "engines",
    "test_night",
    "test_quantize",
    "test_demo",
    "live-server",
    "validation",
    "test_log_faults",
    "test_local_postgres",
)


def group(file: str) -> str:
    """The name of those files that run in one process, in their order; `file` has no suffix."""
    return next((name for name, files in GROUPS.items() if file in files), file)


def place(file: str) -> tuple[int, str, int]:
    """Sorts files: the longest groups first, the files of a group together, in the group's order."""
    name = group(file)
    rank = LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST)
    return rank, name, GROUPS[name].index(file) if name in GROUPS else 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the tests, in each of the processes that they are dealt out to."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: place(item.path.stem))


class ByGroup(LoadScopeScheduling):  # type: ignore[misc] # it has no types
    """Deals out a group at a time. (`--dist loadgroup` marks ids in a way that pytest 9.2 ignores.)"""

    def _split_scope(self, nodeid: str) -> str:
        return group(Path(nodeid.partition("::")[0]).stem)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByGroup:
    """Asked by xdist before its own."""
    return ByGroup(config, log)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Make Postgres' system user before two processes would at once."""
    from grpc_server.adapters.local_postgres import _system_user

    config = session.config
    if not hasattr(config, "workerinput") and config.getoption("numprocesses", None):
        _system_user()
