"""What the rollout's Ansible modules ask of `agent-loop`, and what they leave alone."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.ansible_modules import agentloop_model, agentloop_route, rollout_record, sources
from tests.module_run import run_module

OLD, NEW, SHADOW = "m:20260101T000000Z", "m:20260102T000000Z", "m:20251231T000000Z"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

# Plays `agent-loop`: keeps its arguments in `asked`, and answers with the files `<group>-<command>.json`.
PROGRAM = """#!{python} -S
import json, pathlib, sys
here = pathlib.Path(__file__).parent
words = [word for word in sys.argv[1:] if not word.startswith("--")]
with (here / "asked").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
answer = json.loads((here / ("-".join(words[:2]) + ".json")).read_text())
print(answer["out"])
print(answer["err"], file=sys.stderr)
sys.exit(answer["code"])
"""


class AgentLoop:
    """A stand-in for the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "agent-loop"
        self.path.write_text(PROGRAM.format(python=sys.executable))
        self.path.chmod(0o755)

    def answers(
        self, command: str, value: Any = None, *, code: int = 0, err: str = "", out: str = ""
    ) -> None:
        text = out or json.dumps(value)
        answer = {"out": text, "err": err, "code": code}
        (self.folder / f"{command.replace(' ', '-')}.json").write_text(json.dumps(answer))

    def asked(self, command: str) -> list[list[str]]:
        """The arguments of each call of `command`."""
        file = self.folder / "asked"
        lines = file.read_text().splitlines() if file.exists() else []
        calls: list[list[str]] = [json.loads(line) for line in lines]
        return [call for call in calls if [w for w in call if not w.startswith("--")][:2] == command.split()]


@pytest.fixture
def agent_loop(tmp_path: Path) -> AgentLoop:
    folder = tmp_path / "é & b"
    folder.mkdir()
    return AgentLoop(folder)


def target(model_version: str, role: str, weight: int) -> dict[str, Any]:
    return {"model_version": model_version, "role": role, "weight": weight}


def route(*targets: dict[str, Any], revision: int = 4) -> dict[str, Any]:
    return {"alias": "default", "revision": revision, "targets": list(targets)}


STABLE_OLD = route(target(OLD, "stable", 100))
CANARY_NEW = route(target(OLD, "stable", 90), target(NEW, "canary", 10), revision=5)


def change(agent_loop: AgentLoop, options: dict[str, Any], *, check: bool = False) -> dict[str, Any]:
    return run_module(agentloop_route, {"command": str(agent_loop.path), **options}, check=check)


# Routes.


def test_a_canary_takes_its_share_from_the_stable_version_and_shadows_stay() -> None:
    before = [target(OLD, "stable", 100), target(SHADOW, "shadow", 5)]
    assert agentloop_route.targets_for(before, "canary", NEW, 10) == [
        target(OLD, "stable", 90),
        target(NEW, "canary", 10),
        target(SHADOW, "shadow", 5),
    ]


def test_promotion_gives_everything_and_ends_a_shadow_of_the_same_version() -> None:
    before = [target(OLD, "stable", 90), target(NEW, "canary", 10), target(NEW, "shadow", 5)]
    assert agentloop_route.targets_for(before, "stable", NEW, 0) == [target(NEW, "stable", 100)]


def test_two_canaries_are_refused_with_what_to_do() -> None:
    before = [target(OLD, "stable", 90), target(SHADOW, "canary", 10)]
    with pytest.raises(agentloop_route.RefusedError, match=r"another rollout is at work.*make rollback TO="):
        agentloop_route.targets_for(before, "canary", NEW, 10)


def test_the_stable_version_cannot_be_its_own_canary() -> None:
    with pytest.raises(agentloop_route.RefusedError, match="its own canary"):
        agentloop_route.targets_for([target(OLD, "stable", 100)], "canary", OLD, 10)


def test_reading_a_route_changes_nothing(agent_loop: AgentLoop) -> None:
    agent_loop.answers("route get", STABLE_OLD)
    result = change(agent_loop, {"server": "127.0.0.1:1", "token_file": "/a b/token", "alias": "agent"})
    assert (result["changed"], result["route"]) == (False, STABLE_OLD)
    assert agent_loop.asked("route get") == [
        ["--server=127.0.0.1:1", "--token-file=/a b/token", "route", "get", "--alias=agent", "--json"]
    ]
    assert agent_loop.asked("route set") == []


def test_a_change_is_a_compare_and_set_of_the_revision_that_was_read(agent_loop: AgentLoop) -> None:
    agent_loop.answers("route get", STABLE_OLD)
    agent_loop.answers("route set", CANARY_NEW | {"changed": True})
    result = change(agent_loop, {"state": "canary", "model_version": NEW, "revision": 4})
    assert (result["changed"], result["route"], result["before"]) == (True, CANARY_NEW, STABLE_OLD)
    assert agent_loop.asked("route set")[0] == [
        "route",
        "set",
        "--alias=default",
        "--revision=4",
        f"--target={OLD}=stable:90",
        f"--target={NEW}=canary:10",
        "--json",
    ]


def test_check_mode_tells_what_would_change_and_changes_nothing(agent_loop: AgentLoop) -> None:
    agent_loop.answers("route get", STABLE_OLD)
    result = change(agent_loop, {"state": "stable", "model_version": NEW}, check=True)
    assert result["changed"] is True
    assert result["diff"]["after"]["targets"] == [target(NEW, "stable", 100)]
    assert agent_loop.asked("route set") == []


def test_a_route_that_is_so_already_is_left_alone(agent_loop: AgentLoop) -> None:
    agent_loop.answers("route get", CANARY_NEW)
    result = change(agent_loop, {"state": "canary", "model_version": NEW, "weight": 10, "revision": 1})
    assert result["changed"] is False
    assert agent_loop.asked("route set") == []


def test_a_route_that_moved_on_is_a_conflict_that_names_what_serves(agent_loop: AgentLoop) -> None:
    agent_loop.answers("route get", STABLE_OLD)
    result = change(agent_loop, {"state": "stable", "model_version": NEW, "revision": 3})
    assert result["failed"]
    assert result["conflict"] is True
    assert "was at revision 3 and is at 4 (m:20260101T000000Z stable 100 %)" in result["msg"]


def test_losing_a_race_is_a_conflict_too(agent_loop: AgentLoop) -> None:
    agent_loop.answers("route get", STABLE_OLD)
    error = json.dumps({"error": {"status": "ABORTED", "message": "the revision is 5"}})
    agent_loop.answers("route set", code=3, err=f"a warning\n{error}")
    result = change(agent_loop, {"state": "stable", "model_version": NEW})
    assert result["conflict"] is True
    assert result["msg"] == "Somebody else changed the route in the same moment: ABORTED: the revision is 5"


def test_a_server_that_is_down_is_told_as_such(agent_loop: AgentLoop) -> None:
    agent_loop.answers("route get", code=5, err="UNAVAILABLE: nobody listens\nIs a server running?")
    result = change(agent_loop, {})
    assert result["conflict"] is False
    assert result["msg"].startswith("The route could not be read: UNAVAILABLE: nobody listens")
    result = change(agent_loop, {"state": "stable", "model_version": NEW})
    assert result["msg"].startswith("The route could not be changed: ")


def test_restoring_puts_back_what_this_rollout_left(agent_loop: AgentLoop) -> None:
    agent_loop.answers("route get", CANARY_NEW)
    agent_loop.answers("route set", STABLE_OLD | {"revision": 6, "changed": True})
    options = {"state": "restored", "model_version": NEW, "targets": STABLE_OLD["targets"]}
    assert change(agent_loop, options | {"revision": 5})["changed"] is True


def test_restoring_knows_its_own_change_though_the_answer_was_lost(agent_loop: AgentLoop) -> None:
    agent_loop.answers("route get", CANARY_NEW)
    agent_loop.answers("route set", STABLE_OLD | {"revision": 6, "changed": True})
    options = {"state": "restored", "model_version": NEW, "targets": STABLE_OLD["targets"]}
    assert change(agent_loop, options | {"revision": 4})["changed"] is True


@pytest.mark.parametrize(
    "now",
    [
        route(target(SHADOW, "stable", 100), revision=5),
        route(target(OLD, "stable", 90), target(NEW, "canary", 10), revision=6),
    ],
)
def test_restoring_leaves_alone_what_somebody_else_changed(
    agent_loop: AgentLoop, now: dict[str, Any]
) -> None:
    agent_loop.answers("route get", now)
    options = {"state": "restored", "model_version": NEW, "targets": STABLE_OLD["targets"], "revision": 4}
    result = change(agent_loop, options)
    assert result["conflict"] is True
    assert "it is left as it is" in result["msg"]
    assert agent_loop.asked("route set") == []


def test_restoring_what_is_there_already_is_no_change_and_no_conflict(agent_loop: AgentLoop) -> None:
    agent_loop.answers("route get", STABLE_OLD | {"revision": 9})
    options = {"state": "restored", "model_version": NEW, "targets": STABLE_OLD["targets"], "revision": 4}
    assert change(agent_loop, options)["changed"] is False


@pytest.mark.parametrize("weight", [0, 100])
def test_a_share_that_is_none_is_refused(agent_loop: AgentLoop, weight: int) -> None:
    result = change(agent_loop, {"state": "canary", "model_version": NEW, "weight": weight})
    assert result["msg"] == f"weight is {weight}; it must be from 1 to 99"


def test_an_answer_that_is_no_json_is_an_error_that_quotes_it(agent_loop: AgentLoop) -> None:
    agent_loop.answers("route get", out="Welcome!")
    assert "printed no JSON object: 'Welcome!" in change(agent_loop, {})["msg"]


def test_a_command_that_says_nothing_is_told_by_its_exit_code(agent_loop: AgentLoop) -> None:
    agent_loop.answers("route get", code=7)
    assert "agent-loop ended with 7" in change(agent_loop, {})["msg"]


# Models.


def install(agent_loop: AgentLoop, *, check: bool = False) -> dict[str, Any]:
    options = {"name": NEW, "path": "/cycles/a b/model.gguf", "sha256": "AB", "command": str(agent_loop.path)}
    return run_module(agentloop_model, options, check=check)


MODEL = {"name": NEW, "sha256": "ab", "size_bytes": 14, "loaded": True}


def test_a_model_version_that_is_missing_is_installed(agent_loop: AgentLoop) -> None:
    agent_loop.answers("models list", {"models": []})
    agent_loop.answers("models install", {"changed": True, "model": MODEL})
    result = install(agent_loop)
    assert (result["changed"], result["model"]) == (True, MODEL)
    assert agent_loop.asked("models install")[0][:4] == ["models", "install", NEW, "/cycles/a b/model.gguf"]
    assert "--sha256=ab" in agent_loop.asked("models install")[0]


def test_a_model_version_that_is_there_is_left_alone(agent_loop: AgentLoop) -> None:
    agent_loop.answers("models list", {"models": [MODEL]})
    assert install(agent_loop)["changed"] is False
    assert agent_loop.asked("models install") == []


def test_check_mode_would_install_and_does_not(agent_loop: AgentLoop) -> None:
    agent_loop.answers("models list", {"models": []})
    assert install(agent_loop, check=True)["changed"] is True
    assert agent_loop.asked("models install") == []


def test_other_bytes_of_the_same_name_are_an_error(agent_loop: AgentLoop) -> None:
    agent_loop.answers("models list", {"models": [MODEL | {"sha256": "cd"}]})
    error = json.dumps({"error": {"status": "ALREADY_EXISTS", "message": "installed with other bytes"}})
    agent_loop.answers("models install", code=1, err=error)
    result = install(agent_loop)
    assert result["msg"] == f"{NEW} could not be installed: ALREADY_EXISTS: installed with other bytes"


def test_an_error_that_is_not_the_commands_own_is_told_as_it_is(agent_loop: AgentLoop) -> None:
    agent_loop.answers("route get", code=1, err='{"error": 3}\nplain\n')
    assert change(agent_loop, {})["msg"] == 'The route could not be read: {"error": 3}\nplain'


# Records.


@pytest.fixture
def cycle(tmp_path: Path) -> Path:
    folder = tmp_path / "cycles" / "20260102T000000Z"
    folder.mkdir(parents=True)
    gate = {"verdict": "pass", "reason": "better", "candidate": {"model_version": NEW, "sha256": "ab"}}
    (folder / "gate.json").write_text(json.dumps(gate))
    (folder / "model.gguf").write_bytes(b"GGUF")
    return folder


def write(cycle: Path, action: str, *, check: bool = False, **options: Any) -> dict[str, Any]:
    return run_module(rollout_record, {"cycle_dir": str(cycle), "action": action, **options}, check=check)


def test_a_cycle_names_its_verdict_and_its_candidate(cycle: Path) -> None:
    result = write(cycle, "read")
    assert result["verdict"] == {"verdict": "pass", "reason": "better"}
    assert result["candidate"] == {
        "model_version": NEW,
        "sha256": "ab",
        "path": str(cycle / "model.gguf"),
    }
    assert (result["result"], result["record"]) == ("", {})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gate.json", None, "no gate.json"),
        ("gate.json", "{", "cannot be read"),
        ("gate.json", "[]", "holds no JSON object"),
        ("gate.json", "{}", "names no candidate"),
        ("model.gguf", None, "model.gguf is missing"),
    ],
)
def test_a_cycle_that_cannot_be_rolled_out_says_why(
    cycle: Path, name: str, text: str | None, message: str
) -> None:
    (cycle / name).unlink()
    if text is not None:
        (cycle / name).write_text(text)
    result = write(cycle, "read")
    assert result["failed"]
    assert message in result["msg"]


def test_a_record_appears_whole_at_its_end_with_every_step(cycle: Path) -> None:
    write(cycle, "start", route=STABLE_OLD, candidate=NEW)
    figures = {"stable": {"requests": 9}, "canary": {"requests": 8}}
    write(cycle, "step", step="analysis", decision="promote", reason="no worse", metrics=figures)
    assert not (cycle / "rollout.json").exists()
    write(cycle, "finish", result="promoted", reason="no worse", route=route(target(NEW, "stable", 100)))
    record = json.loads((cycle / "rollout.json").read_text())
    assert record["result"] == "promoted"
    assert record["route_before"] == [target(OLD, "stable", 100)]
    assert record["route_after"] == [target(NEW, "stable", 100)]
    assert [step["step"] for step in record["steps"]] == ["analysis", "end"]
    assert record["steps"][0]["metrics"] == figures
    assert (record["requests"], record["failed_requests"]) == (None, None)
    assert sorted(path.name for path in cycle.iterdir()) == ["gate.json", "model.gguf", "rollout.json"]
    assert write(cycle, "read")["result"] == "promoted"


def test_check_mode_writes_nothing(cycle: Path) -> None:
    result = write(cycle, "start", route=CANARY_NEW, candidate=NEW, check=True)
    assert result["record"] == {"route_before": [target(OLD, "stable", 100)]}
    assert write(cycle, "finish", result="promoted", check=True)["record"] == {}
    assert sorted(path.name for path in cycle.iterdir()) == ["gate.json", "model.gguf"]


class Clocked:
    """A record whose time a test sets."""

    def __init__(self, cycle: Path) -> None:
        self.record = rollout_record.Record(cycle)

    def start(self, now: dict[str, Any], counts: dict[str, int] | None = None, after: float = 0) -> Any:
        return self.record.start(now, NEW, counts, NOW + timedelta(seconds=after))


def test_a_killed_rollout_that_goes_on_remembers_what_to_put_back(cycle: Path) -> None:
    before = route(target(OLD, "stable", 100), target(SHADOW, "shadow", 5))
    Clocked(cycle).start(before)
    record = Clocked(cycle).start(CANARY_NEW, after=60)
    assert record["route_before"] == before["targets"]
    assert record["steps"][0]["step"] == "resumed"
    finished = rollout_record.Record(cycle).finish(
        NOW + timedelta(seconds=90), "rolled_back", "worse", None, None
    )
    assert (finished["seconds"], finished["route_after"]) == (90.0, before["targets"])


def test_a_killed_rollout_whose_route_somebody_changed_since_puts_that_back(cycle: Path) -> None:
    Clocked(cycle).start(STABLE_OLD)
    record = Clocked(cycle).start(route(target(SHADOW, "stable", 100), revision=9))
    assert record["route_before"] == [target(SHADOW, "stable", 100)]


def test_a_canary_without_a_record_is_known_to_have_come_from_the_stable_version(cycle: Path) -> None:
    with_shadow = route(*CANARY_NEW["targets"], target(SHADOW, "shadow", 5))
    record = Clocked(cycle).start(with_shadow)
    assert record["route_before"] == [target(OLD, "stable", 100), target(SHADOW, "shadow", 5)]


def test_trying_again_keeps_the_steps_of_the_first_time(cycle: Path) -> None:
    Clocked(cycle).start(STABLE_OLD)
    rollout_record.Record(cycle).finish(NOW, "rolled_back", "too few requests", STABLE_OLD, None)
    record = Clocked(cycle).start(STABLE_OLD, after=60)
    assert [step["decision"] for step in record["steps"]] == ["rolled_back"]
    assert not (cycle / "rollout.json").exists()


@pytest.mark.parametrize(
    ("before", "after", "requests", "failed"),
    [
        ({"requests": 10, "failed": 1}, {"requests": 30, "failed": 3}, 20, 2),
        ({"requests": 10, "failed": 1}, {"requests": 7, "failed": 0}, 7, 0),
        (None, {"requests": 7, "failed": 0}, None, None),
    ],
)
def test_requests_during_the_rollout_are_counted_across_a_restart(
    cycle: Path, before: Any, after: Any, requests: int | None, failed: int | None
) -> None:
    Clocked(cycle).start(STABLE_OLD, before)
    record = rollout_record.Record(cycle).finish(NOW, "promoted", "", None, after)
    assert (record["requests"], record["failed_requests"]) == (requests, failed)


def test_counts_come_from_the_servers_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = {
        ("agentloop_inferences_total", (("alias", "default"), ("status", "ok"))): 5.0,
        ("agentloop_inferences_total", (("alias", "default"), ("status", "error"))): 2.0,
        ("agentloop_inferences_total", (("alias", "agent"), ("status", "ok"))): 50.0,
        ("other_total", ()): 1.0,
    }
    monkeypatch.setattr(sources, "fetch", lambda url, ca_file: samples)
    assert rollout_record.count(["http://x/metrics"], "default") == {"requests": 7, "failed": 2}
    two = rollout_record.count(["http://x/metrics", "http://y/metrics"], "default")
    assert two == {"requests": 14, "failed": 4}
    monkeypatch.setattr(sources, "fetch", lambda url, ca_file: (_ for _ in ()).throw(OSError("refused")))
    assert rollout_record.count(["http://x/metrics"], "default") is None
    assert rollout_record.count([], "default") is None


def test_a_folder_that_cannot_be_written_is_an_error_in_words(cycle: Path) -> None:
    result = write(cycle / "missing", "step", step="x")
    assert result["failed"]
    assert "No such file or directory" in result["msg"]
