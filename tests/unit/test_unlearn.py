"""`unlearn`: a dataset without the rows, the night's own steps, nothing guilty in service, and evidence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from agentloop.errors import NotFound, Unavailable
from agentloop.night import Night
from agentloop.types import ModelDetails, ModelVersion, Route, Target
from tests.unit.test_curate import frozen, traffic
from training import curate, cycle, register, report, subjects, unlearn
from training.__main__ import app
from training.best_ever import Version
from training.gate_rules import read_rules
from training.unlearn_lock import BusyError, alone

FIRST, SECOND = "20260130T020000Z", "20260131T020000Z"
ERASURE = "0197f2a0-0000-4000-8000-000000000001"
NAME = "gemma-3-270m:"
KEPT, GONE, GATE = "row-kept", "row-gone", "row-gate"


class Server:
    """The live server: which versions are installed, and where `default` leads."""

    def __init__(self, stable: str, installed: Sequence[str]) -> None:
        self.stable, self.installed, self.away = stable, list(installed), False

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get_route(self, alias: str) -> Route:
        return Route(alias, 1, (Target(self.stable, "stable", 100),))

    def get_model(self, name: str) -> ModelDetails:
        if self.away:
            raise Unavailable(grpc.StatusCode.UNAVAILABLE, "no server")
        if name not in self.installed:
            raise NotFound(grpc.StatusCode.NOT_FOUND, name)
        aliases = ("default",) if name == self.stable else ()
        return ModelDetails(
            ModelVersion(name, "a" * 64, 1, loaded=False), "gemma3", 1, "", 1, "", "", aliases
        )

    def install_model(self, name: str, path: Path, sha256: str) -> None:
        assert cycle.sha256(path) == sha256
        self.installed.append(name)

    def remove_model(self, name: str) -> None:
        self.installed.remove(name)


class Steps:
    """The night's commands, which leave what the real ones do."""

    def __init__(self, server: Server, verdict: str = "pass", result: str = "promoted") -> None:
        self.server, self.verdict, self.result, self.ran = server, verdict, result, list[str]()

    def __call__(self, command: Sequence[str]) -> None:
        words = [*command[2:4], *command[command.index("--to") + 1 :]] if "--to" in command else command[2:4]
        self.ran.append(" ".join(words))
        if "--to" in command:
            self.server.stable = command[-1]
            return
        directory = Path(command[command.index("--cycle") + 1])
        match command[3]:
            case "finetune":
                train = directory / "dataset" / "train.jsonl"
                files = {"train.jsonl": cycle.sha256(train)}
                cycle.write_json(directory / "adapter" / "finetune.json", {"inputs": {"files": files}})
            case "quantize":
                cycle.write_json(directory / "quantize.json", {"type": "Q8_0"})
            case "evaluate":
                cycle.write_json(directory / "evaluation" / "summary.json", {})
            case "register":
                cycle.write_json(directory / "registry.json", {})
            case "gate":
                assert command[-2:] == ["--rules", str(unlearn.RULES)] or command[-1] == str(unlearn.RULES)
                judged(directory, self.verdict)
            case "rollout":
                cycle.write_json(directory / "rollout.json", {"result": self.result})
                if self.result == "promoted":
                    self.server.stable = NAME + directory.name


def judged(directory: Path, verdict: str = "pass") -> None:
    candidate = {"model_version": NAME + directory.name, "sha256": "c" * 64}
    champion = {"model_version": NAME + "base", "sha256": "b" * 64}
    record = {
        "verdict": verdict,
        "reason": "because",
        "candidate": candidate,
        "champion": champion,
        "checks": [],
    }
    cycle.write_json(directory / "gate.json", record)


def night(cycles: Path, name: str, train: Sequence[str], *, erased: bool, result: str = "promoted") -> None:
    directory = cycles / name
    (directory / "dataset").mkdir(parents=True)
    for part, ids in (("train", train), ("gate", [GATE])):
        lines = "".join(json.dumps({"inference_id": one}) + "\n" for one in ids)
        (directory / "dataset" / f"{part}.jsonl").write_text(lines)
    cycle.write_json(
        directory / "dataset" / "dataset.json", {"train": len(train), "gate": 1, "cycles": [name]}
    )
    (directory / "model.gguf").write_bytes(name.encode())
    judged(directory)
    cycle.write_json(directory / "rollout.json", {"result": result})
    tombstone = {"id": ERASURE, "ids": {"train": [GONE], "gate": []}, "learned_by": NAME + name}
    cycle.write_json(directory / "manifest.json", {"erasures": [tombstone] if erased else []})
    (directory / "report.html").write_text("the night has ended")


@pytest.fixture
def cycles(tmp_path: Path) -> Path:
    night(tmp_path / "cycles", FIRST, ["row-old"], erased=False)
    night(tmp_path / "cycles", SECOND, ["row-old", KEPT], erased=True)
    (tmp_path / "base.gguf").write_bytes(b"base")
    return tmp_path / "cycles"


@pytest.fixture
def server() -> Server:
    return Server(NAME + SECOND, [NAME + SECOND, NAME + FIRST])


def run(
    cycles: Path, monkeypatch: pytest.MonkeyPatch, steps: Steps, *more: str, erasure: str = ERASURE
) -> tuple[int, dict[str, Any]]:
    place = cycles.parent
    monkeypatch.setattr(unlearn, "commanded", steps)
    monkeypatch.setattr("agentloop.sync_client.Client", lambda *_, **__: steps.server)
    monkeypatch.setattr(register, "withdraw", lambda *_: [])
    monkeypatch.setattr(register, "database", lambda *_: "sqlite://")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    options = ["--cycles", str(cycles), "--state-dir", str(place / "var"), "--server", "x", "--json"]
    options += ["--base-gguf", str(place / "base.gguf"), *(["--erasure", erasure] if erasure else [])]
    done = CliRunner().invoke(app, ["unlearn", *options, *more])
    return done.exit_code, json.loads(done.stdout) if done.stdout.startswith("{") else {"said": done.output}


def test_a_version_is_trained_without_the_rows_and_serves_with_evidence(
    cycles: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(server)
    code, found = run(cycles, monkeypatch, steps, "--by", "the officer")
    assert code == 0, found
    done = [f"training {step}" for step in ("finetune", "quantize", "evaluate", "gate", "register")]
    assert steps.ran == [*done, "scripts.rollout rollout"]
    directory = cycles / found["cycle_id"]
    assert (found["complete"], found["serving"]) == (True, NAME + directory.name)
    assert found["datasets_lost"] == {SECOND: {"train": [GONE], "gate": []}}
    assert found["withdrawn"] == {NAME + SECOND: "removed from the server"}
    assert server.installed == [NAME + FIRST]
    assert found["trained_on_that_dataset"] and found["datasets_that_still_have_them"] == {}
    assert cycle.read_json(directory / "unlearn.json") == found
    page = (directory / "unlearn.html").read_text()
    assert "no version that learned from it serves" in page and GONE in page and "the officer" in page
    dataset = cycle.read_json(directory / "dataset" / "dataset.json")
    assert (dataset["train"], dataset["new_train"], dataset["enough"]) == (2, 0, True)
    assert next(iter(Night(directory).steps)).name == "finetune"
    assert "complete" in unlearn.told(found)
    text = (directory / report.PAGE).read_text()
    assert "never learned what was erased serves now" in text and 'href="unlearn.html"' in text


def test_a_version_that_was_withdrawn_is_no_yardstick_for_later_nights(
    cycles: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = Version(NAME + SECOND, cycle.sha256(cycles / SECOND / "model.gguf"))
    first = Version(NAME + FIRST, cycle.sha256(cycles / FIRST / "model.gguf"))
    monkeypatch.setattr("training.best_ever.ranked", lambda *_: [second, first])
    place = subjects.Place(cycles.parent, cycles, cycles.parent / "base.gguf")
    champion = subjects.version(NAME + "base", place)

    def best() -> str:
        return subjects.best(cycles / "20260301T020000Z", place, "gate", champion).model_version

    assert best() == NAME + SECOND
    run(cycles, monkeypatch, Steps(server))
    assert unlearn.withdrawn(cycles) == {NAME + SECOND}
    assert best() == NAME + FIRST


@pytest.mark.parametrize(("verdict", "result"), [("inconclusive", ""), ("fail", ""), ("pass", "rolled_back")])
def test_what_is_not_shown_to_be_as_good_gives_way_to_the_last_that_never_learned(
    cycles: Path, server: Server, monkeypatch: pytest.MonkeyPatch, verdict: str, result: str
) -> None:
    steps = Steps(server, verdict, result)
    code, found = run(cycles, monkeypatch, steps)
    assert (code, found["serving"], found["complete"]) == (0, NAME + FIRST, True)
    assert steps.ran[-1] == f"scripts.rollout rollback {NAME + FIRST}"
    assert NAME + FIRST in server.installed and NAME + SECOND not in server.installed


def test_where_every_version_learned_the_untouched_base_is_put_back(
    cycles: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cycles / FIRST / "model.gguf").unlink()
    _, found = run(cycles, monkeypatch, Steps(server, "fail"))
    assert found["serving"] == NAME + "base" == server.stable


def test_on_hold_the_version_serves_on_and_that_is_not_complete(
    cycles: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, found = run(cycles, monkeypatch, Steps(server, "fail"), "--otherwise", "hold")
    assert (code, found["serving"], found["complete"], found["withdrawn"]) == (3, "", False, {})
    assert server.stable == NAME + SECOND
    assert "on hold" in unlearn.told(found)


def test_another_version_that_serves_meanwhile_is_left_alone(
    cycles: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.stable = NAME + FIRST
    steps = Steps(server, "fail")
    _, found = run(cycles, monkeypatch, steps)
    assert found["serving"] == NAME + FIRST and "scripts.rollout" not in steps.ran[-1]


def test_a_step_that_fails_ends_it_and_the_next_call_goes_on_in_the_same_cycle(
    cycles: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Steps):
        def __call__(self, command: Sequence[str]) -> None:
            if command[3] == "evaluate":
                raise unlearn.StepFailedError("evaluate ended with 1")
            super().__call__(command)

    code, said = run(cycles, monkeypatch, Broken(server))
    assert code == 1 and "evaluate ended with 1" in said["said"]
    begun = sorted(path.name for path in cycles.iterdir())
    code, found = run(cycles, monkeypatch, Steps(server))
    assert code == 0 and sorted(path.name for path in cycles.iterdir()) == begun
    assert found["cycle_id"] == begun[-1]


def test_rows_that_are_still_in_the_dataset_stop_it(
    cycles: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (cycles / SECOND / "dataset" / "train.jsonl").open("a") as file:
        file.write(json.dumps({"inference_id": GONE}) + "\n")
    steps = Steps(server)
    code, said = run(cycles, monkeypatch, steps)
    assert code == 1 and "still has 1 erased rows" in said["said"] and steps.ran == []


def test_where_nothing_is_left_to_train_on_an_older_version_is_put_back(
    cycles: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cycles / SECOND / "dataset" / "train.jsonl").write_text("")
    steps = Steps(server)
    code, found = run(cycles, monkeypatch, steps)
    assert (code, found["verdict"], found["serving"]) == (0, "nothing_left", NAME + FIRST)
    assert steps.ran == [f"scripts.rollout rollback {NAME + FIRST}"]


def test_an_alias_that_still_leads_to_a_version_or_a_server_away_is_told(server: Server) -> None:
    found = unlearn.withdraw([NAME + SECOND, NAME + "other", "of x, without a verdict"], server)  # type: ignore[arg-type]
    assert list(found.values()) == [
        "still served: default leads to it",
        "was not on the server",
        "had no verdict, and so never served",
    ]
    server.away = True
    assert "not removed" in unlearn.withdraw([NAME + SECOND], server)[NAME + SECOND]  # type: ignore[arg-type]


def test_one_inference_is_forgotten_as_a_caller_is(
    cycles: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def erased(*words: str) -> str:
        asked.append(words)
        return ERASURE

    monkeypatch.setattr(unlearn, "erased", erased)
    code, found = run(cycles, monkeypatch, Steps(server), "--inference", ERASURE.upper(), erasure="")
    assert (code, found["complete"]) == (0, True), found
    assert asked == [("inference", ERASURE, "")]
    assert run(cycles, monkeypatch, Steps(server), "--inference", "no id", erasure="")[0] == 2
    assert run(cycles, monkeypatch, Steps(server), "--inference", ERASURE)[0] == 2


def test_the_steps_are_told_what_the_command_was_told(tmp_path: Path) -> None:
    place = subjects.Place(
        tmp_path / "var", tmp_path / "cycles", tmp_path / "b.gguf", server="host:1", token_file=Path("t")
    )
    told = unlearn.settings(place, "", "postgresql://db")
    assert told == {
        "AGENTLOOP_CYCLES_DIR": str(tmp_path / "cycles"),
        "AGENTLOOP_STATE_DIR": str(tmp_path / "var"),
        "AGENTLOOP_BASE_GGUF": str(tmp_path / "b.gguf"),
        "AGENTLOOP_MODEL_NAME": "gemma-3-270m",
        "AGENTLOOP_ALIAS": "default",
        "AGENTLOOP_SERVER": "host:1",
        "AGENTLOOP_TOKEN_FILE": str(Path("t").absolute()),
        "AGENTLOOP_DATABASE_URL": "postgresql://db",
    }


def test_of_two_unlearnings_the_second_is_told_who_is_at_work(
    cycles: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(server)
    with alone(cycles):
        code, said = run(cycles, monkeypatch, steps)
    assert code == 1 and f"an unlearning, process {os.getpid()} on " in said["said"]
    assert steps.ran == []
    assert run(cycles, monkeypatch, steps)[0] == 0, "what ended holds nothing"


def test_while_something_is_unlearned_a_night_does_not_learn_but_the_unlearnings_own_steps_run(
    cycles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    night = cycles / "20260201T020000Z"
    with alone(cycles):
        with cycle.step(night, "finetune"):
            pass
        with monkeypatch.context() as elsewhere:
            elsewhere.delenv("AGENTLOOP_UNLEARNING")  # as in the processes of a night
            busy = pytest.raises(BusyError, match=r"an unlearning, process \d+ on .* is at work; wait for it")
            with busy, cycle.step(night, "curate"):
                raise AssertionError("it began")
    assert "AGENTLOOP_UNLEARNING" not in os.environ
    assert cycle.read_json(night / "steps" / "finetune.json")["outcome"] == "done"
    assert not (night / "steps" / "curate.json").exists()
    with cycle.step(night, "curate"):
        pass


def test_beside_a_night_that_has_not_ended_nothing_is_unlearned(
    cycles: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, night = Steps(server), cycles / "20260201T020000Z"
    with cycle.step(night, "finetune"):
        code, said = run(cycles, monkeypatch, steps)
    assert code == 1 and "finetune of 20260201T020000Z is running" in said["said"]
    code, said = run(cycles, monkeypatch, steps)
    assert code == 1 and "the night 20260201T020000Z has not ended" in said["said"]
    assert f"python -m training report --cycle {night}" in said["said"]
    assert steps.ran == [] and not list(cycles.glob("*/unlearn.json"))
    (night / "report.html").write_text("over")
    assert run(cycles, monkeypatch, steps)[0] == 0


def test_what_no_model_learned_needs_no_training(
    cycles: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unlearn, "erased", lambda *_: "another")
    steps = Steps(server)
    assert run(cycles, monkeypatch, steps, "--caller", "bank", erasure="") == (
        0,
        {"erasure": "another", "learned_by": []},
    )
    assert steps.ran == []
    code, said = run(cycles, monkeypatch, steps, erasure="unknown")
    assert code == 1 and "has a tombstone of erasure unknown" in said["said"]
    assert run(cycles, monkeypatch, steps, "--caller", "bank")[0] == 2


def test_the_dataset_of_a_real_curation_keeps_its_record_and_card(tmp_path: Path) -> None:
    source = frozen(tmp_path / FIRST, traffic(0, 60))
    curate.run(source)
    judged(source)
    directory = unlearn.begin(tmp_path, ERASURE, "me")
    before, now = (cycle.read_json(each / "dataset" / "dataset.json") for each in (source, directory))
    assert (now["train"], now["gate"], now["new_train"]) == (before["train"], before["gate"], 0)
    assert now["shares"] == before["shares"] and not any(now["excluded"].values())
    assert f"{now['train']} training examples (0 new)" in (directory / "dataset" / "card.md").read_text()
    assert unlearn.begin(tmp_path, ERASURE, "me") == directory


def test_no_judged_dataset_is_an_error_and_leaves_no_cycle(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no judged cycle"):
        unlearn.begin(tmp_path, ERASURE, "me")
    assert list(tmp_path.iterdir()) == []


def test_commands_run_in_the_checkout_and_their_failure_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unlearn.commanded([sys.executable, "-c", "pass"])
    with pytest.raises(unlearn.StepFailedError, match="ended with 3"):
        unlearn.commanded([sys.executable, "-c", "raise SystemExit(3)"])
    asked: list[list[str]] = []

    def ran(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, int("no" in command), '{"erasure": "e-1"}')

    monkeypatch.setattr(subprocess, "run", ran)
    assert unlearn.erased("session", "s1", "me") == "e-1"
    assert asked[0][1:] == ["-m", "grpc_server", "erase", "--session", "s1", "--json", "--by", "me"]
    with pytest.raises(unlearn.StepFailedError, match="erasure was not finished"):
        unlearn.erased("caller", "no", "")


def test_the_rules_ask_for_no_gain() -> None:
    rules = read_rules(unlearn.RULES)
    assert {check.rule for check in rules.checks} == {"not_inferior", "length_share"}
