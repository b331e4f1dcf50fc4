"""A supervisor keeps one child alive: when that dies it starts another, ever more slowly, until closed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from grpc_server.adapters import embedded_process
from grpc_server.adapters.embedded_child import ChildOptions
from grpc_server.adapters.embedded_process import ChildProcess, Supervisor
from grpc_server.domain.errors import EngineFailed, EngineUnavailable

OPTIONS = ChildOptions("/m.gguf", "key", 512, 1, 1)


class StubChild:
    """Lives until it is told to die."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.closed = False

    @property
    def alive(self) -> bool:
        return not self.ended.is_set()

    async def wait(self) -> int:
        await self.ended.wait()
        return -9

    async def close(self) -> None:
        self.closed = True
        self.ended.set()


class Starts:
    """Plays `ChildProcess.start`: hands out a child, or raises, in the order of `outcomes`."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self.outcomes = list(outcomes)
        self.children: list[StubChild] = []
        self.may_start = asyncio.Event()
        self.may_start.set()

    async def __call__(self, options: ChildOptions) -> Any:
        assert options is OPTIONS
        await self.may_start.wait()
        if self.outcomes and (outcome := self.outcomes.pop(0)):
            raise outcome
        self.children.append(StubChild())
        return self.children[-1]


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Supervisor, Starts]]:
    def start(*outcomes: Exception | None, pause: float = 0.0) -> tuple[Supervisor, Starts]:
        starts = Starts(*outcomes)
        monkeypatch.setattr(ChildProcess, "start", starts)
        monkeypatch.setattr(embedded_process, "_FIRST_PAUSE", pause)
        return Supervisor("a:b", OPTIONS), starts

    return start


Supervised = Callable[..., tuple[Supervisor, Starts]]


async def test_all_who_wait_get_the_one_child(supervised: Supervised) -> None:
    supervisor, starts = supervised()
    assert not supervisor.ready
    got = await asyncio.gather(*(supervisor.child() for _ in range(3)))
    assert [id(child) for child in got] == [id(starts.children[0])] * 3
    assert supervisor.ready
    await supervisor.close()
    assert starts.children[0].closed


async def test_a_dead_child_is_followed_by_another(supervised: Supervised) -> None:
    supervisor, starts = supervised()
    first = await supervisor.child()
    starts.children[0].ended.set()
    assert await supervisor.child() is not first
    assert starts.children[0].closed
    await supervisor.close()


async def test_callers_are_told_when_the_next_child_comes_only_in_a_while(supervised: Supervised) -> None:
    supervisor, starts = supervised(pause=10.0)
    await supervisor.child()
    starts.children[0].ended.set()
    with pytest.raises(EngineUnavailable, match="it starts anew in 10 s"):
        await supervisor.child()
    await supervisor.close()
    assert len(starts.children) == 1


async def test_who_died_is_down_until_the_next_child_answers_but_not_who_loads_for_the_first_time(
    supervised: Supervised,
) -> None:
    supervisor, starts = supervised()
    assert not supervisor.down
    await supervisor.child()
    assert not supervisor.down
    starts.may_start.clear()
    starts.children[0].ended.set()
    for _ in range(20):  # it dies, its pause of no seconds is over, the next one loads
        assert supervisor.down
        await asyncio.sleep(0)
    starts.may_start.set()
    await supervisor.child()
    assert not supervisor.down
    await supervisor.close()


async def test_an_error_that_nobody_expected_turns_the_waiting_away(
    supervised: Supervised, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor, _ = supervised(ValueError("the child said something odd"))
    with pytest.raises(EngineFailed, match="unexpected ValueError"):
        await asyncio.wait_for(supervisor.child(), 5)
    assert "the embedded engine of a:b is given up" in caplog.text
    await supervisor.close()


async def test_each_death_makes_the_pause_longer_up_to_a_limit(
    supervised: Supervised, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    real_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await real_sleep(0)

    supervisor, starts = supervised(*[None, *[OSError("no memory")] * 7], pause=0.25)
    await supervisor.child()
    monkeypatch.setattr(asyncio, "sleep", sleep)
    starts.children[0].ended.set()
    while len(starts.children) < 2:
        await real_sleep(0)
    assert pauses == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    await supervisor.close()


async def test_a_model_that_never_loaded_is_not_tried_again(supervised: Supervised) -> None:
    supervisor, starts = supervised(EngineFailed("its file may be damaged"))
    for _ in range(2):
        with pytest.raises(EngineFailed, match=r"a:b.*damaged"):
            await supervisor.child()
    assert starts.children == []
    await supervisor.close()


async def test_closing_while_it_loads_turns_the_waiting_away(supervised: Supervised) -> None:
    supervisor, starts = supervised()
    starts.may_start.clear()
    waiting = asyncio.create_task(supervisor.child())
    await asyncio.sleep(0)
    await supervisor.close()
    with pytest.raises(EngineUnavailable, match="being unloaded"):
        await waiting


async def test_a_model_that_takes_too_long_to_load_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object) -> str:
        await asyncio.Event().wait()
        return ""

    monkeypatch.setattr(embedded_process, "_introduce", never)
    monkeypatch.setattr(embedded_process, "_LOAD_SECONDS", 0.01)
    with pytest.raises(EngineFailed, match="took more than"):
        await ChildProcess.start(OPTIONS)


async def test_a_process_that_ignores_its_closed_pipe_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_process, "_END_SECONDS", 0.05)
    process = await asyncio.create_subprocess_exec("sleep", "60", stdin=asyncio.subprocess.PIPE)
    await embedded_process._end(process)
    assert process.returncode == -9
