"""The demo's programs on real processes, its traffic on a real gRPC server."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import grpc
import psutil
import pytest
from rich.console import Console

from agentloop.v1 import inference_pb2
from demo import mishaps
from demo.memory import MemoryMeter
from demo.plan import Plan
from demo.processes import MARK, Programs
from demo.screen import Screen
from demo.serving import Serving, settle_route, write_private
from demo.tally import Tally
from demo.traffic import MISHAP_EVERY, MOST_IN_FLIGHT, SERVICES, Player, connected
from grpc_server.domain.types import Route, Target, TargetRole
from tests.fakes import BASE, FakeEngine, FakeRoutes, FakeRouteStore, route_to
from tests.integration.conftest_client import ScriptedService, completed, running, started, text
from tests.integration.grpc_bench import Bench
from training.bfcl import traffic

FOREVER = "import signal; print('up', flush=True); signal.pause()"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {FOREVER}"
# A daemon: what it starts leaves its session and its tree.
DAEMON = f"""
import os, signal, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        os.execv(sys.executable, [sys.executable, "-S", "-c", {FOREVER!r}])
    os._exit(0)
"""


def gone(pid: int) -> bool:
    """Whether no such process runs; its parent, process 1 perhaps, may take its time to notice."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def autogroup(pid: int) -> str:
    """The priority of the process's session, "" where the kernel has no autogroups."""
    path = Path(f"/proc/{pid}/autogroup")
    return path.read_text().split()[-1] if path.exists() else ""


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another task or thread brings about."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (no event tells it)
            await asyncio.sleep(0.01)


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]  # without site-packages: nothing in it traces the process


@pytest.fixture
async def programs(tmp_path: Path) -> AsyncIterator[Programs]:
    made = Programs(tmp_path / "log", tmp_path, tmp_path)
    yield made
    await made.stop()


async def test_a_program_has_a_log_and_its_output_can_be_read(programs: Programs, tmp_path: Path) -> None:
    code, printed = await programs.run(
        "job", python("import sys; print('one'); print('two'); print('why', file=sys.stderr); sys.exit(3)")
    )
    assert (code, printed) == (3, "one\ntwo")
    assert sorted((tmp_path / "log/job.log").read_text().splitlines()) == ["one", "two", "why"]


async def test_what_a_secret_program_prints_is_in_no_log(programs: Programs, tmp_path: Path) -> None:
    assert await programs.run("job", python("print('al_secret')"), secret=True) == (0, "al_secret")
    assert "al_secret" not in (tmp_path / "log/job.log").read_text()


async def test_a_program_gets_its_environment_and_a_line_too_long_does_not_stop_it(
    programs: Programs,
) -> None:
    code = "import os; print('x' * 200_000); print(os.environ['ASKED'])"
    ended, printed = await programs.run("job", python(code), {"ASKED": "yes"})
    assert ended == 0
    assert printed.splitlines()[-1] == "yes"


async def test_the_first_line_is_waited_for_and_is_empty_if_there_is_none(programs: Programs) -> None:
    talker = await programs.start("talker", python(FOREVER))
    assert await talker.first_line() == "up"
    silent = await programs.start("silent", python(""))
    assert await silent.first_line() == ""


async def test_stopping_ends_everything_even_what_ignores_it_or_left_its_tree(
    programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demo.processes.STOP_SECONDS", 1.0)
    polite = await programs.start("polite", python(FOREVER))
    deaf = await programs.start("deaf", python(DEAF))
    daemon = await programs.start("daemon", python(DAEMON))
    await asyncio.gather(polite.first_line(), deaf.first_line())
    left = int(await daemon.first_line())
    await daemon.exited()
    assert psutil.pid_exists(left)
    await programs.stop()
    assert polite.process.returncode == -signal.SIGTERM
    assert deaf.process.returncode == -signal.SIGKILL
    assert gone(left)


async def test_what_a_killed_demo_left_is_ended_by_the_next_and_nobody_elses(
    programs: Programs, tmp_path: Path
) -> None:
    ours = await asyncio.create_subprocess_exec(
        *python(FOREVER), env={MARK: str(tmp_path)}, stdout=asyncio.subprocess.PIPE
    )
    others = await asyncio.create_subprocess_exec(
        *python(FOREVER), env={MARK: str(tmp_path / "elsewhere")}, stdout=asyncio.subprocess.PIPE
    )
    for process in (ours, others):
        assert process.stdout is not None
        await process.stdout.readline()
    try:
        assert await programs.sweep() == 1
        assert await ours.wait() == -signal.SIGTERM
        assert others.returncode is None
    finally:
        others.terminate()
        await others.wait()


async def test_a_program_of_low_priority_is_last_in_line(programs: Programs) -> None:
    program = await programs.start("night", python(FOREVER), low_priority=True)
    assert os.getpriority(os.PRIO_PROCESS, program.process.pid) == 19
    assert autogroup(program.process.pid) in ("19", "")


async def test_memory_is_counted_over_the_whole_tree_and_postgres_and_shared_pages_once(
    programs: Programs, tmp_path: Path
) -> None:
    pid_file = tmp_path / "postmaster.pid"
    meter = MemoryMeter(programs, pid_file)
    before = meter.sample()
    hold = "import os, signal; held = b'x' * 200_000_000; print('up', flush=True); signal.pause()"
    shared = (
        "import os, signal; held = b'x' * 200_000_000; os.fork(); print('up', flush=True); signal.pause()"
    )
    program = await programs.start("holder", python(shared))
    await program.first_line()
    outsider = await asyncio.create_subprocess_exec(
        *python(hold), stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        assert outsider.stdout is not None
        await outsider.stdout.readline()
        pid_file.write_text(f"{outsider.pid}\n/data\n")
        held = meter.sample() - before
        # Twice 200 MB, though three processes hold it; the session's servers are our children, too.
        assert 330e6 < held < 560e6
        assert meter.peak_bytes >= held
    finally:
        outsider.terminate()
        await outsider.wait()


async def test_memory_is_sampled_until_it_is_told_to_stop(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demo.memory.SAMPLE_SECONDS", 0.01)
    meter = MemoryMeter(programs, tmp_path / "none")
    task = asyncio.create_task(meter.run())
    await until(lambda: meter.peak_bytes > 0)
    task.cancel()
    assert meter.peak_bytes > 10e6


# The route.


def a_serving(bench: Bench, tmp_path: Path) -> Serving:
    assert bench.running is not None
    write_private(tmp_path / "operator.token", "al_admin")
    return Serving(
        grpc_address=bench.running.grpc_address,
        http_address=bench.running.http_address,
        database_url="",
        tokens={},
        operator_token_file=tmp_path / "operator.token",
        started_at=datetime.now(UTC),
        keeper=None,  # type: ignore[arg-type]
        server=None,  # type: ignore[arg-type]
    )


async def test_the_share_of_a_canary_that_an_earlier_demo_left_goes_back_before_traffic_begins(
    tmp_path: Path,
) -> None:
    """Its GGUF need not even be there."""
    stable, left = Target(BASE, TargetRole.STABLE, 50), Target("m:2", TargetRole.CANARY, 50)
    routes = FakeRoutes(FakeRouteStore([Route("default", 4, (stable, left))]))
    plan = Plan(tmp_path / "var", tmp_path / "cycles", tmp_path / "base.gguf")
    written = io.StringIO()
    screen = Screen(Console(file=written, width=200))
    async with Bench(engine=FakeEngine(models=(BASE,)), routes=routes).run(tmp_path / "state") as bench:
        await settle_route(plan, a_serving(bench, tmp_path), screen)
        assert bench.routes.get("default") == route_to(BASE, revision=5)
        assert f"the 50 % that m:2 had as a canary go back to {BASE}" in written.getvalue()
        await settle_route(plan, a_serving(bench, tmp_path), screen)
        assert bench.routes.get("default").revision == 5


# Traffic.


@pytest.fixture
def service() -> Iterator[ScriptedService]:
    with running(ScriptedService()) as made:
        yield made


@pytest.fixture
async def player(service: ScriptedService) -> AsyncIterator[Player]:
    tokens = {name: f"al_{name}" for name in SERVICES}
    async with connected(service.address, tokens) as services:
        yield Player(services, Tally(), "run")


async def test_each_question_is_asked_once_by_the_services_in_turn(
    service: ScriptedService, player: Player
) -> None:
    items = traffic(6)
    await player.play(items, seconds=0, in_flight=2)
    chats = [asked for asked in service.asked if isinstance(asked, inference_pb2.ChatRequest)]
    assert sorted(chat.messages[-1].content for chat in chats) == sorted(
        item.messages[-1].content for item in items
    )
    assert len({chat.session_id for chat in chats}) == 6
    assert {token.removeprefix("Bearer al_") for token in service.tokens} == set(SERVICES)
    assert all(chat.sampling.max_tokens <= 64 for chat in chats)
    assert (player.tally.requests, player.tally.failures, player.tally.feedbacks) == (6, [], 6)
    assert player.tally.ttft_ms(50) is not None


async def test_the_published_answer_is_shown_as_feedback_on_its_inference(
    service: ScriptedService, player: Player
) -> None:
    (item,) = traffic(1)
    await player.ask(item)
    _, feedback = service.asked
    assert feedback.inference_id == "i-1"  # type: ignore[attr-defined]
    assert feedback.demonstration.tool_calls[0].name == item.function  # type: ignore[attr-defined]


async def test_no_more_than_so_many_are_in_flight(service: ScriptedService, player: Player) -> None:
    gate = threading.Event()
    service.chats = [[started(), gate, completed()] for _ in range(6)]
    playing = asyncio.create_task(player.play(traffic(6), seconds=0, in_flight=3))
    await until(lambda: player.in_flight == 3)
    assert len(service.asked) <= 3
    gate.set()
    await playing
    assert player.tally.requests == 6


async def test_what_fails_and_should_not_have_is_counted(service: ScriptedService, player: Player) -> None:
    service.chats = [[grpc.StatusCode.INTERNAL], [started(), text("half")]]
    for item in traffic(2):
        await player.ask(item)
    statuses = [(failure.status, failure.expected) for failure in player.tally.failures]
    assert statuses == [("INTERNAL", False), ("INCOMPLETE", False)]


async def test_feedback_that_is_refused_is_a_failure(service: ScriptedService, player: Player) -> None:
    service.refusals = [grpc.StatusCode.INVALID_ARGUMENT]
    outcome = await player.ask(traffic(1)[0])
    assert (outcome.expected, outcome.status) == (False, "INVALID_ARGUMENT")
    assert outcome.detail.startswith("its feedback: ")
    assert player.tally.feedbacks == 0


async def test_a_busy_server_may_refuse_at_once_what_would_have_timed_out(
    service: ScriptedService, player: Player
) -> None:
    service.chats = [[grpc.StatusCode.RESOURCE_EXHAUSTED]]
    await player._go_wrong("timed out", traffic(1)[0])
    assert [(o.status, o.expected) for o in player.tally.outcomes] == [("RESOURCE_EXHAUSTED", True)]


async def test_among_the_requests_some_are_cancelled_time_out_or_are_malformed(
    service: ScriptedService, player: Player
) -> None:
    items = traffic(3 * MISHAP_EVERY)
    never = threading.Event()
    service.chats = [[started(), text("ok"), completed()] for _ in range(2 * MISHAP_EVERY + 1)]
    service.chats[MISHAP_EVERY] = [started(), never]  # the one that is cancelled
    service.chats.append([started(), never])  # the one that times out
    await player.play(items, seconds=0, in_flight=1)
    never.set()
    assert player.tally.apart() == {"cancelled": 1, "malformed": 1, "timed out": 1}
    by_kind = {outcome.kind: outcome for outcome in player.tally.outcomes}
    assert (by_kind["cancelled"].status, by_kind["cancelled"].expected) == ("CANCELLED", True)
    assert (by_kind["timed out"].status, by_kind["timed out"].expected) == ("DEADLINE_EXCEEDED", True)
    # This server takes what it should have refused, and that is a failure of the service.
    assert (by_kind["malformed"].status, by_kind["malformed"].expected) == ("OK", False)


async def test_a_malformed_request_shows_the_token_that_it_should(
    service: ScriptedService, player: Player
) -> None:
    async with connected(service.address, {"travel-desk": "al_own"}) as (one,):
        for malformed in mishaps.MALFORMED:
            await mishaps.send(malformed, one.channel, one.token)
    shown = dict(zip([malformed.name for malformed in mishaps.MALFORMED], service.tokens, strict=True))
    assert shown["no token"] == ""
    assert shown["a token that nobody was given"] == f"Bearer {mishaps.UNKNOWN_TOKEN}"
    assert shown["no message"] == "Bearer al_own"


async def test_slow_traffic_ends_when_it_is_told_to_and_after_its_last_answer(
    service: ScriptedService, player: Player
) -> None:
    stop = asyncio.Event()
    paces = iter([0.01, 0.01])

    def pace() -> float:
        seconds = next(paces, None)
        if seconds is None:
            stop.set()
        return seconds or 0.01

    await player.trickle(traffic(2), pace, stop)
    assert player.tally.requests == 3
    assert player.in_flight == 0
    assert player.tally.feedbacks == 0


async def test_slow_traffic_does_not_pile_up_on_a_machine_that_is_slower(
    service: ScriptedService, player: Player
) -> None:
    gate, stop = threading.Event(), asyncio.Event()
    service.chats = [[started(), gate, completed()] for _ in range(50)]
    asked = 0

    def pace() -> float:
        nonlocal asked
        asked += 1
        if asked > 20:
            gate.set()
            stop.set()
        return 0.001

    await player.trickle(traffic(2), pace, stop)
    assert player.tally.requests == MOST_IN_FLIGHT
