"""`agent-loop lineage`: from an answer to the rows its model learned from, and from a row to its models."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentloop import lineage as trace
from agentloop.cli_cycles import CyclesOption, directory
from agentloop.cli_session import NOT_FOUND, JsonOption, print_json, printable, session
from agentloop.errors import AgentLoopError
from agentloop.sync_client import Client


def lineage(
    context: typer.Context,
    what: Annotated[
        str, typer.Argument(help="An inference id, a model version, or a cycle's id, folder or `last`.")
    ],
    cycles: CyclesOption = Path("cycles"),
    ids: Annotated[bool, typer.Option("--ids", help="The ids of the rows learned from, too.")] = False,
    offset: Annotated[int, typer.Option(help="With --ids: pass over so many.", min=0)] = 0,
    limit: Annotated[int, typer.Option(help="With --ids: at most so many.", min=1)] = 1000,
    as_json: JsonOption = False,
) -> None:
    """Tell what a model version learned from, and which versions learned from a row.

    Reads the cycles' files; a server is asked only which version answered an inference.
    """
    if _is_uuid(what):
        told = _of_inference(context, what, cycles)
        version = told["answered_by"]
        made = trace.made_by(version, cycles) if version else None
        told["model"] = trace.of_cycle(made) if made else None
    elif ":" in what:
        made = trace.made_by(what, cycles)
        if made is None and not what.endswith(":base"):
            typer.echo(
                printable(
                    f"no cycle in {cycles} made {what!r}: give --cycles, or set AGENTLOOP_CYCLES_DIR", True
                ),
                err=True,
            )
            raise typer.Exit(NOT_FOUND)
        told = {"model": trace.of_cycle(made) if made else None, "model_version": what}
    else:
        made = directory(what, cycles)
        told = {"model": trace.of_cycle(made)}
    if ids and made is not None:
        told |= _page(trace.rows(made, "train"), offset, limit)
    if as_json:
        print_json(told)
    else:
        _show(told)


def _of_inference(context: typer.Context, inference_id: str, cycles: Path) -> dict[str, Any]:
    """Which version answered, as far as the server tells, and who has learned from the row."""
    known = trace.of_row(inference_id, cycles)
    told = {"inference_id": inference_id, "learned_by": trace.versions(known), "known_in": known}
    options = session(context)
    try:
        with Client(
            options.server, options.token, token_file=options.token_file, ca_file=options.ca_file
        ) as client:
            return {"answered_by": client.get_inference(inference_id).model_version or None, **told}
    except AgentLoopError as error:
        return {"answered_by": None, "server_says": str(error), **told}


def _page(found: Iterator[str], offset: int, limit: int) -> dict[str, Any]:
    page = list(islice(found, offset, offset + limit + 1))
    more = len(page) > limit
    return {"ids": page[:limit], "next_offset": offset + limit if more else None}


def _show(told: dict[str, Any]) -> None:
    if "inference_id" in told:
        _show_row(told)
    model = told["model"]
    if model is None:
        version = told.get("answered_by") or told.get("model_version")
        if version:
            _say(f"{version} was made by no cycle here: no row is known that it learned from")
    else:
        _show_model(model)
    for each in told.get("ids", ()):
        _say(each)
    if told.get("next_offset"):
        _say(f"more: --offset {told['next_offset']}")


def _show_row(told: dict[str, Any]) -> None:
    if told["answered_by"]:
        _say(f"answered by {told['answered_by']}")
    else:
        _say(f"which version answered is not known: {told.get('server_says', 'the log names none')}")
    _say(f"learned by {', '.join(told['learned_by']) or 'no model version'}")
    if told["known_in"]:
        table = Table("cycle", "the row was", "erased", "learned by", "verdict", "rollout")
        for one in told["known_in"]:
            names = ("cycle_id", "as", "erased_at", "learned_by", "verdict", "result")
            table.add_row(*(Text(printable(str(one[name] or ""), to_terminal=True)) for name in names))
        Console().print(table)


def _show_model(model: dict[str, Any]) -> None:
    counts = model["rows"]
    _say(f"{model['model_version'] or 'no model version'}, of cycle {model['cycle_id']}")
    _say(f"  learned from {counts['train']} rows; {counts['gate']} more are its gate's, never trained on")
    for one in model["new_in"]:
        _say(f"    {one['rows']} new in {one['cycle_id']}")
    for one in model["erased"]:
        _say(f"  erased at {one['at']}: {one['counts']}")
    if model["dataset_as_trained"] is False:
        _say("  its dataset no longer has the bytes that it was trained on")
    _say(f"  verdict {model['verdict'] or 'none'}, rollout {model['result'] or 'none'}")
    for problem in model["problems"]:
        _say(f"  problem: {problem}")


def _say(text: str, *, err: bool = False) -> None:
    typer.echo(printable(text, to_terminal=True), err=err)


def _is_uuid(text: str) -> bool:
    try:
        return str(UUID(text)) == text.lower()
    except ValueError:
        return False
