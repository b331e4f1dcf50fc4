"""What coverage measures in other processes, and what it makes of the files that these leave.

Every process that a test starts inherits the variables that make it trace itself. Where the lines it runs are
traced elsewhere, that is seconds a process for nothing: `untraced` is its environment then.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Generator, Mapping
from pathlib import Path

import pytest


def untraced(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """`environment` (default: ours) without what makes a process trace itself."""
    every = os.environ if environment is None else environment
    return {name: value for name, value in every.items() if not name.startswith("COVERAGE_")}


def remove_damaged(data: Path) -> list[Path]:
    """Remove the measurements of processes that were killed while they wrote them; their paths.

    They lie beside `data`, the file that they are combined into.
    """
    files = [path for path in data.parent.glob(f"{data.name}.*") if not path.name.endswith("-journal")]
    damaged = [path for path in files if not _is_whole(path)]
    for path in damaged:
        path.unlink(missing_ok=True)
    return damaged


def _is_whole(path: Path) -> bool:
    try:
        connection = sqlite3.connect(path)
        try:
            whole: bool = connection.execute("PRAGMA quick_check").fetchall() == [("ok",)]
            connection.execute("SELECT count(*) FROM coverage_schema").fetchone()
        finally:
            connection.close()
    except sqlite3.Error:
        return False
    return whole


@pytest.hookimpl(wrapper=True, trylast=True)  # the innermost: pytest-cov combines the files after us
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Without this, one damaged file fails the session when all its tests have passed."""
    try:
        return (yield)
    finally:
        config = session.config
        if config.pluginmanager.hasplugin("_cov") and not hasattr(config, "workerinput"):
            data = os.environ.get("COVERAGE_FILE") or ".coverage"
            for path in remove_damaged(config.rootpath / data):
                print(f"removed {path.name}: its process was killed while it wrote it")
