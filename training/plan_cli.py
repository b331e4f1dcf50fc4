"""`python -m training plan`: what fits a GPU, before anything is loaded. Exit: 1 if nothing does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from training.cli_session import AsJson, Recipe

if TYPE_CHECKING:
    from training.plan import Memory, Plan

MARGIN = 0.06
"""Of the whole card: what is lost between blocks of PyTorch's allocator, and what kernels take inside."""
_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*")


def size(text: str) -> int:
    """Bytes, written like 24GiB, 5.8 GB or 1073741824.

    Raises:
        typer.BadParameter: if it is no such size.
    """
    found = _SIZE.fullmatch(text)
    if found is None or found[2].upper() not in _UNITS:
        raise typer.BadParameter(f"{text!r} is no size; write it like 24GiB or 5.8GB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def plan(
    config: Recipe = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(help="The GPU's memory, like 24GiB. [default: as the GPU says]", show_default=False),
    ] = None,
    in_use: Annotated[
        str | None,
        typer.Option(help="What other processes hold of it. [default: as the GPU says]", show_default=False),
    ] = None,
    margin: Annotated[float, typer.Option(min=0, max=0.5, help="Share of the GPU that stays free.")] = MARGIN,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Examples a step, instead of the recipe's.")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="GPUs like this one that train together, a process each.")
    ] = 1,
    model_folder: Annotated[
        Path | None, typer.Option(help="A folder with a config.json, instead of the recipe's model.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a training takes, by part, and which microbatch, checkpointing and length fit."""
    try:
        made = _made(config, gpu_memory, in_use, margin, batch, processes, model_folder)
    except (OSError, ValueError) as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(made.as_dict(), indent=2, sort_keys=True))
    else:
        _show(made)
    raise typer.Exit(0 if made.cut else 1)


def _made(
    config: Path | None,
    gpu_memory: str | None,
    in_use: str | None,
    margin: float,
    batch: int | None,
    processes: int,
    model_folder: Path | None,
) -> Plan:
    from training import plan as planner
    from training import recipe
    from training.adapted import caps_attention

    options = recipe.read(config or recipe.DEFAULT)
    if batch is not None:
        options = options.model_copy(update={"batch_examples": batch})
    memory = _memory(gpu_memory, in_use, margin)
    shape = planner.shape(options.model, model_folder)
    attention = options.attention
    if attention == "auto":
        attention = "eager" if caps_attention(shape) else "sdpa"
    with _watched() as said:
        return planner.make(shape, options, memory, attention, said, processes=processes)


def _memory(gpu_memory: str | None, in_use: str | None, margin: float) -> Memory:
    """The memory that was said, or that the first GPU says it has.

    Raises:
        ValueError: if nothing was said and there is no GPU.
    """
    import torch

    from training.plan import Memory

    held = size(in_use) if in_use is not None else 0
    if gpu_memory is not None:
        total = size(gpu_memory)
    elif torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        held = held if in_use is not None else total - free
    else:
        raise ValueError("there is no GPU here to ask; give --gpu-memory, like 24GiB")
    return Memory(total, held, int(total * margin))


@contextmanager
def _watched() -> Iterator[Callable[[str], None]]:
    """What is being tried, while it is, on a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("loading") as status:
        yield lambda what: status.update(f"reckoning {what}")


def _show(made: Plan) -> None:
    console = Console()
    memory, need = made.memory, made.need
    table = Table(
        title=f"{made.model}: {'one step, at its peak' if made.cut else 'the least that a step takes'}"
    )
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for part, taken in need.parts.items():
        table.add_row(part, _gib(taken))
    table.add_section()
    table.add_row("a step", _gib(need.total))
    table.add_row("free for it", _gib(memory.free))
    table.add_row(
        f"of {_gib(memory.total)}, less {_gib(memory.in_use)} in use, {_gib(memory.runtime)} of CUDA,"
        f" {_gib(memory.margin)} of margin",
        "",
    )
    console.print(table)
    console.print(_tried(made))
    console.print(_conclusion(made))
    for line in made.advice:
        console.print(f"- {line}")


def _tried(made: Plan) -> Table:
    table = Table(title="tried")
    for name in ("microbatch", "tokens each", "checkpointing", "GiB", "fits"):
        table.add_column(name, justify="right" if name != "fits" else "left")
    for cut, taken, fits in made.tried:
        table.add_row(
            str(cut.microbatch_examples),
            str(cut.max_length),
            "on" if cut.gradient_checkpointing else "off",
            _gib(taken),
            "yes" if fits else "no",
        )
    return table


def _conclusion(made: Plan) -> str:
    from training.plan import settings

    if made.cut is None:
        return f"Nothing fits {made.batch_examples} examples a step:"
    said: dict[str, Any] = settings(made.cut)
    options = "\n".join(f"  {name}: {str(value).lower()}" for name, value in said.items())
    each = f" in each of {made.processes} processes" if made.processes > 1 else ""
    return (
        f"Fits: {made.cut.microbatch_examples} at a time, {made.accumulation} times a step{each}"
        f" ({made.batch_examples} examples, as before). In the recipe:\n{options}"
    )


def _gib(taken: int) -> str:
    return f"{taken / 2**30:.2f}"
