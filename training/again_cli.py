"""`python -m training reproduce` and `replay`: what was made, or answered, once, made or answered again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from training.cli_session import (
    AsJson,
    BaseGguf,
    Cycle,
    Engine,
    ModelName,
    StateDir,
    Suites,
    base_of,
    end,
    explained,
    progress,
    say,
)

app = typer.Typer()


@app.command()
def reproduce(
    cycle: Annotated[Path, typer.Argument(help="The cycle's folder.")],
    dataset_only: Annotated[
        bool, typer.Option("--dataset-only", help="Train nothing: compare the dataset alone.")
    ] = False,
    state_dir: StateDir = Path("var"),
    base_gguf: BaseGguf = None,
    suites: Suites = None,
    as_json: AsJson = False,
) -> None:
    """Make a cycle's dataset and adapter again, in a scratch folder, and compare them by SHA-256.

    Exit codes: 0 the same, 1 failed, 3 not the same, 4 cannot be made again; what differs is named.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in finetune
    from training import reproduce as step
    from training.suites import CONFIG

    base = base_of(base_gguf, state_dir)
    with explained(), progress("training") as on_progress:
        found = step.run(
            cycle,
            base,
            state_dir,
            suites_file=suites or CONFIG,
            dataset_only=dataset_only,
            progress=on_progress,
        )
    say(found, as_json, step.told(found))
    if code := step.exit_code(found):
        end("not the same" if code == step.DIFFERS else "cannot be made again", code)


@app.command()
def replay(
    cycle: Cycle,
    model: Annotated[str, typer.Option(help="The model version that is asked: `<model>:<cycle id>`.")],
    limit: Annotated[int, typer.Option(min=1, help="Requests asked at most, drawn by a hash.")] = 1000,
    state_dir: StateDir = Path("var"),
    base_gguf: BaseGguf = None,
    model_name: ModelName = "gemma-3-270m",
    engine: Engine = "embedded",
    as_json: AsJson = False,
) -> None:
    """Ask a model version the requests of a cycle's snapshot, and compare with the answers then.

    Through a server of its own; nothing enters the log. `agent-loop replay` runs this.
    """
    from training import replay as step
    from training.subjects import Place

    place = Place(
        state_dir=state_dir.absolute(),
        cycles_dir=cycle.absolute().parent,
        base_gguf=base_of(base_gguf, state_dir).absolute(),
        model_name=model_name,
        engine=engine,
    )
    with explained(), progress("asking") as on_progress:
        found = step.run(cycle, place, model, limit=limit, progress=on_progress)
    say(found, as_json, step.told(found))
