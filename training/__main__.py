"""`python -m training STEP --cycle DIR`. Exit: 0 done, 1 failed, 2 usage, 99 nothing to do.

Each step imports its libraries when it runs: `--help` and the light steps do not wait for torch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from training import again_cli, datasets_cli, gpu_cli, lease, tracking_cli, unlearn_cli, upkeep_cli
from training.cli_session import (
    Alias,
    AsJson,
    BaseGguf,
    Cycle,
    DatabaseUrl,
    Engine,
    MlflowUri,
    ModelName,
    Recipe,
    Server,
    StateDir,
    Suites,
    Token,
    TokenFile,
    base_of,
    end,
    explained,
    progress,
    say,
)
from training.plan_cli import plan

if TYPE_CHECKING:
    from training.subjects import Place

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)
datasets_cli.add_to(app)
app.add_typer(again_cli.app)
app.add_typer(gpu_cli.app)
app.add_typer(tracking_cli.app)
app.add_typer(unlearn_cli.app)
app.add_typer(upkeep_cli.app)


app.command()(plan)


@app.callback()
def main() -> None:
    """Curate, fine-tune, quantize, evaluate, judge and register: one cycle, step by step."""


@app.command()
def curate(
    cycle: Cycle,
    rules: Annotated[
        Path | None,
        typer.Option(
            envvar="AGENTLOOP_CURATION_RULES",
            help="How much of whom is learned. [default: training/configs/curation.yaml]",
            show_default=False,
        ),
    ] = None,
    suites: Suites = None,
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Make dataset/ of what callers demonstrated and accepted, and of the datasets before."""
    from training import curate as step
    from training import gate_key
    from training.curation_rules import RULES
    from training.cycle import NOTHING_TO_DO
    from training.suites import CONFIG

    with explained(), progress("curating") as on_progress:
        found = step.run(cycle, rules or RULES, suites or CONFIG, on_progress, gate_key.of(state_dir))
    excluded = ", ".join(f"{count} {reason}" for reason, count in found["excluded"].items() if count)
    say(
        found,
        as_json,
        f"{found['train']} training examples ({found['new_train']} new), {found['gate']} gate items"
        f" ({found['new_gate']} new); of {found['rows']} rows excluded: {excluded or 'none'}.",
    )
    if not found["enough"]:
        end(f"Nothing to learn: {found['reason']}.", NOTHING_TO_DO)


@app.command()
def prepare(
    config: Recipe = None,
    state_dir: StateDir = Path("var"),
    base_gguf: BaseGguf = None,
    as_json: AsJson = False,
) -> None:
    """Convert the base for training, and find what this processor computes fastest, before the first night.

    The first fine-tuning does both itself where nobody has: half a minute more of a night.
    """
    from training import base as bases
    from training.compute import compute_dtype
    from training.recipe import DEFAULT, read

    gguf = base_of(base_gguf, state_dir)
    with explained():
        found = {
            "base": str(bases.hugging_face_folder(gguf, state_dir)),
            "compute_dtype": str(compute_dtype(read(config or DEFAULT).compute_dtype, state_dir)),
        }
    say(found, as_json, f"{found['base']}, trained in {found['compute_dtype']}.")


@app.command()
def finetune(
    cycle: Cycle,
    config: Recipe = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            envvar="AGENTLOOP_TRAINING_TOKENS",
            min=1,
            help="Tokens read in all, where the recipe allows more.",
        ),
    ] = None,
    state_dir: StateDir = Path("var"),
    base_gguf: BaseGguf = None,
    as_json: AsJson = False,
) -> None:
    """Train a LoRA adapter on the untouched base; goes on from its last checkpoint after a kill."""
    if gpu_cli.wanted():
        gpu_cli.leased([sys.executable, "-m", "training", *sys.argv[1:]])
    lease.end_when_over()
    # Threads that wait for work must not spin: other processes want the processor. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from training import finetune as step
    from training.recipe import DEFAULT

    base = base_of(base_gguf, state_dir)
    with explained(), progress("training") as on_progress:
        found = step.run(cycle, base, state_dir, config or DEFAULT, on_progress, max_tokens=max_tokens)
    say(
        found,
        as_json,
        f"{found['steps']} steps over {found['examples']} examples: loss {found['loss_first']:.3f} to"
        f" {found['loss_last']:.3f}, {found['tokens_per_s']:.0f} tokens/s, {found['seconds']:.0f} s,"
        f" {found['peak_memory_gb']:.1f} GB.",
    )


@app.command()
def quantize(
    cycle: Cycle,
    config: Annotated[
        Path | None,
        typer.Option(
            envvar="AGENTLOOP_QUANTIZE",
            help="Types and thresholds. [default: training/configs/quantize.yaml]",
            show_default=False,
        ),
    ] = None,
    every_type: Annotated[
        bool, typer.Option("--all", help="Measure every type, to choose by; the choice is the same.")
    ] = False,
    state_dir: StateDir = Path("var"),
    base_gguf: BaseGguf = None,
    as_json: AsJson = False,
) -> None:
    """Merge base and adapter into one GGUF, quantize it, and measure what that cost."""
    from training import quantize as step

    base = base_of(base_gguf, state_dir)
    with explained():
        made = step.run(cycle, base, state_dir, config or step.CONFIG, every_type=every_type)
    lines = []
    for each in made["tried"] if every_type else [made]:
        divergence = each["kl_divergence"]
        cost = "not measured (too little text)" if divergence is None else f"{divergence:.4f} nats a token"
        matrix = " with importance" if each["importance_matrix"] else ""
        lines.append(f"{each['type']}{matrix}, {each['size_bytes'] / 1e6:.0f} MB; KL divergence {cost}.")
    say(made, as_json, "\n".join(lines))


@app.command()
def evaluate(
    cycle: Cycle,
    server: Server = None,
    token: Token = None,
    token_file: TokenFile = None,
    champion: Annotated[
        str | None, typer.Option(help="A model version, instead of asking the live server which one serves.")
    ] = None,
    suites: Suites = None,
    state_dir: StateDir = Path("var"),
    base_gguf: BaseGguf = None,
    model_name: ModelName = "gemma-3-270m",
    engine: Engine = "embedded",
    alias: Alias = "default",
    as_json: AsJson = False,
) -> None:
    """Ask champion and candidate the same questions, through a server of their own."""
    from training import evaluate as step
    from training.subjects import Place
    from training.suites import CONFIG

    place = Place(
        state_dir=state_dir.absolute(),
        cycles_dir=cycle.absolute().parent,
        base_gguf=base_of(base_gguf, state_dir).absolute(),
        model_name=model_name,
        engine=engine,
        server=server,
        token=token,
        token_file=token_file,
        alias=alias,
    )
    with explained(), progress("asking") as on_progress:
        found = step.run(cycle, place, config_file=suites or CONFIG, champion=champion, progress=on_progress)
    lines = [
        f"{suite:15} {subject:17} {each['correct']:4} of {each['n']:4} right: {each['accuracy']:.3f}"
        f" ({each['ci_low']:.3f} to {each['ci_high']:.3f}), cut {each['length_share']:.0%}"
        for suite, subjects in found.items()
        for subject, each in subjects.items()
    ]
    say(found, as_json, "\n".join(lines))


@app.command()
def gate(
    cycle: Cycle,
    rules: Annotated[
        Path | None,
        typer.Option(
            envvar="AGENTLOOP_GATE_RULES",
            help="The rules. [default: training/configs/gate.yaml]",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Decide from the paired answers: pass, fail or inconclusive. Any of the three is success."""
    from training import gate as step
    from training.gate_rules import RULES

    with explained():
        decided = step.run(cycle, rules or RULES)
    say(decided, as_json, f"{decided['verdict']}: {decided['reason']}")


@app.command()
def register(
    cycle: Cycle,
    mlflow_uri: MlflowUri = "",
    database_url: DatabaseUrl = "",
    wandb: Annotated[
        Literal["", "offline", "online"],
        typer.Option(
            envvar="AGENTLOOP_WANDB",
            help="Write the cycle for Weights & Biases too: offline, into the state folder; online, as its"
            " own settings say.",
        ),
    ] = "",
    server: Server = None,
    token: Token = None,
    token_file: TokenFile = None,
    state_dir: StateDir = Path("var"),
    model_name: ModelName = "gemma-3-270m",
    alias: Alias = "default",
    as_json: AsJson = False,
) -> None:
    """Write the cycle to the MLflow registry, whatever the verdict; mark what serves, and one that passed."""
    from training import register as step
    from training.subjects import Place

    with explained():
        uri = step.database(mlflow_uri, database_url, state_dir)
        place = Place(
            state_dir=state_dir.absolute(),
            cycles_dir=cycle.absolute().parent,
            base_gguf=base_of(None, state_dir).absolute(),
            model_name=model_name,
            server=server,
            token=token,
            token_file=token_file,
            alias=alias,
        )
        found = step.run(cycle, uri, model_name, _serving(place))
        if wandb:
            from training import wandb_run

            try:
                wandb_run.log(cycle, state_dir / "wandb", wandb)
            except RuntimeError as error:  # nothing depends on it
                typer.echo(f"Not written for Weights & Biases: {error}", err=True)
    say(found, as_json, f"{found['model_version']} is version {found['version']} of {model_name}.")


@app.command()
def report(cycle: Cycle) -> None:
    """Write report.html, the page to read in the morning, and manifest.json, the cycle's last file."""
    from training import report as step

    with explained():
        typer.echo(step.run(cycle))


@app.command()
def erase(
    cycles: Annotated[Path, typer.Option(envvar="AGENTLOOP_CYCLES_DIR", help="The folder of all cycles.")],
    erasure_id: Annotated[str, typer.Option(help="The erasure's id, which its tombstones have.")],
    by: Annotated[str, typer.Option(help="Who asked for it.")],
    caller: Annotated[str, typer.Option(help="Whose words go.")] = "",
    session: Annotated[str, typer.Option(help="The session whose words go.")] = "",
    inference: Annotated[str, typer.Option(help="The inference that goes.")] = "",
    ids: Annotated[
        Path | None,
        typer.Option(
            help="Ids of inferences that teach what must go, one a line.", exists=True, dir_okay=False
        ),
    ] = None,
    state_dir: StateDir = Path("var"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; tell what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take what a caller, a session or one inference said out of every cycle.

    `python -m grpc_server erase` runs this.
    """
    from training import asking, replay
    from training import erase as step

    with explained():
        erasure = step.Erasure(erasure_id, step.Subject(caller, session, inference), by)
        known = ids.read_text(encoding="ascii").split() if ids else ()
        found = step.run(cycles, erasure, known, dry_run=dry_run)
        if not dry_run and any("evaluated" in one["counts"] for one in found["cycles"]):
            asking.forget(state_dir)
        if not dry_run and found["cycles"]:
            replay.forget(state_dir)
    say(found, as_json, step.told(found, dry_run=dry_run))


def _serving(place: Place) -> str:
    """The model version that the route names; empty, which is told, if the live server does not say."""
    import asyncio

    from agentloop.errors import AgentLoopError
    from training import subjects

    try:
        return asyncio.run(subjects.serving(place))[0]
    except (AgentLoopError, OSError, ValueError) as error:
        typer.echo(
            f"The champion's mark stays where it is: the live server does not tell what serves ({error}).",
            err=True,
        )
        return ""


if __name__ == "__main__":
    app()
