"""`python -m training unlearn`: erase, train again without those rows, judge, roll out, with evidence."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal
from uuid import UUID

import typer

from training.cli_session import (
    Alias,
    AsJson,
    BaseGguf,
    DatabaseUrl,
    MlflowUri,
    ModelName,
    Server,
    StateDir,
    Token,
    TokenFile,
    base_of,
    end,
    explained,
    say,
)

app = typer.Typer()


@app.command()
def unlearn(
    caller: Annotated[str, typer.Option(help="Erase what this caller said, and forget it.")] = "",
    session: Annotated[str, typer.Option(help="Erase what was said in this session, and forget it.")] = "",
    inference: Annotated[
        UUID | None, typer.Option(help="Erase this one inference with its feedback, and forget it.")
    ] = None,
    erasure: Annotated[
        str, typer.Option(help="Forget what this erasure took: its id. Goes on with what was begun.")
    ] = "",
    by: Annotated[str, typer.Option(help="Who asks for it.")] = "",
    otherwise: Annotated[
        Literal["fall-back", "hold"],
        typer.Option(
            help="If the new version is not shown to be as good: put back the newest that never learned from"
            " the rows, or leave what serves."
        ),
    ] = "fall-back",
    cycles: Annotated[
        Path, typer.Option(envvar="AGENTLOOP_CYCLES_DIR", help="The folder of all cycles.")
    ] = Path("cycles"),
    state_dir: StateDir = Path("var"),
    base_gguf: BaseGguf = None,
    model_name: ModelName = "gemma-3-270m",
    alias: Alias = "default",
    server: Server = None,
    token: Token = None,
    token_file: TokenFile = None,
    mlflow_uri: MlflowUri = "",
    database_url: DatabaseUrl = "",
    as_json: AsJson = False,
) -> None:
    """Erase (or take an erasure), train again without those rows, judge, roll out, withdraw what had learned.

    Needs the live server, with a token of the scope admin. Exit codes: 0 complete, 1 failed (run again with
    --erasure: it goes on), 2 usage, 3 not complete: unlearn.json and unlearn.html of the new cycle say why.
    """
    one = "" if inference is None else str(inference)
    if sum(map(bool, (caller, session, one, erasure))) != 1:
        end("name one of --caller, --session, --inference and --erasure", 2)
    from agentloop.sync_client import Client
    from training import register, report
    from training import unlearn as step
    from training.subjects import Place, address
    from training.unlearn_lock import alone

    place = Place(
        state_dir=state_dir.absolute(),
        cycles_dir=cycles.absolute(),
        base_gguf=base_of(base_gguf, state_dir).absolute(),
        model_name=model_name,
        server=server,
        token=token,
        token_file=token_file,
        alias=alias,
    )
    # The steps are commands, and read what this one was told where options are not: in the environment.
    os.environ.update(step.settings(place, mlflow_uri, database_url))
    with explained(), alone(place.cycles_dir):
        kind = "caller" if caller else "session" if session else "inference"
        asked, erasure = erasure, erasure or step.erased(kind, caller or session or one, by)
        typer.echo(f"erasure {erasure}", err=True)
        gone = step.forgotten(place.cycles_dir, erasure)
        if asked and not gone.ids:
            end(f"no cycle in {cycles} has a tombstone of erasure {asked}: is this the right folder?", 1)
        if not gone.learned_by:
            say({"erasure": erasure, "learned_by": []}, as_json, "no model version has learned from it")
            return
        directory = step.begin(place.cycles_dir, erasure, by)
        verdict = step.retrain(directory, step.commanded)
        with Client(address(place), token, token_file=token_file) as client:
            serving = step.serve(
                directory, verdict, otherwise, client, place.base_gguf, step.commanded, alias
            )
            versions = gone.learned_by.values() if serving else ()
            withdrawn = step.withdraw(versions, client)
        uri = register.database(mlflow_uri, database_url, state_dir)
        register.withdraw(uri, model_name, withdrawn, f"erasure {erasure}")
        found = step.evidence(directory, serving, verdict, withdrawn)
        report.run(directory)
    say(found, as_json, step.told(found))
    if not found["complete"]:
        end("not complete", 3)
