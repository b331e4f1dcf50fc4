"""`agent-loop chat`: a conversation, as the answers are written."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from agentloop.cli_options import AliasOption, TemperatureOption, VersionOption
from agentloop.cli_session import printable, session
from agentloop.errors import InvalidArgument, PermissionDenied, RpcError, Unauthenticated
from agentloop.sync_client import Client
from agentloop.types import Completed, Message, Sampling, Started, TextDelta

HELP = """/reset          begin anew
/system TEXT    instructions for what follows; without a text: none
/history        what was said so far
/help           these lines
/quit           leave, as Ctrl-D does
Ctrl-C          stop the answer that is being written"""


@dataclass(slots=True)
class Conversation:
    """What was said, and how to go on. An answer that was stopped counts as far as it came."""

    client: Client
    console: Console
    alias: str
    model_version: str
    sampling: Sampling
    timeout_s: float
    system: str = ""
    turns: list[Message] = field(default_factory=list)
    session_id: str = field(default_factory=lambda: str(uuid.uuid4()))

    def ask(self, text: str) -> None:
        """Send one turn and show its answer; Ctrl-C stops it. Raises RpcError, and forgets the turn then."""
        answer: list[str] = []
        opening = [Message("system", self.system)] if self.system else []
        asked = Message("user", text)
        events = self.client.chat(
            [*opening, *self.turns, asked],
            sampling=self.sampling,
            alias=self.alias,
            model_version=self.model_version,
            session_id=self.session_id,
            timeout_s=self.timeout_s,
        )
        inference = ""
        try:
            with closing(events):
                for event in events:
                    match event:
                        case Started():
                            inference = f"{event.inference_id} by {event.model_version}"
                        case TextDelta():
                            answer.append(event.text)
                            self._say(event.text)
                        case Completed():
                            self._note(f"{inference}, {event.output_tokens} tokens, {event.total_ms:.0f} ms")
        except KeyboardInterrupt:
            self._note(f"{inference} stopped")
        if answer:
            self.turns += [asked, Message("assistant", "".join(answer))]

    def obey(self, command: str) -> bool:
        """Do what begins with `/`; False to leave."""
        word, _, rest = command.partition(" ")
        match word:
            case "/quit" | "/exit":
                return False
            case "/reset":
                self.turns.clear()
                self.session_id = str(uuid.uuid4())
                self.note("what was said is forgotten")
            case "/system":
                self.system = rest.strip()
                self.note("these instructions hold from now on" if self.system else "no instructions")
            case "/history":
                for turn in self.turns:
                    self._say(f"{turn.role}: {turn.content}\n")
            case "/help":
                self.note(HELP)
            case _:
                self.note(f"there is no {word}; /help lists what there is")
        return True

    def note(self, text: str) -> None:
        """Something about the conversation, on a line of its own."""
        self.console.print(Text(printable(text, to_terminal=True), style="dim"), soft_wrap=True)

    def _note(self, text: str) -> None:
        self.console.print()
        self.note(text)

    def _say(self, text: str) -> None:
        self.console.print(Text(printable(text, self.console.is_terminal)), end="", soft_wrap=True)


def chat(
    context: typer.Context,
    system: Annotated[str, typer.Option(help="Instructions that come before what is said.")] = "",
    alias: AliasOption = "default",
    model_version: VersionOption = "",
    temperature: TemperatureOption = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of each answer, 1 to 8192.", min=0)] = None,
    timeout: Annotated[float, typer.Option(help="Seconds, of each answer.", min=0.001)] = 300,
) -> None:
    """Talk to the model: a line is a turn, /help lists commands, Ctrl-C stops an answer, Ctrl-D leaves.

    Where standard input is no terminal, each of its lines is a turn, and the first error ends it.
    """
    sampling = Sampling(temperature=temperature, max_tokens=max_tokens)
    with session(context).client() as client:
        talk = Conversation(
            client, Console(highlight=False), alias, model_version, sampling, timeout, system=system
        )
        interactive = sys.stdin.isatty()
        if interactive:
            talk.note("a line is a turn; /help lists commands")
        for line in _typed(talk) if interactive else sys.stdin:
            text = line.strip()
            if text.startswith("/"):
                if not talk.obey(text):
                    return
            elif text:
                _turn(talk, text, interactive)


def _turn(talk: Conversation, text: str, interactive: bool) -> None:
    """One turn; a person may go on after an error that is not about who they are."""
    try:
        talk.ask(text)
    except (Unauthenticated, PermissionDenied):
        raise
    except RpcError as error:
        if not interactive:
            raise
        remedy = "\n/reset begins anew" if isinstance(error, InvalidArgument) and talk.turns else ""
        talk.note(f"{error}{remedy}")


def _typed(talk: Conversation) -> Iterator[str]:
    """Each line that is typed, until Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401 - arrow keys; where there is none, input() does without

    while True:
        try:
            line = input("> ")
        except EOFError:
            talk.console.print()
            return
        except KeyboardInterrupt:
            talk.console.print()
            talk.note("Ctrl-D leaves")
            continue
        yield line
