"""The drain: everything is stored in order, or set aside, and an outage only delays it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpc_server import drain as drain_module
from grpc_server.adapters.spool_frame import Corrupt
from grpc_server.domain.errors import StoreUnavailable
from grpc_server.domain.types import InferenceStarted, LogRecord
from grpc_server.drain import Drain
from tests import records as make


class ListSource:
    """A spool in a list; a record's position is its number."""

    def __init__(self, items: Sequence[LogRecord | Corrupt] = ()) -> None:
        self.items = list(items)
        self.position = 0
        self.dead: dict[int, tuple[object, str]] = {}
        self.broken: Exception | None = None
        self.history = ""
        self.arrived = asyncio.Event()

    async def read_batch(self, limit: int) -> list[tuple[int, LogRecord | Corrupt]]:
        if self.broken is not None:
            raise self.broken
        return list(enumerate(self.items, start=1))[self.position : self.position + limit]

    async def commit(self, position: int) -> None:
        self.position = position

    async def remember(self, history: str) -> int:
        again = self.position if self.history not in ("", history) else 0
        self.history, self.position = history, self.position - again
        if again:
            self.arrived.set()
        return again

    async def dead_letter(self, position: int, what: LogRecord | Corrupt, reason: str) -> None:
        self.dead[position] = (what, reason)

    async def wait(self, seconds: float) -> None:
        if self.position == len(self.items):
            await self.arrived.wait()
            self.arrived.clear()

    def add(self, item: LogRecord) -> None:
        self.items.append(item)
        self.arrived.set()


class ListStore:
    """Refuses what is in `poison`; `errors` are raised first, one a call."""

    def __init__(self, poison: Sequence[LogRecord] = (), errors: Sequence[Exception] = ()) -> None:
        self.poison = list(poison)
        self.errors = list(errors)
        self.records: list[LogRecord] = []
        self.calls = 0
        self.dead: list[tuple[object, str]] = []
        self.refuse_dead = False
        self.history_now = "before"
        self.stored = asyncio.Event()

    async def store(self, records: Sequence[LogRecord]) -> None:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        for record in records:
            if record in self.poison:
                raise ValueError("poison")
        self.records += records
        self.stored.set()

    async def history(self) -> str:
        return self.history_now

    def restore(self, count: int) -> None:
        """As it was when it had so many records."""
        del self.records[count:]
        self.history_now = "after"

    async def add_dead_letter(self, what: LogRecord | Corrupt, reason: str) -> None:
        if self.refuse_dead:
            raise ValueError("not even that")
        self.dead.append((what, reason))


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain_module, "FIRST_DELAY_SECONDS", 0.0001)
    monkeypatch.setattr(drain_module, "LONGEST_DELAY_SECONDS", 0.0001)


async def test_everything_is_stored_in_order_and_in_batches() -> None:
    records = [make.started() for _ in range(25)]
    source, store = ListSource(records), ListStore()
    counted: list[int] = []
    drain = Drain(source, store, batch_records=10, stored=counted.append)
    assert await drain.flush(5)
    assert store.records == records
    assert counted == [10, 10, 5]
    assert drain.store_up


async def test_a_poison_record_goes_aside_alone() -> None:
    records = [make.started() for _ in range(40)]
    poison = [records[3], records[4], records[39]]
    source, store = ListSource(records), ListStore(poison)
    aside: list[int] = []
    drain = Drain(source, store, dead_letters=store, dead_lettered=aside.append)
    assert await drain.flush(5)
    assert store.records == [record for record in records if record not in poison]
    assert [source.dead[position] for position in (4, 5, 40)] == [(record, "poison") for record in poison]
    assert store.dead == [(record, "poison") for record in poison]
    assert sum(aside) == 3
    assert store.calls < 40


@settings(max_examples=50, deadline=None)
@given(kinds=st.lists(st.sampled_from(["good", "poison", "corrupt"]), max_size=30), size=st.integers(1, 8))
def test_stored_and_set_aside_are_all_that_there_was(kinds: list[str], size: int) -> None:
    items: list[LogRecord | Corrupt] = [
        Corrupt(b"%d" % index) if kind == "corrupt" else make.started() for index, kind in enumerate(kinds)
    ]
    poison = [
        item
        for item, kind in zip(items, kinds, strict=True)
        if kind == "poison" and isinstance(item, InferenceStarted)
    ]

    async def run() -> None:
        source, store = ListSource(items), ListStore(poison)
        assert await Drain(source, store, batch_records=size).flush(5)
        aside = [what for _, (what, _) in sorted(source.dead.items())]
        assert [item for item in items if item not in aside] == store.records
        assert len(aside) == sum(kind != "good" for kind in kinds)

    asyncio.run(run())


async def test_bytes_that_are_no_record_go_aside() -> None:
    corrupt = Corrupt(b"junk")
    source, store = ListSource([make.started(), corrupt, make.started()]), ListStore()
    assert await Drain(source, store, dead_letters=store).flush(5)
    assert len(store.records) == 2
    assert source.dead[2][0] == corrupt
    assert store.dead[0][0] == corrupt


async def test_an_outage_delays_and_loses_nothing() -> None:
    records = [make.started() for _ in range(3)]
    source, store = ListSource(records), ListStore(errors=[StoreUnavailable("down")] * 8)
    drain = Drain(source, store)
    assert await drain.flush(5)
    assert store.records == records
    assert store.calls == 9
    assert drain.last_error == ""


async def test_an_outage_is_told() -> None:
    source, store = ListSource([make.started()]), ListStore(errors=[StoreUnavailable("down")] * 1000)
    drain = Drain(source, store)
    assert not await drain.flush(0.01)
    assert (drain.store_up, drain.last_error) == (False, "down")
    assert source.position == 0


async def test_a_disk_that_cannot_take_the_dead_letter_keeps_the_record() -> None:
    record = make.started()
    source, store = ListSource([record]), ListStore([record])
    failures = [OSError("no space")] * 3

    async def dead_letter(position: int, what: LogRecord | Corrupt, reason: str) -> None:
        if failures:
            raise failures.pop()
        source.dead[position] = (what, reason)

    source.dead_letter = dead_letter  # type: ignore[method-assign]
    assert await Drain(source, store).flush(5)
    assert source.dead[1] == (record, "poison")


async def test_a_table_that_refuses_the_dead_letter_too_does_not_stop_the_drain() -> None:
    records = [make.started(), make.started()]
    source, store = ListSource(records), ListStore([records[0]])
    store.refuse_dead = True
    assert await Drain(source, store, dead_letters=store).flush(5)
    assert store.records == records[1:]
    assert source.dead[1][0] == records[0]


async def test_no_error_ends_the_drain() -> None:
    source, store = ListSource(), ListStore(errors=[RuntimeError("a bug"), StoreUnavailable("down")])
    drain = Drain(source, store, linger_seconds=0)
    running = asyncio.create_task(drain.run())
    record = make.started()
    source.add(record)
    await asyncio.wait_for(store.stored.wait(), 5)
    assert store.records == [record]
    store.stored.clear()
    source.add(make.started())
    await asyncio.wait_for(store.stored.wait(), 5)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_the_back_off_grows_varies_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain_module, "FIRST_DELAY_SECONDS", 0.1)
    monkeypatch.setattr(drain_module, "LONGEST_DELAY_SECONDS", 5.0)
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("grpc_server.drain.asyncio.sleep", sleep)
    source, store = ListSource([make.started()]), ListStore(errors=[StoreUnavailable("down")] * 200)
    assert await Drain(source, store).flush(60)
    assert 0.05 <= slept[0] <= 0.1
    assert 0.4 <= slept[3] <= 0.8
    assert len(slept) == 200
    assert max(slept) <= 5.0
    assert min(slept[10:]) >= 2.5
    assert len(set(slept)) > 100


async def test_a_restored_database_gets_what_it_lacks_again_before_anything_new() -> None:
    records = [make.started() for _ in range(25)]
    source, store = ListSource(records), ListStore()
    drain = Drain(source, store, batch_records=10)
    assert await drain.flush(5)
    store.restore(7)
    newer = make.started()
    source.add(newer)
    assert await drain.flush(5)
    assert store.records == [*records[:7], *records, newer]


async def test_a_restored_database_need_not_wait_for_a_new_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain_module, "LOOK_SECONDS", -1.0)
    records = [make.started() for _ in range(3)]
    source, store = ListSource(records), ListStore()
    drain = Drain(source, store, linger_seconds=0.0)
    running = asyncio.create_task(drain.run())
    await store.stored.wait()
    store.restore(0)
    store.stored.clear()
    source.arrived.set()  # a second is over
    await store.stored.wait()
    assert store.records == records
    running.cancel()


async def test_what_a_restored_database_lacks_makes_no_dead_letter() -> None:
    """An end whose start was stored before, and is no more, is refused: both come again."""
    start = make.started()
    end = make.ended(start.id)

    class Restored(ListStore):
        async def store(self, records: Sequence[LogRecord]) -> None:
            if end in records and start not in self.records and start not in records:
                raise ValueError("the end of an inference whose start is not stored")
            await super().store(records)
            if self.history_now == "before":
                self.restore(0)

    source, store = ListSource([start, end]), Restored()
    drain = Drain(source, store, dead_letters=store, batch_records=1)
    assert await drain.flush(5)
    assert store.records == [start, end]
    assert source.dead == {}
