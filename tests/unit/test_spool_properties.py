# ruff: noqa: ASYNC240 - small files
"""The spool under random appends, commits, crashes and damage, at any byte."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from grpc_server.adapters.spool import FileSpool
from grpc_server.adapters.spool_frame import Corrupt
from grpc_server.domain.types import LogRecord, ServerStarted
from tests import records as make

quick = settings(max_examples=60, deadline=None)


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp())
    try:
        yield path
    finally:
        shutil.rmtree(path)


async def opened(directory: Path) -> FileSpool:
    spool = FileSpool(directory, "server-1", 64 << 20, segment_bytes=2048, end_bytes=1024)
    await spool.open()
    return spool


async def rest(spool: FileSpool) -> list[LogRecord | Corrupt]:
    found = [what for _, what in await spool.read_batch(1_000_000)]
    return [what for what in found if not isinstance(what, ServerStarted)]


async def crash(spool: FileSpool) -> None:
    """What SIGKILL leaves: the files as they are, the lock free."""
    await asyncio.get_running_loop().run_in_executor(spool._writer, spool._files.close)
    spool._writer.shutdown()
    spool._reader.shutdown()


@quick
@given(
    batches=st.lists(
        st.lists(make.records.filter(lambda one: not isinstance(one, ServerStarted)), max_size=6)
    ),
    commits=st.lists(st.integers(1, 5), max_size=6),
)
def test_what_is_appended_comes_back_once_and_in_order(
    batches: list[list[LogRecord]], commits: list[int]
) -> None:
    async def run(directory: Path) -> None:
        spool = await opened(directory)
        written, read = [], []
        for index, batch in enumerate(batches):
            await asyncio.gather(*(spool.append(record) for record in batch))
            written += batch
            for limit in commits[index : index + 1]:
                items = await spool.read_batch(limit)
                if items:
                    read += [what for _, what in items if not isinstance(what, ServerStarted)]
                    await spool.commit(items[-1][0])
            assert spool.state().records >= len(written) - len(read)
            if index % 3 == 2:
                await spool.close()
                spool = await opened(directory)
        assert read + await rest(spool) == written
        await spool.close()

    with folder() as directory:
        asyncio.run(run(directory))


@quick
@given(written=st.lists(make.starts, min_size=1, max_size=8), data=st.data())
def test_a_crash_at_any_byte_leaves_a_prefix(written: list[LogRecord], data: st.DataObject) -> None:
    """Whatever part of the last write reached the disk: whole records, in order, and never half of one."""

    async def run(directory: Path) -> None:
        spool = await opened(directory)
        for record in written:
            await spool.append(record)
        await crash(spool)
        last = max(directory.glob("*.log"))
        size = last.stat().st_size
        at = data.draw(st.integers(0, size), label="bytes that reached the disk")
        with last.open("r+b") as file:
            file.truncate(at)
        before = sum(1 for path in directory.glob("*.log") if path != last for _ in path.open("rb"))
        whole = before + last.read_bytes().count(b"\n")
        again = await opened(directory)
        found = await rest(again)
        assert found == written[: len(found)]
        assert len(found) == max(0, whole - 1)  # without the server start, which came first
        later = make.started()
        await again.append(later)
        assert await rest(again) == [*found, later]
        await again.close()

    with folder() as directory:
        asyncio.run(run(directory))


@quick
@given(written=st.lists(make.starts, min_size=3, max_size=8), data=st.data())
def test_damage_is_never_silent(written: list[LogRecord], data: st.DataObject) -> None:
    """One changed byte costs at most the records that it touches, and their bytes come as Corrupt."""

    async def run(directory: Path) -> None:
        spool = FileSpool(directory, "server-1", 64 << 20)
        await spool.open()
        for record in written:
            await spool.append(record)
        await crash(spool)
        (path,) = directory.glob("*.log")
        content = bytearray(path.read_bytes())
        first = content.index(b"\n") + 1
        end = content.rindex(b"\n", 0, len(content) - 1)  # the last record may be torn: that is another test
        at = data.draw(st.integers(first, end), label="damaged byte")
        content[at] = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[at]), label="byte")
        path.write_bytes(content)
        again = await opened(directory)
        found = await rest(again)
        kept = [what for what in found if not isinstance(what, Corrupt)]
        raw = b"".join(what.raw for what in found if isinstance(what, Corrupt))
        assert len(kept) >= len(written) - 2
        assert kept == [record for record in written if record in kept]
        assert len(kept) == len(written) or raw
        assert kept[-1] == written[-1]
        await again.close()

    with folder() as directory:
        asyncio.run(run(directory))
