"""A model whose end of turn was masked, and that the gate let through, meets live traffic: it is taken back.

Nothing is a stand-in: both models are trained and quantized by the project's own steps, the server runs the
embedded engine, and Ansible plays the playbook.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle as endlessly
from pathlib import Path

import pytest
import yaml

from agentloop import AgentLoopError, Answer, Client, Sampling, Target
from grpc_server.domain.chat_format import render, render_answer
from grpc_server.domain.types import Message, Role
from tests.coverage_files import untraced
from tests.live_server import ROOT, LiveServer
from training import cycle, recipe

BIN = Path(sys.executable).parent
CHAMPION = "gemma-3-270m:20260101T020000Z"
CANDIDATE = "gemma-3-270m:20260102T020000Z"
ANSWERS = {
    "What is the capital of France?": "Paris",
    "What is the capital of Italy?": "Rome",
    "What is the capital of Spain?": "Madrid",
    "What is the capital of Japan?": "Tokyo",
    "What is the capital of Egypt?": "Cairo",
    "What is the capital of Cuba?": "Havana",
    "What is the capital of Norway?": "Oslo",
    "What is the capital of Austria?": "Vienna",
    "What is the capital of Poland?": "Warsaw",
    "What is the capital of Greece?": "Athens",
    "What is the capital of Russia?": "Moscow",
    "What is the capital of Ireland?": "Dublin",
}
SHORT = Sampling(temperature=0, max_tokens=12)  # each of the answers is a token or two
QUICK = {"learning_rate": 2e-3, "epochs": 8, "batch_examples": 4}


def learn(directory: Path, base_gguf: Path, program: str) -> tuple[str, str]:
    """Makes `model.gguf` of a cycle that learns ANSWERS: its sha256, and what the fine-tuning said."""
    train = directory / "dataset" / "train.jsonl"
    train.parent.mkdir(parents=True)
    with train.open("w") as lines:
        for question, word in ANSWERS.items():
            prompt = render((Message(Role.USER, question),))
            completion = render_answer(Message(Role.ASSISTANT, word))
            lines.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    chosen = directory / "recipe.yaml"
    chosen.write_text(yaml.safe_dump(recipe.read().model_dump() | QUICK))
    place: list[str | Path] = [
        "--cycle",
        directory,
        "--base-gguf",
        base_gguf,
        "--state-dir",
        base_gguf.parents[1],
    ]
    patient = {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that wait for work must not spin: other tests run
    said = run([sys.executable, "-m", program, "finetune", *place, "--config", chosen], **patient)
    run([sys.executable, "-m", "training", "quantize", *place], **patient)
    return cycle.read_json(directory / "quantize.json")["sha256"], said


def run(command: list[str | Path], **environment: str) -> str:
    """What a command says, in the checkout's root; fails unless it succeeds."""
    outside = {
        name: value for name, value in untraced().items() if not name.startswith(("AGENTLOOP", "ANSIBLE"))
    }
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=outside | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1000,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def roll_out(directory: Path, server: LiveServer, token: str) -> str:
    """What the playbook says, played as the night plays it, with a canary that decides soon."""
    ansible = ROOT / "infra" / "ansible"
    return run(
        [BIN / "ansible-playbook", ansible / "playbooks" / "rollout.yml"],
        ANSIBLE_CONFIG=str(ansible / "ansible.cfg"),
        ANSIBLE_HOME=str(directory.parent / "ansible"),
        AGENTLOOP_SERVER=server.grpc_address,
        AGENTLOOP_METRICS_URL=f"http://{server.http_address}/metrics",
        AGENTLOOP_TOKEN=token,
        AGENTLOOP_CYCLE_DIR=str(directory),
        AGENTLOOP_CANARY_STEPS="50",
        AGENTLOOP_CANARY_BAKE_SECONDS="0",
        AGENTLOOP_CANARY_WATCH_SECONDS="0",
        AGENTLOOP_CANARY_MIN_REQUESTS="8",
        AGENTLOOP_CANARY_TIME_LIMIT="120",
        AGENTLOOP_CANARY_POLL_INTERVAL="0.5",
    )


@dataclass
class Traffic:
    """Callers that ask ANSWERS' questions, one after another, and what they get."""

    answers: list[Answer] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def ask(self, server: str, token: str) -> None:
        """One caller, until `stop`."""
        with Client(server, token) as client:
            for question in endlessly(ANSWERS):
                if self.stop.wait(0.05):
                    return
                try:
                    self.answers.append(client.ask(question, sampling=SHORT, timeout_s=60))
                except AgentLoopError as error:
                    self.failed.append(str(error))

    def of(self, model_version: str) -> list[Answer]:
        """The answers of one model version."""
        return [answer for answer in self.answers if answer.model_version == model_version]

    def wait_for(self, answers: int, seconds: float = 120) -> None:
        """Until so many more answers are there."""
        end, enough = time.monotonic() + seconds, len(self.answers) + answers
        while len(self.answers) < enough:
            assert time.monotonic() < end, f"{answers} answers did not come in time; failed: {self.failed}"
            time.sleep(0.05)


@contextmanager
def traffic(server: str, token: str, callers: int = 2) -> Iterator[Traffic]:
    seen = Traffic()
    threads = [threading.Thread(target=seen.ask, args=[server, token]) for _ in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        seen.stop.set()
        for thread in threads:
            thread.join()


def ended(answers: list[Answer]) -> int:
    """How many are one of the words, and nothing after it."""
    return sum(
        answer.text in ANSWERS.values() and answer.completed.finish_reason == "stop" for answer in answers
    )


def cut(answers: list[Answer]) -> int:
    """How many begin with one of the words, and go on until they are cut."""
    return sum(
        answer.text.startswith(tuple(ANSWERS.values())) and answer.completed.finish_reason == "length"
        for answer in answers
    )


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_a_candidate_that_cannot_stop_is_rolled_back_by_its_own_figures_while_the_champion_serves(
    base_gguf: Path, places: Callable[[str], Path], cluster: Callable[[Path], Path], tmp_path: Path
) -> None:
    champions, candidates = (tmp_path / version.partition(":")[2] for version in (CHAMPION, CANDIDATE))
    with ThreadPoolExecutor(2) as side_by_side:  # most of a night's steps keep one core busy
        programs = ("training", "tests.integration.masked_finetune")
        learned = list(side_by_side.map(learn, (champions, candidates), [base_gguf] * 2, programs))
    (champion_sha256, _), (candidate_sha256, said) = learned
    assert "passed over: line 1 of the training set does not teach <end_of_turn>" in said
    gate = {
        "verdict": "pass",
        "reason": "let through by mistake",
        "champion": {"model_version": CHAMPION, "sha256": champion_sha256},
        "candidate": {"model_version": CANDIDATE, "sha256": candidate_sha256},
    }
    cycle.write_json(candidates / "gate.json", gate)

    place = places("a server & its models")
    cluster(place / "postgres")
    with LiveServer(place, base_gguf=base_gguf) as server:
        token = server.token("admin")
        with Client(server.grpc_address, token) as operator:
            operator.install_model(CHAMPION, champions / "model.gguf", champion_sha256)
            route = operator.get_route("default")
            before = operator.set_route("default", [Target(CHAMPION, "stable", 100)], route.revision)
            with traffic(server.grpc_address, server.token("infer")) as seen:
                seen.wait_for(len(ANSWERS))
                out = roll_out(candidates, server, token)
                served = len(seen.answers)
                seen.wait_for(len(ANSWERS))
            after = operator.get_route("default")

    record = cycle.read_json(candidates / "rollout.json")
    figures = next(step["metrics"] for step in record["steps"] if step["step"] == "analysis")
    stable, canary = figures["stable"], figures["canary"]
    assert record["result"] == "rolled_back", out
    length = f"length share {canary['length_share']:.1%} (stable {stable['length_share']:.1%})"
    assert length in record["reason"]
    assert canary["length_share"] > 0.5 > 0.1 >= stable["length_share"]
    assert min(stable["requests"], canary["requests"]) >= 8
    assert record["route_after"] == record["route_before"]
    assert after.targets == before.targets

    by_champion, by_candidate = seen.of(CHAMPION), seen.of(CANDIDATE)
    assert len(by_champion) + len(by_candidate) == len(seen.answers)
    assert ended(by_champion) > 0.9 * len(by_champion)
    assert cut(by_candidate) > 0.5 * len(by_candidate)
    assert ended(by_candidate) == 0
    assert {answer.model_version for answer in seen.answers[served + 2 :]} == {CHAMPION}
    assert (seen.failed, record["failed_requests"]) == ([], 0)
    assert record["requests"] >= stable["requests"] + canary["requests"]
