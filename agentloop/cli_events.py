"""What commands read from files, and how they print the events of a stream."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from agentloop.cli_session import print_json, printable
from agentloop.types import ChatEvent, Completed, Started, TextDelta, Tool, ToolCall


def print_events(events: Iterable[ChatEvent], as_json: bool) -> None:
    """Text as it comes; a tool call as a line of JSON; what is about the answer on stderr."""
    terminal = sys.stdout.isatty()
    inference = ""
    for event in events:
        if as_json:
            print_json(_plain(event))
            continue
        match event:
            case Started():
                inference = f"inference {event.inference_id} by {event.model_version}"
                typer.echo(inference, err=True)
            case TextDelta():
                typer.echo(printable(event.text, terminal), nl=False, color=True)  # as it is
            case ToolCall():
                call = json.dumps(asdict(event), ensure_ascii=False)
                typer.echo(printable(call, terminal), nl=False, color=True)
            case Completed():
                typer.echo()
                typer.echo(
                    f"{event.finish_reason}: {event.input_tokens} tokens read, {event.output_tokens} written,"
                    f" first after {event.ttft_ms:.0f} ms, all after {event.total_ms:.0f} ms",
                    err=True,
                )


def _plain(event: ChatEvent) -> dict[str, Any]:
    names = {Started: "started", TextDelta: "text", ToolCall: "tool_call", Completed: "completed"}
    return {"event": names[type(event)], **asdict(event)}


def read_tools(path: Path) -> list[Tool]:
    """The tools in a file, in the API's form or OpenAI's. Raises typer.BadParameter."""
    tools = []
    for number, entry in enumerate(json_file(path, list)):
        declared = entry.get("function", entry) if isinstance(entry, dict) else None
        if not isinstance(declared, dict) or not isinstance(declared.get("name"), str):
            raise typer.BadParameter(f"tool {number} of {path} has no name", param_hint="--tools")
        parameters = declared.get("parameters") or {"type": "object", "properties": {}}
        tools.append(Tool(declared["name"], declared.get("description", ""), parameters))
    return tools


def json_file(path: Path, kind: type) -> Any:
    """The list or object in a file; `-`: standard input. Raises typer.BadParameter."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        value = json.loads(text)
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise typer.BadParameter(f"{path} is not JSON: {error}") from error
    if not isinstance(value, kind):
        raise typer.BadParameter(f"{path} holds no JSON {'list' if kind is list else 'object'}")
    return value
