"""Memory that is left: of the machine, of a control group of either version, and of those around it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from grpc_server.adapters.memory import FRESH_SECONDS, MemoryAvailable
from tests.fakes import FakeClock

MACHINE = 8 << 30


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Machine:
        available = MACHINE

    monkeypatch.setattr(psutil, "virtual_memory", Machine)


def group(folder: Path, limit: str, usage: str, stat: str, *, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = (
        ("memory.max", "memory.current")
        if version == 2
        else (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
        )
    )
    for name, text in zip((*names, "memory.stat"), (limit, usage, stat), strict=True):
        (folder / name).write_text(text + "\n")


def of(root: Path, line: str) -> MemoryAvailable:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(f"3:cpuset:/\n{line}\n")
    return MemoryAvailable(root=root)


def test_without_control_groups_it_is_the_machines(tmp_path: Path) -> None:
    assert MemoryAvailable(root=tmp_path)() == MACHINE


def test_a_group_bounds_it_and_cache_that_can_be_dropped_is_free(tmp_path: Path) -> None:
    group(tmp_path / "sys/fs/cgroup/a/b", "1000", "900", "anon 5\ninactive_file 300\nactive_file 7")
    group(tmp_path / "sys/fs/cgroup/a", "max", "900", "inactive_file 0")
    assert of(tmp_path, "0::/a/b")() == 400


def test_the_group_around_it_may_be_the_narrower(tmp_path: Path) -> None:
    group(tmp_path / "sys/fs/cgroup/a/b", "1000", "100", "inactive_file 0")
    group(tmp_path / "sys/fs/cgroup/a", "1000", "950", "inactive_file 0")
    assert of(tmp_path, "0::/a/b")() == 50


def test_a_group_of_the_first_version_bounds_it_too(tmp_path: Path) -> None:
    group(
        tmp_path / "sys/fs/cgroup/memory/a",
        "1000",
        "900",
        "inactive_file 9\ntotal_inactive_file 20",
        version=1,
    )
    assert of(tmp_path, "4:cpu,memory:/a")() == 120


def test_a_group_that_uses_more_than_it_may_has_nothing_left(tmp_path: Path) -> None:
    group(tmp_path / "sys/fs/cgroup", "1000", "1100", "")
    assert of(tmp_path, "0::/")() == 0


def test_a_group_that_cannot_be_read_bounds_nothing(tmp_path: Path) -> None:
    group(tmp_path / "sys/fs/cgroup", "1000", "many", "inactive_file 0")
    assert of(tmp_path, "0::/")() == MACHINE
    (tmp_path / "sys/fs/cgroup/memory.current").unlink()
    assert of(tmp_path, "0::/")() == MACHINE


def test_it_is_read_at_most_twice_a_second(tmp_path: Path) -> None:
    clock = FakeClock()
    group(tmp_path / "sys/fs/cgroup", "1000", "100", "")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    available = MemoryAvailable(root=tmp_path, monotonic=clock.monotonic)
    assert available() == 900
    group(tmp_path / "sys/fs/cgroup", "1000", "200", "")
    assert available() == 900
    clock.advance(FRESH_SECONDS + 0.1)
    assert available() == 800


def test_this_machine_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 0 < MemoryAvailable()() <= psutil.virtual_memory().total
