"""What operators are told to type works as it is printed, from the checkout's root."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from agentloop import Client, cli
from agentloop.night import Night
from grpc_server import __main__ as grpc_server
from grpc_server import erase_cli, events_cli, gpus_cli, log_cli, tokens_cli
from tests.coverage_files import untraced
from tests.integration import night_by_hand
from tests.integration.rollout_bench import CANDIDATE, CHAMPION, GGUF, World, stable, world
from tests.live_server import ROOT, LiveServer
from training import __main__ as training
from training import cycle
from training.verdict import verdict
from validation import __main__ as validation

BIN = Path(sys.executable).parent
PROGRAMS = ("make", "python", "agent-loop", "airflow", "ansible-playbook", "ansible-doc", "source")
PLACEHOLDERS = {
    "<cycle id>": night_by_hand.CYCLE,
    "<model version>": CHAMPION,
    "<inference id>": "0197f2a0-0000-7000-8000-000000000000",
    "<key id>": "0123456789ab",
    "al_…": "al_x",
}
APPS = {"grpc_server": grpc_server.app, "training": training.app, "validation": validation.app}
# What reads a night's files, or makes a model anew: no server answers it.
OF_NIGHTS = re.compile(r"agent-loop (cycles|lineage|replay|unlearn)\b")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`([^`]+)`")
_SETTING = re.compile(r"[A-Z_]+=")
_THEN = re.compile(r", (then )?")  # between a command and the next subcommand of the same program


def shown(text: str) -> list[str]:
    """The commands in a Markdown text, in order: lines of its bash blocks, and spans of code."""
    blocks = [found[2] for found in _FENCE.finditer(text) if found[1] == "bash"]
    lines = [re.sub(r"\s+# .*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line] + list(_spans(_FENCE.sub("", text)))


def _spans(text: str) -> Iterator[str]:
    last, end = "", 0
    for found in _SPAN.finditer(text):
        span = " ".join(found[1].split())
        if re.fullmatch("[a-z]+", span) and last and _THEN.fullmatch(text[end : found.start()]):
            span = re.sub(r"(python -m \w+) \w+", rf"\1 {span}", last)
        words = [word for word in span.split() if not _SETTING.match(word)]
        last, end = span, found.end()
        if len(words) > 1 and words[0].removeprefix(".venv/bin/") in PROGRAMS:
            yield span
        else:
            last = ""


def readmes() -> list[str]:
    texts = [ROOT / "README.md", ROOT / "infra" / "ansible" / "README.md"]
    return [command for text in texts for command in shown(text.read_text(encoding="utf-8"))]


def dag_pages() -> list[str]:
    """What the DAGs' own pages and those of their tasks show."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "dags").glob("*.py")]
    texts = [str(node.value) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [command for text in texts if "**What to do" in text for command in shown(text)]


def runbooks() -> list[str]:
    """What those are told to type whom an alert leads there."""
    texts = sorted((ROOT / "docs" / "runbooks").glob("*.md"))
    return [command for text in texts for command in shown(text.read_text(encoding="utf-8"))]


def reports(folder: Path) -> list[str]:
    """The command on the morning's page, for each end of a night that has one."""
    ends: list[dict[str, str]] = [{"until": step} for step in night_by_hand.STEPS]
    found = []
    for number, end in enumerate([*ends, {"rolled": "not_started"}]):
        directory = night_by_hand.make(folder / f"end {number} & its night", **end)
        found.append(verdict(Night(directory)).command)
    return [command for command in found if command]


def filled(command: str, **values: str) -> str:
    """`command` with the reader's own values for what stands in angle brackets."""
    for placeholder, value in PLACEHOLDERS.items():
        command = command.replace(placeholder, values.get(placeholder[1:-1].replace(" ", "_"), value))
    return command


def outside() -> dict[str, str]:
    """The environment, without what pytest's own make and the operator's shell put there."""
    names = ("AGENTLOOP", "ANSIBLE", "MAKE", "MFLAGS", "CYCLE", "TO", "ARGS")
    return {name: value for name, value in untraced().items() if not name.startswith(names)}


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=outside() | environment, capture_output=True, text=True, timeout=240
    )


def typed(line: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """`line` in a shell in the checkout's root, with this environment's programs for those of .venv."""
    line = line.replace(".venv/bin/", f"{BIN}/")
    line = re.sub(r"^make ", f"make --assume-old=install BIN={shlex.quote(str(BIN))} ", line)
    path = f"{BIN}:{os.environ['PATH']}"
    return run("bash", "-euo", "pipefail", "-c", line, **environment, PATH=path)


def reads(app: typer.Typer, arguments: list[str]) -> None:
    """Fails unless the program takes these arguments; what they ask for is not done."""
    command: Any = get_command(app)
    branches = [command]
    while branches:
        each = branches.pop()
        if hasattr(each, "commands"):
            branches += each.commands.values()
        else:
            each.callback = lambda **_: None
    command.main(arguments, prog_name="program", standalone_mode=False)


def understood(command: str, folder: Path) -> None:
    """Fails unless `command` is one that its program takes."""
    words = shlex.split(filled(command).partition(" | ")[0], comments=True)
    settings = {}
    while _SETTING.match(words[0]):
        name, value = words.pop(0).split("=", 1)
        settings[name] = value
    program, *arguments = words
    done = None
    match program.removeprefix(".venv/bin/"), arguments:
        case "make", _:
            done = run("make", "--dry-run", "--assume-old=install", *arguments, **settings)
        case "python", ["-m", "grpc_server", "tokens", *rest]:
            reads(tokens_cli.app, rest)
        case "python", ["-m", "grpc_server", "events", *rest]:
            reads(events_cli.app, rest)
        case "python", ["-m", "grpc_server", "erase", *rest]:
            reads(erase_cli.app, rest)
        case "python", ["-m", "grpc_server", "log", *rest]:
            reads(log_cli.app, rest)
        case "python", ["-m", "grpc_server", "gpu-monitor", *rest]:
            reads(gpus_cli.app, rest)
        case "python", ["-m", module, *rest]:
            reads(APPS[module], rest)
        case "agent-loop", _:
            reads(cli.app, arguments)
        case "airflow", _:
            program = "import sys; from airflow.cli import cli_parser as cli"
            program += "; cli.get_parser().parse_args(sys.argv[1:])"
            done = run(sys.executable, "-c", program, *arguments, AIRFLOW_HOME=str(folder))
        case "ansible-playbook", _:
            done = run(BIN / "ansible-playbook", "--syntax-check", *arguments, **settings)
        case "ansible-doc", _:
            done = run(BIN / "ansible-doc", *arguments, **settings)
        case "source", [script]:
            assert (BIN / Path(script).name).is_file()
        case "export" | "unset", names:
            assert all(name.startswith("AGENTLOOP_") for name in names)
        case _:
            raise AssertionError(f"nobody knows how to check: {command}")
    assert done is None or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


@pytest.mark.slow
def test_every_command_that_is_shown_is_one_that_its_program_takes(tmp_path: Path) -> None:
    pages = {
        "README": readmes(),
        "DAG": dag_pages(),
        "report": reports(tmp_path),
        "runbooks": runbooks(),
    }
    for line in ("make demo", "make dag", "make rollout CYCLE=<cycle id>", "agent-loop route get"):
        assert line in pages["README"]
    assert "make rollback CYCLE=<cycle id>" in pages["DAG"]
    steps = {" ".join(command.split()[:4]) for command in pages["README"]}
    assert steps >= {f"python -m training {step}" for step in ("curate", "finetune", "gate", "report")}
    assert len(pages["report"]) >= 6
    for command in dict.fromkeys(command for page in pages.values() for command in page):
        understood(command, tmp_path)


def test_a_command_that_does_not_work_as_printed_is_found(tmp_path: Path) -> None:
    for broken in ("agent-loop route get default", "python -m training finetune --cycel DIR"):
        with pytest.raises(Exception, match=r"unexpected extra argument|No such option"):
            understood(broken, tmp_path)
    for broken in ("make roll-out CYCLE=<cycle id>", "ansible-playbook infra/ansible/playbooks/rollout.yml"):
        with pytest.raises(AssertionError, match=r"No rule to make target|was not found"):
            understood(broken, tmp_path)


def test_a_night_tells_from_its_files_what_its_readers_are_told_to_ask(tmp_path: Path) -> None:
    cycles = night_by_hand.make(tmp_path / "cycles & more").parent
    asked = [command for command in readmes() if re.match(r"agent-loop (cycles|lineage <model)", command)]
    assert len(asked) == 4
    for command in asked:
        line = filled(
            command, cycle_id=night_by_hand.CYCLE, model_version=f"gemma-3-270m:{night_by_hand.CYCLE}"
        )
        done = typed(line, {"AGENTLOOP_CYCLES_DIR": str(cycles)})
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert night_by_hand.CYCLE in done.stdout


@pytest.mark.slow
def test_a_server_answers_what_its_operators_are_told_to_ask(
    live_server: LiveServer, base_gguf: Path, tmp_path: Path
) -> None:
    commands = list(dict.fromkeys([*readmes(), *dag_pages(), *reports(tmp_path)]))
    token_file = tmp_path / "night.token"
    environment = {
        name: value for name, value in live_server.environment.items() if name.startswith("AGENTLOOP_")
    }
    environment |= {"AGENTLOOP_SERVER": live_server.grpc_address, "AGENTLOOP_HTTP": live_server.http_address}
    created = next(command for command in commands if "--name night" in command)
    done = typed(created.replace("var/night.token", shlex.quote(str(token_file))), environment)
    assert done.returncode == 0, done.stderr
    assert token_file.stat().st_mode & 0o777 == 0o600
    token = token_file.read_text().strip()
    assert re.fullmatch(r"al_\S+", token), "the token, and nothing else"

    environment |= {"AGENTLOOP_TOKEN_FILE": str(token_file)}
    inference_id = ""
    asked = [command for command in commands if re.match(r"(\.venv/bin/)?agent-loop ", command)]
    asked = [command for command in asked if not OF_NIGHTS.search(command)]
    assert len(asked) >= 5
    with Client(live_server.grpc_address, token) as client:
        client.install_model(CHAMPION, base_gguf, hashlib.sha256(base_gguf.read_bytes()).hexdigest())
    for command in asked:
        done = typed(filled(command, inference_id=inference_id), environment)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        inference_id = "".join(re.findall(r"^inference (\S+) by", done.stderr)) or inference_id
    with Client(live_server.grpc_address, token) as client:
        client.remove_model(CHAMPION)
    kept = [command for command in commands if "python -m grpc_server" in command and command != created]
    kept.sort(key=lambda command: "revoke" in command)
    assert len(kept) >= 4
    for command in kept:
        done = typed(filled(command, key_id=token[3:15]), environment)
        assert done.returncode == 0, f"{command}: {done.stderr}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_make_rolls_a_candidate_out_and_every_rollback_that_is_shown_puts_the_champion_back(
    tmp_path: Path,
) -> None:
    with world(tmp_path / "tést & $dir") as here:
        directory = night_by_hand.make(here.folder / "cycles")
        (directory / "model.gguf").write_bytes(GGUF)
        gate = cycle.read_json(here.cycle_dir / "gate.json")
        subjects = {name: gate[name] for name in ("candidate", "champion")}
        cycle.write_json(directory / "gate.json", cycle.read_json(directory / "gate.json") | subjects)
        (directory / "rollout.json").unlink()
        kept = ("AGENTLOOP", "ANSIBLE_HOME", "MARKS")
        ours = {name: value for name, value in here.environment().items() if name.startswith(kept)}
        ours |= {"AGENTLOOP_CYCLES_DIR": str(directory.parent), "AGENTLOOP_CYCLE_DIR": "/none"}

        checked = typed(filled("make rollout CYCLE=<cycle id> ARGS='--check --diff'"), ours)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        assert here.targets == [(CHAMPION, "stable", 100)]
        out = typed(filled("make rollout CYCLE=<cycle id>"), ours)
        assert out.returncode == 0, out.stdout + out.stderr
        assert here.targets == [(CANDIDATE, "stable", 100)], out.stdout
        told = verdict(Night(directory)).command
        assert told.startswith("make rollback CYCLE=")
        every = dict.fromkeys([told, *readmes(), *dag_pages()])
        backs = [command for command in every if command.startswith("make rollback ")]
        backs = [command for command in backs if "CODE=" not in command]  # which is of hosts
        assert len(backs) >= 3
        for command in backs:
            back = typed(filled(command), ours)
            assert back.returncode == 0, back.stdout + back.stderr
            assert here.targets == [(CHAMPION, "stable", 100)], f"{command}\n{back.stdout}"
            here.set_route(stable(CANDIDATE))
        assert here.marks == [f"mark {CANDIDATE}"] + [f"mark {CHAMPION} --or-none"] * len(backs)
        _refused(here, ours)


def _refused(here: World, ours: dict[str, str]) -> None:
    """What is missing is named, and nothing is changed."""
    named = {"AGENTLOOP_TOKEN_FILE": str(here.folder / "no.token")}
    bare = {name: value for name, value in ours.items() if name != "AGENTLOOP_TOKEN"}
    for line, environment, said in (
        ("make rollout CYCLE=<cycle id>", bare, "no token for the live server: set AGENTLOOP_TOKEN_FILE"),
        ("make rollout CYCLE=<cycle id>", bare | named, "there is no such file"),
        ("make rollout", ours, "make rollout CYCLE=<cycle id>"),
        ("make rollback", ours, "make rollback CYCLE=<cycle id>"),
        ("make rollback CYCLE=20200101T000000Z", ours, "there is no cycle in"),
    ):
        done = typed(filled(line), environment)
        assert done.returncode != 0
        assert said in done.stderr
    assert here.targets == [(CANDIDATE, "stable", 100)]
