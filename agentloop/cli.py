"""`agent-loop`: the service's command line, for callers, operators and scripts."""

from __future__ import annotations

import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer

from agentloop import (
    cli_chat,
    cli_cycles,
    cli_gpu,
    cli_hand_over,
    cli_inference,
    cli_lineage,
    cli_log,
    cli_models,
    cli_route,
    cli_top,
    wire,
)
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
from agentloop.cli_session import EXIT_CODES, FAILED, JsonOption, Session, print_json, session
from agentloop.types import Message, Sampling, ToolCall

app = typer.Typer(
    no_args_is_help=True,
    help="Ask the agent-loop service, tell it what was right, and move its models and routes.",
    epilog=EXIT_CODES,
    pretty_exceptions_show_locals=False,
)
app.add_typer(cli_models.app, name="models")
app.add_typer(cli_route.app, name="route")
app.add_typer(cli_cycles.app, name="cycles")
app.add_typer(cli_gpu.app, name="gpu")
app.command()(cli_chat.chat)
app.command()(cli_top.top)
app.command()(cli_inference.generate)
app.command()(cli_inference.count_tokens)
app.command()(cli_inference.embed)
app.command()(cli_inference.cancel)
app.command()(cli_log.logs)
app.command()(cli_log.show)
app.command()(cli_lineage.lineage)
app.command(context_settings=cli_hand_over.ALL_OPTIONS)(cli_hand_over.replay)
app.command(context_settings=cli_hand_over.ALL_OPTIONS)(cli_hand_over.unlearn)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("agentloop"))
        raise typer.Exit


@app.callback()
def connect(
    context: typer.Context,
    server: Annotated[
        str | None,
        typer.Option(
            envvar="AGENTLOOP_SERVER",
            help="host:port (TLS, unless it is this host), grpc://… (plaintext) or grpcs://….",
        ),
    ] = None,
    token: Annotated[
        str | None, typer.Option(help="The token; better in AGENTLOOP_TOKEN, where `ps` does not show it.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="A file that holds the token [env: AGENTLOOP_TOKEN_FILE].")
    ] = None,
    ca_file: Annotated[
        Path | None, typer.Option(envvar="AGENTLOOP_CA_FILE", help="PEM of the CA that signed the server.")
    ] = None,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options that all commands share."""
    context.obj = Session(server, token, token_file, ca_file)


@app.command()
def infer(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What to ask; `-`, or nothing: standard input.")] = "-",
    system: SystemOption = "",
    tools: Annotated[
        Path | None,
        typer.Option(help="JSON list of tools: name, description, parameters (OpenAI's form too)."),
    ] = None,
    tool_choice: Annotated[
        Literal["auto", "none", "required"], typer.Option(help="Whether a tool is called.")
    ] = "auto",
    schema: Annotated[Path | None, typer.Option(help="JSON Schema that the answer is held to.")] = None,
    alias: AliasOption = "default",
    model_version: VersionOption = "",
    session_id: SessionOption = "",
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    max_tokens: MaxTokensOption = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer, at temperature 0.", min=0)] = None,
    stop: StopOption = None,
    timeout: TimeoutOption = 300,
    as_json: EventsOption = False,
    whole: Annotated[bool, typer.Option("--whole", help="Print the answer as one JSON object.")] = False,
) -> None:
    """Ask, and stream the answer. Standard error names the inference, for `agent-loop feedback`."""
    text = sys.stdin.read() if prompt == "-" else prompt
    messages = [Message("system", system)] if system else []
    messages.append(Message("user", text))
    sampling = Sampling(temperature, top_p, top_k, max_tokens, seed, tuple(stop or ()))
    offered = read_tools(tools) if tools else ()
    form = json_file(schema, dict) if schema else None
    with session(context).client(as_json=as_json or whole) as client:
        events = client.chat(
            messages,
            tools=offered,
            tool_choice=tool_choice,
            sampling=sampling,
            json_schema=form,
            alias=alias,
            model_version=model_version,
            session_id=session_id,
            timeout_s=timeout,
        )
        if whole:
            print_json(asdict(wire.collect(events)))
        else:
            print_events(events, as_json)


@app.command()
def feedback(
    context: typer.Context,
    inference_id: Annotated[str, typer.Argument(help="The inference that is meant.")],
    good: Annotated[bool | None, typer.Option("--good/--bad", help="Whether it was right.")] = None,
    score: Annotated[float | None, typer.Option(help="0 to 1.")] = None,
    comment: Annotated[str | None, typer.Option(help="Free text.")] = None,
    demonstration: Annotated[
        Path | None,
        typer.Option(
            allow_dash=True,
            help="JSON of the right answer: {content}, or {name, arguments} of a call; `-`: standard input.",
        ),
    ] = None,
    feedback_id: Annotated[str, typer.Option("--id", help="UUID that makes a repetition safe.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Say of an answer that it was good or bad, or what it should have been: exactly one of these."""
    with session(context).client(as_json=as_json) as client:
        submitted = client.submit_feedback(
            inference_id,
            boolean=good,
            score=score,
            comment=comment,
            demonstration=_demonstration(demonstration) if demonstration else None,
            feedback_id=feedback_id,
        )
    if as_json:
        print_json({"feedback_id": submitted, "inference_id": inference_id})
    else:
        typer.echo(submitted)


@app.command()
def health(
    context: typer.Context,
    service: Annotated[str, typer.Argument(help="Full name of a gRPC service; none: the whole server.")] = "",
    timeout: TimeoutOption = 5,
    as_json: JsonOption = False,
) -> None:
    """Ask whether the server serves: exit code 0 only if it does. Needs no token."""
    with session(context).client(as_json=as_json) as client:
        status = client.health(service, timeout_s=timeout)
    if as_json:
        print_json({"service": service, "status": status})
    else:
        typer.echo(status)
    if status != "SERVING":
        raise typer.Exit(FAILED)


def _demonstration(path: Path) -> Message:
    value = json_file(path, dict)
    if "name" in value and isinstance(value.get("arguments"), dict):
        return Message("assistant", tool_calls=(ToolCall(value["name"], value["arguments"]),))
    if isinstance(value.get("content"), str):
        return Message("assistant", value["content"])
    raise typer.BadParameter(
        f"{path} holds neither {{content}} nor {{name, arguments}}", param_hint="--demonstration"
    )
