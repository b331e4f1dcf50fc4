"""`agent-loop generate`, `count-tokens`, `embed` and `cancel`: what else can be asked of a model."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from agentloop.cli_events import json_file, print_events, read_tools
from agentloop.cli_options import (
    AliasOption,
    EventsOption,
    MaxTokensOption,
    SessionOption,
    StopOption,
    SystemOption,
    TemperatureOption,
    TimeoutOption,
    TopKOption,
    TopPOption,
    VersionOption,
)
from agentloop.cli_session import JsonOption, print_json, session
from agentloop.types import Message, Sampling

PromptArgument = Annotated[str, typer.Argument(help="The text; `-`, or nothing: standard input.")]


def generate(
    context: typer.Context,
    prompt: PromptArgument = "-",
    schema: Annotated[Path | None, typer.Option(help="JSON Schema that the text is held to.")] = None,
    alias: AliasOption = "default",
    model_version: VersionOption = "",
    session_id: SessionOption = "",
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    max_tokens: MaxTokensOption = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text, at temperature 0.", min=0)] = None,
    stop: StopOption = None,
    timeout: TimeoutOption = 300,
    as_json: EventsOption = False,
) -> None:
    """Go on from a raw prompt, without turns or tools."""
    form = json_file(schema, dict) if schema else None
    with session(context).client(as_json=as_json) as client:
        events = client.generate(
            _text(prompt),
            sampling=Sampling(temperature, top_p, top_k, max_tokens, seed, tuple(stop or ())),
            json_schema=form,
            alias=alias,
            model_version=model_version,
            session_id=session_id,
            timeout_s=timeout,
        )
        print_events(events, as_json)


def count_tokens(
    context: typer.Context,
    prompt: PromptArgument = "-",
    raw: Annotated[bool, typer.Option("--raw", help="A raw prompt, and not what a user says.")] = False,
    system: SystemOption = "",
    tools: Annotated[Path | None, typer.Option(help="JSON list of tools that are offered.")] = None,
    alias: AliasOption = "default",
    model_version: VersionOption = "",
    as_json: JsonOption = False,
) -> None:
    """Say how many tokens `infer`, or `generate`, would read."""
    text = _text(prompt)
    with session(context).client(as_json=as_json) as client:
        if raw:
            counted = client.count_prompt_tokens(text, alias=alias, model_version=model_version)
        else:
            messages = [Message("system", system)] if system else []
            messages.append(Message("user", text))
            offered = read_tools(tools) if tools else ()
            counted = client.count_tokens(messages, tools=offered, alias=alias, model_version=model_version)
    if as_json:
        print_json(asdict(counted))
    else:
        typer.echo(counted.input_tokens)


def embed(
    context: typer.Context,
    texts: Annotated[
        list[str] | None, typer.Argument(help="The texts; none: each line of standard input.")
    ] = None,
    alias: AliasOption = "default",
    model_version: VersionOption = "",
    timeout: TimeoutOption = 60,
) -> None:
    """Turn texts into vectors; prints one JSON object, the vectors in the order of the texts."""
    given = texts or [line for line in sys.stdin.read().splitlines() if line]
    with session(context).client(as_json=True) as client:
        made = client.embed(given, alias=alias, model_version=model_version, timeout_s=timeout)
    print_json(asdict(made))


def cancel(
    context: typer.Context,
    inference_id: Annotated[str, typer.Argument(help="The inference that shall end.")],
    as_json: JsonOption = False,
) -> None:
    """End a running inference of yours, on whichever server it runs."""
    with session(context).client(as_json=as_json) as client:
        client.cancel(inference_id)
    if as_json:
        print_json({"cancelled": inference_id})
    else:
        typer.echo(f"{inference_id} cancelled")


def _text(prompt: str) -> str:
    return sys.stdin.read() if prompt == "-" else prompt
