"""What the embedded engine keeps of an installation that is cut off, that has no room, or that is undone."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from grpc_server.adapters import gguf_file
from grpc_server.adapters.embedded import EmbeddedEngine
from grpc_server.domain.errors import EngineUnavailable, Exhausted, NotFound, Precondition
from tests.small_disk import small_disk_at

NAME = "tiny:1"


def write(path: Path, size: int) -> str:
    """A file that begins like a GGUF; its SHA-256."""
    content = b"GGUF" + os.urandom(size)
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[EmbeddedEngine]:
    async with EmbeddedEngine(tmp_path / "versions") as made:
        yield made


def files(engine: EmbeddedEngine) -> list[str]:
    return sorted(path.name for path in engine.models_dir.iterdir())


async def test_a_cancelled_installation_leaves_nothing_and_is_over_before_the_next_begins(
    engine: EmbeddedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    sha256, other_sha256 = write(one, 3 << 20), write(other, 100)
    half, go_on, real = threading.Event(), threading.Event(), gguf_file._chunks

    def held(source: Path, reader: BinaryIO) -> Iterator[bytes]:
        for chunk in real(source, reader):
            yield chunk
            half.set()
            go_on.wait(10)

    monkeypatch.setattr(gguf_file, "_chunks", held)
    first = asyncio.create_task(engine.install(NAME, one, sha256))
    await asyncio.to_thread(half.wait)
    first.cancel()
    monkeypatch.setattr(gguf_file, "_chunks", real)
    second = asyncio.create_task(engine.install(NAME, other, other_sha256))
    await asyncio.sleep(0.05)
    assert not second.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await second
    assert files(engine) == ["tiny@1.gguf", "tiny@1.json"]
    assert (engine.models_dir / "tiny@1.gguf").read_bytes() == other.read_bytes()


async def test_what_a_killed_installation_left_is_gone_after_the_next_start(
    engine: EmbeddedEngine, tmp_path: Path
) -> None:
    sha256 = write(tmp_path / "one", 100)
    await engine.install(NAME, tmp_path / "one", sha256)
    (engine.models_dir / "0123.gguf.partial").write_bytes(b"GGUF and no more")
    async with EmbeddedEngine(engine.models_dir) as again:
        assert files(again) == ["tiny@1.gguf", "tiny@1.json"]
        assert [version.name for version in await again.list_models()] == [NAME]


async def test_a_wrong_file_leaves_nothing(engine: EmbeddedEngine, tmp_path: Path) -> None:
    write(tmp_path / "one", 100)
    with pytest.raises(Precondition, match="has the SHA-256"):
        await engine.install(NAME, tmp_path / "one", "0" * 64)
    assert files(engine) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk_at(tmp_path / "disk", 2) as place:
        yield place


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
async def test_a_full_disk_is_told_as_such_leaves_nothing_and_takes_what_fits(
    small_disk: Path, tmp_path: Path
) -> None:
    sha256, small_sha256 = write(tmp_path / "one", 3 << 20), write(tmp_path / "small", 1 << 20)
    async with EmbeddedEngine(small_disk / "versions") as engine:
        with pytest.raises(Exhausted, match="is full; make room on it"):
            await engine.install(NAME, tmp_path / "one", sha256)
        assert files(engine) == []
        assert await engine.install(NAME, tmp_path / "small", small_sha256)


async def test_a_models_folder_that_cannot_be_made_is_told_as_such(tmp_path: Path) -> None:
    sha256 = write(tmp_path / "one", 100)
    engine = EmbeddedEngine(Path("/proc/nowhere/versions"))
    with pytest.raises(Precondition, match="versions cannot be written to on the server's host"):
        await engine.install(NAME, tmp_path / "one", sha256)
    await engine.close()


class StubSupervisor:
    """A child's supervisor, in whatever state; while it closes, somebody asks for its version."""

    def __init__(self, engine: EmbeddedEngine, *, down: bool = False) -> None:
        self._engine = engine
        self.down = down
        self.ready = False
        self.answers: list[BaseException] = []

    async def close(self) -> None:
        try:
            await self._engine.load(NAME)
        except Exception as error:
            self.answers.append(error)


async def test_while_a_version_is_removed_nobody_starts_another_child_of_it(
    engine: EmbeddedEngine, tmp_path: Path
) -> None:
    await engine.install(NAME, tmp_path / "one", write(tmp_path / "one", 100))
    supervisor = StubSupervisor(engine)
    engine._supervisors[NAME, False] = supervisor  # type: ignore[assignment]
    assert await engine.remove(NAME)
    assert [type(answer) for answer in supervisor.answers] == [NotFound]
    assert engine._supervisors == {}
    assert files(engine) == []


async def test_an_engine_whose_child_died_is_down_until_the_next_one_answers(engine: EmbeddedEngine) -> None:
    supervisor = StubSupervisor(engine, down=True)
    engine._supervisors[NAME, False] = supervisor  # type: ignore[assignment]
    with pytest.raises(EngineUnavailable, match="tiny:1 died; it is being started anew"):
        await engine.check()
    supervisor.down = False  # one that loads for the first time
    await engine.check()
