"""The real playbooks against a real server (its engine is a fake) under traffic."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from grpc_server.domain.errors import EngineFailed
from grpc_server.domain.types import ModelVersion, Target, TargetRole
from tests.ansible_modules import rollout_record
from tests.integration.rollout_bench import CANDIDATE, CHAMPION, World, good, stable, world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
OTHER = "m:20251231T000000Z"
PROMOTED = [(CANDIDATE, "stable", 100)]
UNTOUCHED = [(CHAMPION, "stable", 100)]


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path / "tést & dir") as running:
        yield running


def endless() -> list[str]:
    return ["word "] * 100


def failing() -> list[str]:
    raise EngineFailed("the engine fell over")


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def kill(process: subprocess.Popen[str]) -> None:
    """The whole rollout at once, as a power cut would."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def already_promoted(here: World) -> None:
    """As after a rollout: the candidate serves, the former champion stays installed."""
    here.bench.engine.models[CANDIDATE] = ModelVersion(CANDIDATE, "0" * 64, 1, loaded=True)
    before = [{"model_version": CHAMPION, "role": "stable", "weight": 100}]
    record = rollout_record.Record(here.cycle_dir)
    record.start({"targets": before}, CANDIDATE, None, datetime.now(UTC))
    record.finish(datetime.now(UTC), "promoted", "no worse", {"targets": []}, None)
    here.set_route(stable(CANDIDATE))


def test_a_good_candidate_is_promoted_in_steps_and_a_second_run_changes_nothing(here: World) -> None:
    steps = {"AGENTLOOP_CANARY_STEPS": "30, 50,100", "AGENTLOOP_CANARY_WATCH_SECONDS": "0.5"}
    checked = here.play("rollout", "--check", "--diff", **steps)
    assert checked.code == 0, checked.out
    assert checked.changed == 4
    assert here.targets == UNTOUCHED
    assert [path.name for path in sorted(here.cycle_dir.iterdir())] == ["gate.json", "model.gguf"]

    first = here.play(**steps)
    assert first.code == 0, first.out
    assert first.changed == 5
    assert here.targets == PROMOTED
    record = here.rollout
    assert record["result"] == "promoted"
    expected = ["install", *["canary", "analysis"] * 2, "watch", "end"]
    assert [step["step"] for step in record["steps"]] == expected
    assert "gets 30 % of default" in record["steps"][1]["reason"]
    figures = record["steps"][4]["metrics"]
    assert min(figures["stable"]["requests"], figures["canary"]["requests"]) >= 8
    assert record["requests"] > 16
    assert record["failed_requests"] == 0
    assert here.refused == []
    assert {each.name for each in here.on_loop(here.bench.engine.list_models())} == {CHAMPION, CANDIDATE}
    assert here.marks == [f"mark {CANDIDATE}"]

    second = here.play()
    assert (second.code, second.changed) == (0, 0), second.out
    assert here.rollout == record


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (endless, "length share 100.0% (stable 0.0%)"),
        (failing, "error share 100.0% (stable 0.0%)"),
    ],
    ids=["cut by length", "errors"],
)
def test_a_bad_candidate_is_rolled_back_by_itself(
    here: World, reply: Callable[[], list[str]], reason: str
) -> None:
    replies = iter([good()])  # it answers the warming request, and no caller
    here.replies[CANDIDATE] = lambda: next(replies, None) or reply()
    played = here.play()
    assert played.code == 0, played.out
    assert here.targets == UNTOUCHED
    record = here.rollout
    assert record["result"] == "rolled_back"
    assert reason in record["reason"]
    assert record["route_after"] == record["route_before"]
    assert here.marks == []
    if reply is endless:
        again = here.play()
        assert (again.code, again.changed) == (0, 0), again.out


@pytest.mark.soak
def test_a_candidate_that_is_bad_only_alone_is_put_back_by_the_watch(here: World) -> None:
    def reply() -> list[str]:
        return endless() if here.targets == PROMOTED else good()

    here.replies[CANDIDATE] = reply
    played = here.play(AGENTLOOP_CANARY_WATCH_SECONDS="20")
    assert played.code == 0, played.out
    assert here.targets == UNTOUCHED
    record = here.rollout
    assert [step["step"] for step in record["steps"]] == ["install", "canary", "analysis", "watch", "end"]
    assert (record["result"], record["steps"][3]["decision"]) == ("rolled_back", "roll_back")
    assert here.marks == []


@pytest.mark.soak
def test_a_step_that_is_none_is_refused_before_anything_changes(here: World) -> None:
    for steps in ("0,50", "50,10", "100", "ten"):
        played = here.play(AGENTLOOP_CANARY_STEPS=steps)
        assert played.code != 0
        assert f"The steps are '{steps}' (AGENTLOOP_CANARY_STEPS)" in played.out
    assert here.targets == UNTOUCHED


def test_a_canary_that_nobody_asked_is_rolled_back_and_may_be_tried_again(here: World) -> None:
    here.asking = False
    played = here.play(AGENTLOOP_CANARY_TIME_LIMIT="2")
    assert played.code == 0, played.out
    assert here.targets == UNTOUCHED
    assert here.rollout["reason"].startswith("too few requests of 8: stable has 0, canary has 0")
    here.asking = True
    assert here.play("rollout", "-e", "model_again=true").code == 0
    assert here.targets == PROMOTED


def test_a_rollout_that_is_killed_midway_goes_on_when_it_is_run_again(here: World) -> None:
    here.asking = False
    process = here.start()
    until(lambda: len(here.targets) == 2)
    kill(process)
    assert here.targets == [(CHAMPION, "stable", 50), (CANDIDATE, "canary", 50)]
    here.asking = True
    played = here.play()
    assert played.code == 0, played.out
    assert here.targets == PROMOTED
    assert here.rollout["route_before"] == [{"model_version": CHAMPION, "role": "stable", "weight": 100}]
    assert "resumed" in [step["step"] for step in here.rollout["steps"]]


def test_a_rollout_that_is_killed_after_its_promotion_still_moves_the_mark(here: World) -> None:
    already_promoted(here)
    (here.cycle_dir / "rollout.json").rename(here.cycle_dir / "rollout.partial.json")
    here.bench.engine.models[CANDIDATE] = ModelVersion(
        CANDIDATE, json.loads((here.cycle_dir / "gate.json").read_text())["candidate"]["sha256"], 1
    )
    played = here.play()
    assert (played.code, played.changed) == (0, 0), played.out
    assert here.marks == [f"mark {CANDIDATE}"]
    assert here.rollout["result"] == "promoted"


def test_of_two_rollouts_at_once_the_second_is_told_so(here: World) -> None:
    canary = Target(OTHER, TargetRole.CANARY, 10)
    here.set_route(Target(CHAMPION, TargetRole.STABLE, 90), canary)
    played = here.play()
    assert played.code != 0
    assert f"{OTHER} is a canary already" in played.out
    assert played.changed == 0
    assert not (here.cycle_dir / "rollout.json").exists()


def test_a_route_that_somebody_changes_midway_is_left_to_them(here: World) -> None:
    here.asking = False
    process = here.start(AGENTLOOP_CANARY_TIME_LIMIT="3")
    until(lambda: len(here.targets) == 2)
    here.set_route(stable(OTHER))
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Somebody else changed the route default" in out
    assert here.targets == [(OTHER, "stable", 100)]


def test_a_registry_that_fails_puts_the_champion_back(here: World) -> None:
    played = here.play("rollout", "-e", "model_mark_retry_seconds=0", MARK_EXIT="1")
    assert played.code == 0, played.out
    assert here.targets == UNTOUCHED
    assert here.rollout["result"] == "rolled_back"
    assert here.rollout["reason"].startswith("Move the mark in the registry: ")


def test_a_candidate_that_cannot_answer_at_all_gets_no_traffic(here: World) -> None:
    here.replies[CANDIDATE] = failing
    played = here.play()
    assert played.code != 0
    assert "got no traffic: Warm the candidate with a request of its own" in played.out
    assert here.targets == UNTOUCHED
    assert here.rollout["result"] == "not_started"
    assert here.refused == []


def test_a_candidate_that_the_gate_did_not_pass_is_refused(here: World) -> None:
    here.write_cycle("inconclusive")
    played = here.play()
    assert played.code != 0
    assert "The gate says inconclusive: no better. The champion serves on." in played.out
    assert (played.changed, here.targets) == (0, UNTOUCHED)


def test_a_server_that_is_down_is_named_and_a_missing_cycle_too(here: World) -> None:
    played = here.play("rollout", AGENTLOOP_SERVER="127.0.0.1:1")
    assert played.code != 0
    assert "The route could not be read: UNAVAILABLE" in played.out
    played = here.play("rollout", AGENTLOOP_CYCLE_DIR="")
    assert played.code != 0
    assert "give -e cycle_dir=<absolute path of a cycle directory>" in played.out


def test_the_former_champion_is_put_back_by_one_command(here: World) -> None:
    already_promoted(here)
    played = here.play("rollback")
    assert played.code == 0, played.out
    assert here.targets == UNTOUCHED
    assert here.rollout["result"] == "rolled_back"
    assert here.rollout["reason"] == f"{CHAMPION} was put back by hand"
    assert here.marks == [f"mark {CHAMPION} --or-none"]
    again = here.play("rollback")
    assert (again.code, again.changed) == (0, 0), again.out


def test_a_rollback_does_not_undo_what_a_later_cycle_brought_unless_told_what_to_put_back(
    here: World,
) -> None:
    already_promoted(here)
    here.bench.engine.models[OTHER] = ModelVersion(OTHER, "0" * 64, 1, loaded=True)
    here.set_route(stable(OTHER))
    played = here.play("rollback")
    assert played.code != 0
    assert f"{OTHER} serves, and this cycle did not put it there" in played.out
    assert here.targets == [(OTHER, "stable", 100)]
    played = here.play("rollback", "-e", f"to={CHAMPION}", AGENTLOOP_CYCLE_DIR="")
    assert played.code == 0, played.out
    assert here.targets == UNTOUCHED
    assert here.marks == [f"mark {CHAMPION} --or-none"]
