"""What the commands of `agent-loop` share: the server and token of a call, and how a failure ends."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from agentloop.connection import DEFAULT_SERVER
from agentloop.errors import (
    AgentLoopError,
    ConfigurationError,
    Conflict,
    DeadlineExceeded,
    NotFound,
    RpcError,
    Unauthenticated,
    Unavailable,
)
from agentloop.scrape import ScrapeError
from agentloop.sync_client import Client

FAILED = 1
USAGE = 2
CONFLICT = 3
NOT_FOUND = 4
UNAVAILABLE = 5
EXIT_CODES = """Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the route has moved on (revision conflict),
4 no such alias, model version or cycle, 5 no server, or none in time."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]

# What could move a terminal's cursor or recolour it; newlines and tabs stay.
_TERMINAL_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Session:
    """The options before the command."""

    server: str | None
    token: str | None
    token_file: Path | None
    ca_file: Path | None

    @contextmanager
    def client(self, *, as_json: bool = False) -> Iterator[Client]:
        """A client whose errors end the command with a message on stderr and an exit code."""
        try:
            with Client(self.server, self.token, token_file=self.token_file, ca_file=self.ca_file) as client:
                yield client
        except AgentLoopError as error:
            code, remedy = self._verdict(error)
            if as_json:
                typer.echo(json.dumps({"error": _plain(error)}), err=True)
            else:
                typer.echo(f"{printable(str(error), sys.stderr.isatty())}{remedy}", err=True)
            raise typer.Exit(code) from error

    def _verdict(self, error: AgentLoopError) -> tuple[int, str]:
        match error:
            case ConfigurationError():
                return USAGE, ""
            case Conflict():
                return CONFLICT, "\nRead the route again (`agent-loop route get`) and give its revision."
            case NotFound():
                return NOT_FOUND, ""
            case ScrapeError():
                return UNAVAILABLE, "\nIs the server's HTTP address another? --http names it."
            case Unavailable():
                return UNAVAILABLE, f"\nIs a server running at {self.server or DEFAULT_SERVER}?"
            case DeadlineExceeded():
                return UNAVAILABLE, "\nA longer --timeout may help."
            case Unauthenticated():
                return FAILED, "\nGive a token that is in force with --token-file, or in AGENTLOOP_TOKEN."
            case _:
                return FAILED, ""


def _plain(error: AgentLoopError) -> dict[str, Any]:
    """Status and text, and what else the server said."""
    if not isinstance(error, RpcError):
        return {"status": type(error).__name__, "message": str(error)}
    said = {
        "reason": error.reason,
        "field_violations": [asdict(violation) for violation in error.field_violations],
        "retry_after_s": error.retry_after_s,
        "quota_subject": error.quota_subject,
        "inference_id": error.inference_id,
        "input_tokens": error.input_tokens,
        "output_tokens": error.output_tokens,
    }
    told = {name: value for name, value in said.items() if value not in ("", [], None)}
    return {"status": error.code.name, "message": error.details, **told}


def session(context: typer.Context) -> Session:
    """The options that were given before the command."""
    found = context.find_object(Session)
    assert found is not None  # noqa: S101 (the app's callback sets it)
    return found


def print_json(value: Any) -> None:
    """One line of JSON on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False, sort_keys=True))


def printable(text: str, to_terminal: bool) -> str:
    """`text`; for a terminal without control characters: an answer must not drive the reader's screen."""
    return _TERMINAL_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text) if to_terminal else text
