"""`agent-loop chat`: a person at a terminal, and a script at a pipe."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner, Result

from agentloop.cli import app
from agentloop.v1 import inference_pb2
from tests.integration.conftest_client import ScriptedService, completed, running, started, text

BIN = Path(sys.executable).parent / "agent-loop"


@pytest.fixture
def service() -> Iterator[ScriptedService]:
    with running(ScriptedService()) as made:
        yield made


def piped(service: ScriptedService, lines: str, *options: str) -> Result:
    arguments = ["--server", service.address, "--token", "al_x", "chat", *options]
    return CliRunner().invoke(app, arguments, input=lines)


def asked(service: ScriptedService) -> list[inference_pb2.ChatRequest]:
    return [each for each in service.asked if isinstance(each, inference_pb2.ChatRequest)]


def said(request: inference_pb2.ChatRequest) -> list[str]:
    return [turn.content for turn in request.messages]


def test_each_line_of_a_pipe_is_a_turn_that_knows_those_before(service: ScriptedService) -> None:
    service.chats = [[started(), text("one"), completed()], [started(), text("two"), completed()]]
    result = piped(service, "first\n\n  second  \n", "--system", "Be brief.", "--alias", "agent")
    assert result.exit_code == 0
    assert "one" in result.stdout
    requests = asked(service)
    assert said(requests[0]) == ["Be brief.", "first"]
    assert said(requests[1]) == ["Be brief.", "first", "one", "second"]
    assert requests[0].session_id == requests[1].session_id != ""
    assert requests[0].alias == "agent"


def test_commands_change_the_conversation_and_are_not_sent(service: ScriptedService) -> None:
    lines = "a\n/history\n/reset\nb\n/system Rhyme.\nc\n/system\nd\n/help\n/nothing\n/quit\nnever\n"
    result = piped(service, lines)
    assert result.exit_code == 0
    requests = asked(service)
    assert [said(request) for request in requests] == [
        ["a"],
        ["b"],
        ["Rhyme.", "b", "ok", "c"],
        ["b", "ok", "c", "ok", "d"],
    ]
    assert requests[0].session_id != requests[1].session_id
    assert "user: a\nassistant: ok\n" in result.stdout
    assert "there is no /nothing" in result.stdout


def test_an_error_ends_a_script_with_its_exit_code(service: ScriptedService) -> None:
    for code, exit_code in ((grpc.StatusCode.NOT_FOUND, 4), (grpc.StatusCode.INTERNAL, 1)):
        service.chats = [[code]]
        result = piped(service, "first\nsecond\n")
        assert result.exit_code == exit_code
        assert code.name in result.stderr
    assert len(asked(service)) == 2


class Terminal:
    """A person who types, and sees what is shown."""

    def __init__(self, service: ScriptedService) -> None:
        self.master, slave = pty.openpty()
        settings = termios.tcgetattr(slave)
        settings[3] |= termios.ISIG
        termios.tcsetattr(slave, termios.TCSANOW, settings)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AGENTLOOP_")}
        environment |= {"TERM": "dumb", "AGENTLOOP_TOKEN": "al_x", "COLUMNS": "200"}
        # A person's shell hears Ctrl-C; what a shell started in the background, as tests may be, ignores it.
        command = f"exec env --default-signal=INT setsid --ctty '{BIN}' --server {service.address} chat"
        self.process = subprocess.Popen(
            ["bash", "-c", command], stdin=slave, stdout=slave, stderr=slave, env=environment
        )
        os.close(slave)
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def see(self, pattern: str, seconds: float = 30) -> None:
        """Wait until it is shown; what came before it is done with."""
        until = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < until, f"{pattern!r} is not in {self.shown!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                with suppress(OSError):  # the other end is closed
                    self.shown += os.read(self.master, 65536).decode(errors="replace")
        self.shown = self.shown[found.end() :]

    def insist(self, keys: str, pattern: str) -> None:
        """Type until it is shown: what comes between a prompt and the wait for keys, readline may not see."""
        for _ in range(15):
            self.type(keys)
            with suppress(AssertionError):
                return self.see(pattern, 2)
        return self.see(pattern, 0)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(service: ScriptedService) -> Iterator[Terminal]:
    made = Terminal(service)
    yield made
    made.close()


def test_ctrl_c_stops_an_answer_and_not_the_program(service: ScriptedService, terminal: Terminal) -> None:
    service.chats = [
        [started(), text("so \x1b[31mfar"), threading.Event(), completed()],
        [grpc.StatusCode.INVALID_ARGUMENT],
        [started("i-3"), text("all of it"), completed()],
        [grpc.StatusCode.PERMISSION_DENIED],
    ]
    terminal.see("> ")
    terminal.type("first\n")
    terminal.see("so \N{REPLACEMENT CHARACTER}\\[31mfar")
    terminal.insist("\x03", "i-1 by m:1 stopped")
    assert service.cancelled.wait(10)
    terminal.see("> ")
    terminal.type("second\n")
    terminal.see("INVALID_ARGUMENT: as scripted\\s+/reset begins anew")
    terminal.type("third\n")
    terminal.see("all of it\\s+i-3 by m:1, 2 tokens, 30 ms")
    assert said(asked(service)[2]) == ["first", "so \x1b[31mfar", "third"]
    terminal.see("> ")
    terminal.insist("\x03", "Ctrl-D leaves")
    terminal.type("fourth\n")
    terminal.see("PERMISSION_DENIED")
    assert terminal.process.wait(10) == 1


def test_ctrl_d_leaves(terminal: Terminal) -> None:
    terminal.see("> ")
    terminal.type("\x04")
    assert terminal.process.wait(10) == 0
