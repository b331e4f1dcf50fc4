"""What the commands of `python -m training` share: options, progress, what is printed, how a failure ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_console = Console(stderr=True)
_SPOKEN_SECONDS = 10.0

Cycle = Annotated[
    Path, typer.Option("--cycle", help="The cycle's folder, named by its id: YYYYMMDDTHHMMSSZ.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the record as JSON.")]
StateDir = Annotated[Path, typer.Option(envvar="AGENTLOOP_STATE_DIR", help="The server's state folder.")]
ModelName = Annotated[str, typer.Option(envvar="AGENTLOOP_MODEL_NAME", help="The model that is served.")]
BaseGguf = Annotated[
    Path | None,
    typer.Option(
        envvar="AGENTLOOP_BASE_GGUF",
        help="The untouched model: a GGUF, or a folder of safetensors."
        " [default: <state-dir>/models/gemma-3-270m-q4_k_m.gguf]",
        show_default=False,
    ),
]
Engine = Annotated[
    Literal["embedded", "ollama"], typer.Option(envvar="AGENTLOOP_ENGINE", help="What generates.")
]
Recipe = Annotated[
    Path | None,
    typer.Option(
        envvar="AGENTLOOP_RECIPE",
        help="The recipe. [default: training/configs/gemma3-270m.yaml]",
        show_default=False,
    ),
]

Server = Annotated[
    str | None, typer.Option(envvar="AGENTLOOP_SERVER", help="The live server, which knows the champion.")
]
Alias = Annotated[str, typer.Option(envvar="AGENTLOOP_ALIAS", help="The alias that leads to the champion.")]
Token = Annotated[str | None, typer.Option(envvar="AGENTLOOP_TOKEN", help="Scope models:read.")]
TokenFile = Annotated[
    Path | None, typer.Option(envvar="AGENTLOOP_TOKEN_FILE", help="A file that holds the token.")
]

Suites = Annotated[
    Path | None,
    typer.Option(
        envvar="AGENTLOOP_SUITES",
        help="What the gate asks. [default: training/configs/suites.yaml]",
        show_default=False,
    ),
]
MlflowUri = Annotated[
    str,
    typer.Option(
        envvar="AGENTLOOP_MLFLOW_URI",
        help="MLflow's database. [default: mlflow, beside the service's own]",
        show_default=False,
    ),
]
DatabaseUrl = Annotated[
    str, typer.Option(envvar="AGENTLOOP_DATABASE_URL", help="The service's own database.")
]


def base_of(given: Path | None, state_dir: Path) -> Path:
    """The base that was given, or the one that the service has."""
    return given or state_dir / "models" / "gemma-3-270m-q4_k_m.gguf"


@contextmanager
def explained() -> Iterator[None]:
    """What can go wrong for reasons outside the program is told in a line, without a traceback."""
    from pydantic import ValidationError

    from agentloop.errors import AgentLoopError

    try:
        yield
    except ValidationError as error:
        end(str(error), 1)
    except (AgentLoopError, OSError, RuntimeError, ValueError) as error:
        end(f"{type(error).__name__}: {error}", 1)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; where that is no terminal, as in Airflow's log, a line now and then."""
    if not _console.is_terminal:
        yield _spoken(what)
        return
    with Progress(
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=_console
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _spoken(what: str) -> Callable[[int, int], None]:
    said = monotonic()

    def say(done: int, total: int) -> None:
        nonlocal said
        if monotonic() - said >= _SPOKEN_SECONDS:
            said = monotonic()
            typer.echo(f"{what}: {done} of {total}", err=True)

    return say


def say(record: Mapping[str, Any], as_json: bool, text: str) -> None:
    """Print a record: as JSON for scripts, or as `text`."""
    typer.echo(json.dumps(record, indent=2, sort_keys=True) if as_json else text)


def end(text: str, code: int) -> NoReturn:
    """End the command with a line on stderr and an exit code."""
    typer.echo(text, err=True)
    raise typer.Exit(code)
