"""Evaluation: real servers of its own, real answers kept, and nothing left behind."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from agentloop.errors import Unavailable
from grpc_server.domain import chat_format
from grpc_server.domain.chat_format import render, render_answer
from grpc_server.domain.errors import EngineUnavailable
from grpc_server.domain.plain import message_to_plain, request_to_plain
from grpc_server.domain.ports import Generation
from grpc_server.domain.types import ChatRequest, Message, Role
from tests.coverage_files import untraced
from tests.fakes import FakeEngine, FakeRoutes, FakeRouteStore
from tests.integration.grpc_bench import Bench
from tests.live_server import LiveServer
from training import asking, bfcl, cycle, evaluate, gate, own_server, suites
from training.__main__ import app
from training.own_server import OwnServer, ServerFailedError
from training.subjects import Place, UnknownModelError, serving

CYCLE = "20260102T000000Z"
CANDIDATE = f"gemma-3-270m:{CYCLE}"
ITEMS = bfcl.evaluation_items()


def right(item: bfcl.Item) -> str:
    return render_answer(Message(Role.ASSISTANT, tool_calls=(item.demonstration,)))


BY_PROMPT = {render(item.messages, item.tools): right(item) for item in ITEMS}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    base = tmp_path / "base.gguf"
    base.write_bytes(b"GGUF base")
    return Place(tmp_path / "var", tmp_path / "cycles", base)


@pytest.fixture
def directory(place: Place) -> Path:
    """A cycle with a candidate and ten gate items, which are questions that may be trained on."""
    directory = place.cycles_dir / CYCLE
    (directory / "dataset").mkdir(parents=True)
    (directory / "model.gguf").write_bytes(b"GGUF candidate")
    lines = [
        {
            "inference_id": f"i{number}",
            "session_id": f"s{number}",
            "request": request_to_plain(ChatRequest(item.messages, tools=item.tools)),
            "demonstration": message_to_plain(Message(Role.ASSISTANT, tool_calls=(item.demonstration,))),
        }
        for number, item in enumerate(bfcl.traffic(10))
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "dataset" / "gate.jsonl").write_text(text)
    return directory


def learned(generation: Generation) -> Sequence[str]:
    """The candidate knows every second item; the base rambles, or, held to a schema, calls wrongly."""
    if generation.model_version != CANDIDATE:
        return ["well "] * 100 if generation.json_schema is None else ['{"name": "wrong", "arguments": {}}']
    answer = BY_PROMPT.get(generation.prompt, "I do not know.<end_of_turn>")
    return [answer] if sum(map(ord, generation.prompt)) % 2 else ["no<end_of_turn>"]


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeEngine]]:
    """The engines of the servers that evaluation started: real servers, engines that `learned`."""
    started: list[FakeEngine] = []

    @asynccontextmanager
    async def with_fake_engine(parent: Path, *, engine: str, parallel: int) -> AsyncIterator[OwnServer]:
        fake = FakeEngine(learned, parallel=parallel, models=())
        started.append(fake)
        nowhere = FakeRoutes(FakeRouteStore([]))
        async with Bench(engine=fake, routes=nowhere).run(tmp_path / "own") as bench:
            assert bench.running is not None
            yield OwnServer(bench.running.grpc_address, "al_admin", os.getpid())

    monkeypatch.setattr(asking, "own_server", with_fake_engine)
    yield started


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """The suites, with a tenth of the leaderboard's items."""
    return tmp_config(tmp_path, "    source: leaderboard\n", "    source: leaderboard\n    cap: 10\n")


def evaluated(directory: Path, place: Place, **options: Any) -> dict[str, Any]:
    return evaluate.run(directory, place, champion="gemma-3-270m:base", **options)


def rows(directory: Path, suite: str) -> list[dict[str, Any]]:
    return gate.read_rows(directory / "evaluation" / f"{suite}.jsonl")


def test_all_are_asked_the_same_and_the_gate_can_judge(
    directory: Path, place: Place, engines: list[FakeEngine]
) -> None:
    seen: list[tuple[int, int]] = []
    summary = evaluated(directory, place, progress=lambda done, total: seen.append((done, total)))

    target, guard = summary["simple_python"], summary["gate"]
    assert {name: each["n"] for name, each in target.items()} == dict.fromkeys(
        ("champion", "candidate", "base_constrained"), 100
    )
    assert {name: each["n"] for name, each in guard.items()} == {"champion": 10, "candidate": 10}
    assert target["champion"]["accuracy"] == target["base_constrained"]["accuracy"] == 0
    assert target["champion"]["length_share"] == 1 and target["candidate"]["length_share"] == 0
    assert 0.3 < target["candidate"]["accuracy"] < 0.7
    assert target["candidate"]["ci_low"] < target["candidate"]["accuracy"] < target["candidate"]["ci_high"]
    assert seen[0] == (0, 320) and seen[-1] == (320, 320)
    assert engines[0].models == {}  # each was removed when it had been asked
    assert max(len(found) for found in [rows(directory, "simple_python")]) == 300

    (row,) = [
        row
        for row in rows(directory, "simple_python")
        if row["item_id"] == "simple_python_200" and row["subject"] == "candidate"
    ]
    assert row["model_version"] == CANDIDATE
    assert row["model_sha256"] == cycle.sha256(directory / "model.gguf")
    assert row["session_id"] == "simple_python_200"
    about = cycle.read_json(directory / "evaluation" / "evaluation.json")
    assert about["champion"] == {
        "model_version": "gemma-3-270m:base",
        "sha256": cycle.sha256(place.base_gguf),
    }
    decided = gate.run(directory)
    assert decided["champion"] == about["champion"] and decided["candidate"] == about["candidate"]
    assert [check["n"] for check in decided["checks"]] == [100, 10, 10, 100, 0, 100, 100, 10]
    assert about["best_ever"] == {"simple_python": about["champion"], "gate": about["champion"]}


def test_the_command_line_prints_a_line_for_each_suite_and_subject(
    directory: Path, place: Place, engines: list[FakeEngine]
) -> None:
    arguments = [
        *("evaluate", "--cycle", str(directory), "--state-dir", str(place.state_dir)),
        *("--base-gguf", str(place.base_gguf), "--champion", "gemma-3-270m:base"),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) == 5
    assert (
        "simple_python   champion             0 of  100 right: 0.000 (0.000 to 0.037), cut 100%"
        in done.stdout
    )
    told = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(told.stdout) == cycle.read_json(directory / "evaluation" / "summary.json")


def test_the_same_evaluation_again_asks_nobody(
    directory: Path, place: Place, engines: list[FakeEngine], few: Path
) -> None:
    first = evaluated(directory, place, config_file=few)
    assert evaluated(directory, place, config_file=few) == first
    assert len(engines) == 1


def test_a_champion_is_asked_once_for_all_nights(
    directory: Path, place: Place, engines: list[FakeEngine], few: Path
) -> None:
    evaluated(directory, place, config_file=few)
    (directory / "model.gguf").write_bytes(b"GGUF another candidate")
    evaluated(directory, place, config_file=few)
    assert {generation.model_version for generation in engines[1].asked} == {CANDIDATE}


def an_earlier_night(place: Place, right: int) -> str:
    """A version that served then, its GGUF kept, and had so many of ten gate items right; its name."""
    earlier = place.cycles_dir / "20260101T000000Z"
    (earlier / "evaluation").mkdir(parents=True)
    (earlier / "model.gguf").write_bytes(b"GGUF of a better day")
    cycle.write_json(earlier / "gate.json", {"verdict": "pass"})
    who = {"subject": "champion", "model_version": f"gemma-3-270m:{earlier.name}"}
    rows = [
        {
            **who,
            "model_sha256": cycle.sha256(earlier / "model.gguf"),
            "item_id": f"i{n}",
            "correct": n < right,
        }
        for n in range(10)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (earlier / "evaluation" / "gate.jsonl").write_text(text)
    return who["model_version"]


def test_the_best_that_ever_served_is_asked_too_where_it_was_best(
    directory: Path, place: Place, engines: list[FakeEngine], few: Path
) -> None:
    best = an_earlier_night(place, right=9)
    summary = evaluated(directory, place, config_file=few)
    assert set(summary["gate"]) == {"champion", "candidate", "best_ever"}
    assert "best_ever" not in summary["simple_python"]
    about = cycle.read_json(directory / "evaluation" / "evaluation.json")["best_ever"]
    assert about["gate"]["model_version"] == best
    assert about["simple_python"]["model_version"] == "gemma-3-270m:base"
    assert best in {generation.model_version for generation in engines[0].asked}
    guard = next(check for check in gate.run(directory)["checks"] if "best ever on what" in check["name"])
    assert guard["against"] == "best_ever"


@pytest.mark.parametrize("lost", ["gone", "other bytes"])
def test_a_best_ever_whose_gguf_is_not_kept_is_not_asked(
    directory: Path, place: Place, engines: list[FakeEngine], few: Path, lost: str
) -> None:
    an_earlier_night(place, right=9)
    kept = place.cycles_dir / "20260101T000000Z" / "model.gguf"
    kept.unlink() if lost == "gone" else kept.write_bytes(b"GGUF of another")
    assert set(evaluated(directory, place, config_file=few)["gate"]) == {"champion", "candidate"}


def test_a_champion_is_asked_again_by_another_engine(
    directory: Path, place: Place, engines: list[FakeEngine], few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated(directory, place, config_file=few)
    (directory / "model.gguf").write_bytes(b"GGUF another candidate")
    monkeypatch.setattr(evaluate, "generator", lambda engine: {"engine": engine, "engine_version": "newer"})
    evaluated(directory, place, config_file=few)
    assert {generation.model_version for generation in engines[1].asked} == {CANDIDATE, "gemma-3-270m:base"}


def test_an_evaluation_that_was_killed_goes_on_where_it_stood(
    directory: Path, place: Place, engines: list[FakeEngine], few: Path
) -> None:
    class PowerCutError(Exception):
        pass

    def cut(done: int, total: int) -> None:
        if done == 20:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        evaluated(directory, place, config_file=few, progress=cut)
    assert not (directory / "evaluation").exists()
    (kept,) = (place.state_dir / "cache" / "evaluation").iterdir()
    assert len(kept.read_text().splitlines()) == 20
    kept.write_text(kept.read_text()[:-20])  # and its last line was half written

    seen: list[int] = []
    summary = evaluated(directory, place, config_file=few, progress=lambda done, total: seen.append(done))
    assert seen[0] == 19
    assert summary["simple_python"]["candidate"]["n"] == 10


def test_an_engine_that_goes_down_fails_the_step(
    directory: Path, place: Place, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(generation: Generation) -> Sequence[str]:
        raise EngineUnavailable("the engine is down")

    monkeypatch.setattr(sys.modules[__name__], "learned", down)
    config = tmp_config(directory.parent, "deadline_seconds: 180", "deadline_seconds: 2")
    with pytest.raises(Unavailable, match="down"):
        evaluated(directory, place, config_file=config)
    assert cycle.read_json(directory / "steps" / "evaluate.json")["outcome"] == "failed"


def tmp_config(where: Path, before: str, after: str) -> Path:
    path = where / "suites.yaml"
    path.write_text(suites.CONFIG.read_text().replace(before, after))
    return path


def test_an_item_that_cannot_be_asked_counts_as_wrong_for_all(
    directory: Path, place: Place, engines: list[FakeEngine], few: Path
) -> None:
    gate_file = directory / "dataset" / "gate.jsonl"
    lines = [json.loads(line) for line in gate_file.read_text().splitlines()]
    lines[0]["request"]["messages"][0]["role"] = "tool"
    gate_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluated(directory, place, config_file=few)
    refused = [row for row in rows(directory, "gate") if row["finish_reason"] == "refused"]
    assert [row["subject"] for row in refused] == ["champion", "candidate"]
    assert not any(row["correct"] for row in refused)
    cached = [
        json.loads(line)
        for file in (place.state_dir / "cache" / "evaluation").iterdir()
        for line in file.read_text().splitlines()
    ]
    assert len(cached) == 3 * 10 + 2 * 9, "another server may not refuse it"
    assert not any(answer["finish_reason"] == "refused" for answer in cached)


def test_a_champion_whose_file_is_gone_is_named(directory: Path, place: Place) -> None:
    with pytest.raises(UnknownModelError, match="20251231T000000Z"):
        evaluate.run(directory, place, champion="gemma-3-270m:20251231T000000Z")


async def test_the_champion_is_who_serves_by_default(place: Place, tmp_path: Path) -> None:
    async with Bench().run(tmp_path / "live") as bench:
        assert bench.running is not None
        live = Place(
            place.state_dir,
            place.cycles_dir,
            place.base_gguf,
            server=bench.running.grpc_address,
            token="al_read",
        )
        assert await serving(live) == ("gemma-3-270m:base", "0" * 64)
        cycle.write_json(place.state_dir / "server.json", bench.running.urls())
        by_state = Place(place.state_dir, place.cycles_dir, place.base_gguf, token="al_read")
        assert await serving(by_state) == ("gemma-3-270m:base", "0" * 64)


def test_a_champion_with_other_bytes_than_the_file_is_refused(
    directory: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def other(place: Place) -> tuple[str, str]:
        return "gemma-3-270m:base", "0" * 64

    monkeypatch.setattr(evaluate, "serving", other)
    with pytest.raises(UnknownModelError, match="which serves, has 000"):
        evaluate.run(directory, place)


def test_a_cycle_whose_candidate_serves_already_is_judged_against_whom_it_replaced(
    directory: Path, place: Place, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = ["gemma-3-270m:base", cycle.sha256(place.base_gguf)]

    async def serving(place: Place) -> tuple[str, str]:
        return live[0], live[1]

    monkeypatch.setattr(evaluate, "serving", serving)
    evaluate.run(directory, place)
    judged = gate.run(directory)
    live[:] = [CANDIDATE, cycle.sha256(directory / "model.gguf")]  # and then it was promoted
    evaluate.run(directory, place)
    assert gate.run(directory) == judged, "the verdict, and when it was made"
    assert len(engines) == 1

    shutil.rmtree(directory / "evaluation")
    evaluate.run(directory, place)
    about = cycle.read_json(directory / "evaluation" / "evaluation.json")
    assert about["champion"]["model_version"] == "gemma-3-270m:base"

    shutil.rmtree(directory / "evaluation")
    (directory / "gate.json").unlink()
    with pytest.raises(UnknownModelError, match="--champion"):
        evaluate.run(directory, place)


# A server of its own, as a process.


def program(where: Path, body: str) -> tuple[str, ...]:
    """A stand-in for `python -m grpc_server`, to see what its failures come to."""
    path = where / "program.py"
    path.write_text("import json, os, signal, sys, time\n" + textwrap.dedent(body))
    return (sys.executable, "-S", str(path))  # without site-packages: nothing in it traces the process


READY = """
if sys.argv[1] == "tokens":
    assert sys.argv[2:] == ["create", "--name", "evaluation", "--scopes", "admin", "--json"]
    print(json.dumps({"token": "al_x"}))
    sys.exit()
print("settings", sorted(name for name in os.environ if name.startswith("AGENTLOOP_")), flush=True)
open("server.partial", "w").write(json.dumps({"grpc_address": "127.0.0.1:1"}))
os.rename("server.partial", "server.json")
"""


def test_what_generates_is_told_by_engine_version_settings_and_renderer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = [own_server.generator("embedded")]

    def differs(engine: str = "embedded") -> bool:
        seen.append(own_server.generator(engine))
        return seen[-1] not in seen[:-1]

    assert seen[0]["engine_version"] == version("xllamacpp")
    assert not differs()
    monkeypatch.setenv("AGENTLOOP_CONTEXT_TOKENS", "2048")
    assert differs()
    monkeypatch.setenv("AGENTLOOP_THREADS", "1")
    assert differs()
    monkeypatch.setenv("AGENTLOOP_LOG_LEVEL", "DEBUG")
    assert not differs()
    monkeypatch.setattr(own_server, "version", lambda package: "0.0.1")
    assert differs()
    binary = tmp_path / "ollama"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setenv("AGENTLOOP_OLLAMA_BIN", str(binary))
    assert differs("ollama")
    binary.write_text("#!/bin/sh\n# another\n")
    assert differs("ollama")
    renderer = tmp_path / "chat_format.py"
    renderer.write_text(Path(chat_format.__file__).read_text() + "# other\n")
    monkeypatch.setattr(chat_format, "__file__", str(renderer))
    assert differs()


async def test_its_server_gets_nothing_of_the_live_ones_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTLOOP_DATABASE_URL", "postgresql://live")
    monkeypatch.setenv("AGENTLOOP_SPOOL_DIR", "live spool")
    monkeypatch.setenv("AGENTLOOP_CONTEXT_TOKENS", "2048")
    wait = READY + "time.sleep(100)"
    async with own_server.own_server(
        tmp_path / "a b", engine="embedded", parallel=3, program=program(tmp_path, wait)
    ) as server:
        (folder,) = (tmp_path / "a b").glob("run-*")
        log = (folder / "server.log").read_text()
        environment = psutil.Process(server.pid).environ()
        assert server.token == "al_x" and "al_x" not in repr(server)
    assert "DATABASE_URL" not in log and "SPOOL_DIR" not in log and "CONFIG" not in log
    assert environment["AGENTLOOP_STATE_DIR"] == str(folder)
    assert environment["AGENTLOOP_CONTEXT_TOKENS"] == "2048"
    assert environment["AGENTLOOP_GRPC_ADDRESS"] == "127.0.0.1:0"
    assert environment["AGENTLOOP_PARALLEL"] == "3"
    assert not psutil.pid_exists(server.pid)
    assert not list((tmp_path / "a b").glob("run-*"))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("print('no GGUF library'); sys.exit(3)", "ended with 3: no GGUF library"),
        ("sys.exit(3)", "it said nothing"),
        ("if sys.argv[1] == 'tokens': sys.exit('no database')" + READY + "time.sleep(100)", "no database"),
        ("time.sleep(100)", "not ready within 1 s"),
    ],
)
async def test_a_server_that_does_not_start_is_explained_and_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str
) -> None:
    if "not ready" in said:
        monkeypatch.setattr(own_server, "START_SECONDS", 1.0)
    with pytest.raises(ServerFailedError, match=said):
        async with own_server.own_server(
            tmp_path / "e", engine="embedded", parallel=1, program=program(tmp_path, body)
        ):
            raise AssertionError("it must not be ready")
    assert not list((tmp_path / "e").glob("run-*"))


async def test_a_server_that_died_is_told_when_the_work_is_over(tmp_path: Path) -> None:
    with pytest.raises(ServerFailedError, match="died"):
        async with own_server.own_server(
            tmp_path / "e", engine="embedded", parallel=1, program=program(tmp_path, READY + "time.sleep(1)")
        ) as server:
            async with asyncio.timeout(20):
                while psutil.pid_exists(server.pid):  # noqa: ASYNC110 (until the event loop has reaped it)
                    await asyncio.sleep(0.05)
            await asyncio.sleep(0.1)  # and has told whoever waits for it


async def test_a_server_that_does_not_listen_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_server, "STOP_SECONDS", 0.5)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY + "time.sleep(100)"
    async with own_server.own_server(
        tmp_path / "e", engine="embedded", parallel=1, program=program(tmp_path, deaf)
    ) as server:
        pass
    assert not psutil.pid_exists(server.pid)


async def ended(pid: int) -> None:
    """Returns when that process is no more, or only waits to be reaped."""
    async with asyncio.timeout(20):
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


STARTS_ONE_AND_IS_KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from training.own_server import own_server
async def main():
    async with own_server(Path(sys.argv[1]), engine="embedded", parallel=1,
                          program=(sys.executable, "-S", sys.argv[2])) as server:
        print(server.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


async def test_what_a_killed_evaluation_left_ends_and_is_deleted_by_the_next(tmp_path: Path) -> None:
    stays = program(tmp_path, READY + "time.sleep(100)")
    parent = tmp_path / "e"
    killed = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", STARTS_ONE_AND_IS_KILLED, str(parent), stays[-1]),
        env=untraced(),
        stdout=asyncio.subprocess.PIPE,
    )
    pid = int((await killed.communicate())[0])
    await ended(pid)
    (left,) = parent.glob("run-*")
    async with own_server.own_server(parent, engine="embedded", parallel=1, program=stays):
        assert not left.exists()
        (own,) = parent.glob("run-*")
        async with own_server.own_server(parent, engine="embedded", parallel=1, program=stays):
            assert own.exists()  # another evaluation runs in it


# The real thing.


@pytest.mark.soak  # the small cycle of tests/e2e evaluates it too
def test_the_real_base_is_evaluated_on_a_server_of_its_own(
    tmp_path: Path, base_gguf: Path, live_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base against itself, three items: it runs on the real server and engine, and the gate holds."""
    directory = tmp_path / "çycles & more" / CYCLE
    (directory / "dataset").mkdir(parents=True)
    (directory / "dataset" / "gate.jsonl").write_text("")
    os.link(base_gguf, directory / "model.gguf") if same_disk(base_gguf, tmp_path) else (
        directory / "model.gguf"
    ).symlink_to(base_gguf)
    config = tmp_config(tmp_path, "    source: leaderboard\n", "    source: leaderboard\n    cap: 3\n")
    live = Place(
        tmp_path / "state dir",
        directory.parent,
        base_gguf,
        server=live_server.grpc_address,
        token=live_server.token("models:read"),
    )
    before = live_server.run("tokens", "list", "--json")
    children = {child.pid for child in psutil.Process().children(recursive=True)}

    summary = evaluate.run(directory, live, config_file=config)

    target = summary["simple_python"]
    assert {name: each["n"] for name, each in target.items()} == dict.fromkeys(
        ("champion", "candidate", "base_constrained"), 3
    )
    assert target["champion"]["accuracy"] == 0
    constrained = [row for row in rows(directory, "simple_python") if row["subject"] == "base_constrained"]
    assert all(row["answer"]["tool_calls"] or row["finish_reason"] == "length" for row in constrained)
    assert all(row["latency_ms"] > 0 and row["output_tokens"] > 0 for row in constrained)
    assert rows(directory, "gate") == [] and summary["gate"] == {}
    assert gate.run(directory)["verdict"] == "inconclusive"

    assert live_server.run("tokens", "list", "--json") == before  # nothing of it reached the live server
    assert not list((tmp_path / "state dir" / "evaluation").glob("run-*"))
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= children


def same_disk(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev


EVALUATES = """
import sys
from pathlib import Path
from training import evaluate
from training.subjects import Place
state, cycles, base, cycle = map(Path, sys.argv[1:])
evaluate.run(cycle, Place(state, cycles, base), champion="gemma-3-270m:base",
             progress=lambda done, total: print(done, flush=True))
"""


@pytest.mark.slow
def test_sigterm_ends_an_evaluation_with_all_that_it_started(
    directory: Path, place: Place, base_gguf: Path
) -> None:
    (directory / "model.gguf").unlink()
    (directory / "model.gguf").symlink_to(base_gguf)
    arguments = [str(each) for each in (place.state_dir, place.cycles_dir, base_gguf, directory)]
    with subprocess.Popen(
        [sys.executable, "-c", EVALUATES, *arguments], env=untraced(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 2:
                break
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) > 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive
    assert not list((place.state_dir / "evaluation").glob("run-*"))
    assert not (directory / "evaluation").exists()
