"""Administrative acts: written before and after, refused where they cannot be; denied ones counted."""

from __future__ import annotations

import asyncio

import pytest

from grpc_server import audit as audit_module
from grpc_server.audit import MAX_DENIED, Audit
from grpc_server.domain.errors import Precondition, StoreUnavailable
from grpc_server.domain.types import Caller, Scope
from tests.fakes import FakeLogStore

OPS = Caller("k-ops", "ops", frozenset({Scope.ADMIN}))


class Setup:
    def __init__(self) -> None:
        self.store = FakeLogStore()
        self.audit = Audit(self.store, "server-1")

    @property
    def outcomes(self) -> list[str]:
        return [detail["outcome"] for _, _, _, detail in self.store.events]


@pytest.fixture
def setup() -> Setup:
    return Setup()


async def test_an_act_is_written_before_it_is_done_and_how_it_ended(setup: Setup) -> None:
    async with setup.audit.act("model_install", OPS, "m:1", {"path": "/a"}) as act:
        assert setup.outcomes == ["asked"]
        act.detail["changed"] = True
    asked, done = setup.store.events
    about = {"path": "/a", "key_id": "k-ops", "server_id": "server-1"}
    assert asked == ("model_install", "ops", "m:1", {**about, "outcome": "asked"})
    assert done == ("model_install", "ops", "m:1", {**about, "changed": True, "outcome": "done"})


async def test_an_act_that_cannot_be_written_is_not_done(setup: Setup) -> None:
    setup.store.down = True
    done = False
    with pytest.raises(StoreUnavailable):
        async with setup.audit.act("model_install", OPS, "m:1", {}):
            done = True
    assert not done


async def test_an_act_that_fails_says_so_and_raises_its_own_error(setup: Setup) -> None:
    with pytest.raises(Precondition):
        async with setup.audit.act("model_remove", OPS, "m:1", {}):
            raise Precondition("no")
    assert setup.outcomes == ["asked", "failed"]
    assert setup.store.events[1][3]["error"] == "Precondition"


async def test_an_act_that_is_cancelled_says_so(setup: Setup) -> None:
    begun = asyncio.Event()

    async def act() -> None:
        async with setup.audit.act("model_install", OPS, "m:1", {}):
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(act())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert setup.outcomes == ["asked", "cancelled"]


async def test_an_act_is_done_though_its_end_cannot_be_written(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    async with setup.audit.act("model_remove", OPS, "m:1", {}):
        setup.store.down = True
    assert setup.outcomes == ["asked"]
    assert "the end of an act was not written" in caplog.text


async def test_denied_attempts_are_counted_by_caller_and_method(setup: Setup) -> None:
    for _ in range(500):
        setup.audit.denied(OPS, "/SetRoute")
    setup.audit.denied(OPS, "/RemoveModel")
    await setup.audit.flush()
    await setup.audit.flush()
    assert [(kind, subject, detail["times"]) for kind, _, subject, detail in setup.store.events] == [
        ("denied", "/SetRoute", 500),
        ("denied", "/RemoveModel", 1),
    ]


async def test_however_many_are_denied_memory_and_rows_are_bounded(setup: Setup) -> None:
    for number in range(10_000):
        setup.audit.denied(Caller(f"k{number}", f"n{number}", frozenset()), "/SetRoute")
    await setup.audit.flush()
    assert len(setup.store.events) == MAX_DENIED + 1
    assert sum(detail["times"] for _, _, _, detail in setup.store.events) == 10_000


async def test_denied_attempts_wait_for_the_database(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    setup.audit.denied(OPS, "/SetRoute")
    setup.store.down = True
    await setup.audit.flush()
    setup.audit.denied(OPS, "/SetRoute")
    setup.store.down = False
    await setup.audit.flush()
    assert [detail["times"] for _, _, _, detail in setup.store.events] == [2]
    denied = [record for record in caplog.records if "was denied" in record.getMessage()]
    assert {vars(record)["method"] for record in denied} == {"/SetRoute"}


async def test_denied_attempts_are_written_all_the_while_and_at_the_end(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(audit_module, "FLUSH_SECONDS", 0.001)
    real, broken = setup.store.note, True

    async def note(*args: object) -> None:
        if broken:
            raise KeyError("odd")
        await real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(setup.store, "note", note)
    async with setup.audit.running():
        setup.audit.denied(OPS, "/SetRoute")
        async with asyncio.timeout(10):
            while "could not be written" not in caplog.text:  # noqa: ASYNC110 - no event tells of it
                await asyncio.sleep(0.001)
        broken = False
        setup.audit.denied(OPS, "/SetRoute")
        async with asyncio.timeout(10):
            while not setup.store.events:  # noqa: ASYNC110 - no event tells of it
                await asyncio.sleep(0.001)
        setup.audit.denied(OPS, "/RemoveModel")
    assert setup.store.events[-1][2] == "/RemoveModel"
