"""`agent-loop logs` and `show`: one's own inferences, read back from the log."""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, cast

import typer

from agentloop.cli_session import JsonOption, print_json, printable, session
from agentloop.errors import NotFound
from agentloop.log_types import Inference, InferenceStatus
from agentloop.sync_client import Client

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_STEP_SECONDS = 1.0
_LATE = timedelta(seconds=60)
"""A server's rows reach the log a little late: what is as old as this is looked for again."""
_REMEMBERED = 10_000
"""Inferences that `--follow` has shown, so that none comes twice."""
_WAITED_FOR = 100
"""Running ones whose end it looks for, the newest."""


def logs(
    context: typer.Context,
    since: Annotated[str, typer.Option(help="From then on: 15m, 2h, 7d, or 2026-01-30T12:00:00Z.")] = "",
    until: Annotated[str, typer.Option(help="Before then, in the same forms.")] = "",
    session_id: Annotated[str, typer.Option("--session", help="Of this conversation.")] = "",
    model_version: Annotated[str, typer.Option(help="Answered by this model version.")] = "",
    status: Annotated[str, typer.Option(help="started, ok, cancelled, deadline, error or aborted.")] = "",
    caller: Annotated[str, typer.Option(help="Of this caller; needs the scope admin.")] = "",
    limit: Annotated[int, typer.Option(help="At most so many, the newest; 0: all.", min=0)] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they end, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each as a line of JSON.")] = False,
) -> None:
    """List your inferences, the newest first; with --follow the oldest first, and each when it has ended."""
    wanted: dict[str, Any] = {
        "since": _moment(since, "--since"),
        "until": _moment(until, "--until"),
        "session_id": session_id,
        "model_version": model_version,
        "status": cast("InferenceStatus | None", status or None),
        "caller": caller,
    }
    with session(context).client(as_json=as_json) as client:
        if follow:
            _print(_followed(client, wanted, limit), as_json)
        else:
            _print(itertools.islice(client.inferences(**wanted), limit or None), as_json)


def show(
    context: typer.Context,
    inference_id: Annotated[str, typer.Argument(help="The inference.")],
    as_json: JsonOption = False,
) -> None:
    """Show an inference of yours: request, answer, feedback."""
    with session(context).client(as_json=as_json) as client:
        found = client.get_inference(inference_id)
    if as_json:
        print_json(_plain(found))
        return
    terminal = sys.stdout.isatty()
    for name, value in _plain(found).items():
        if value not in (None, "", [], {}):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2)
            typer.echo(f"{name}: {printable(text, terminal)}")


def _followed(client: Client, wanted: dict[str, Any], limit: int) -> Iterator[Inference]:
    """What there is, the oldest first, then what ends, for ever. Of one that runs its end is waited for."""
    found = list(itertools.islice(client.inferences(**wanted), limit or None))[::-1]
    begin = found[0].inference_id if found else ""
    newest = found[-1].started_at if found else datetime.now(UTC)
    shown: dict[str, None] = {}
    running: dict[str, None] = {}
    while True:
        for each in itertools.chain(found, _ended_since(client, list(running))):
            if each.inference_id in shown or each.inference_id < begin:
                continue
            if each.status == "started":
                running[each.inference_id] = None
                continue
            running.pop(each.inference_id, None)
            shown[each.inference_id] = None
            yield each
        for known, most in ((shown, _REMEMBERED), (running, _WAITED_FOR)):
            while len(known) > most:
                del known[next(iter(known))]
        time.sleep(_STEP_SECONDS)
        since = newest - _LATE
        if wanted["since"] is not None:
            since = max(since, wanted["since"])
        found = list(client.inferences(**{**wanted, "since": since}))[::-1]
        newest = max([newest, *(each.started_at for each in found)])


def _ended_since(client: Client, running: Iterable[str]) -> list[Inference]:
    """Those that ran when they were last seen, as they are now."""
    found = []
    for inference_id in running:
        try:
            found.append(client.get_inference(inference_id))
        except NotFound:  # its month has been dropped
            continue
    return found


def _print(inferences: Iterable[Inference], as_json: bool) -> None:
    terminal = sys.stdout.isatty()
    for each in inferences:
        if as_json:
            print_json(_plain(each))
            continue
        line = (
            f"{each.started_at:%Y-%m-%d %H:%M:%S} {each.inference_id} {each.status or '?':<9} {each.caller}"
            f" {each.model_version} {each.input_tokens}+{each.output_tokens} tokens {each.total_ms:.0f} ms"
        )
        typer.echo(printable(f"{line} {each.error}".rstrip(), terminal))


def _plain(found: Inference) -> dict[str, Any]:
    """JSON's form of a row; texts only where they were asked for."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(found), default=_iso))
    if found.request is None and found.answer is None:
        plain = {
            name: value for name, value in plain.items() if name not in ("request", "answer", "feedback")
        }
    return plain


def _iso(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else dict(value)


def _moment(text: str, option: str) -> datetime | None:
    """`15m` ago, or a moment; without a zone it is this machine's."""
    if not text:
        return None
    if match := re.fullmatch(r"(\d{1,6})([smhd])", text):
        return datetime.now(UTC) - timedelta(**{_UNITS[match[2]]: int(match[1])})
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(
            f"{text!r} is no time; write 15m, 2h, 7d or 2026-01-30T12:00:00Z", param_hint=option
        ) from error
