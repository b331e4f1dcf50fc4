"""Which formats there are, and which of them a record is of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from training.datasets import (
    bfcl_items,
    browsergym,
    openai_chat,
    sharegpt,
    toolbench,
    webarena,
    webarena_traces,
)
from training.datasets.shown import Format, Read, Record, Shown


def _each(shown: Callable[[Record], Iterable[Shown | str]]) -> Callable[[Path], Read]:
    """A reader that needs nothing but the record."""
    return lambda _: shown


FORMATS: Mapping[str, Format] = {
    each.name: each
    for each in (
        # Special ones first: an AgentInstruct or ToolBench record is a ShareGPT one, too.
        Format("toolbench", toolbench.PAGE, toolbench.recognises, _each(toolbench.shown)),
        Format(
            "agentinstruct",
            sharegpt.AGENTINSTRUCT_PAGE,
            sharegpt.recognises_agentinstruct,
            _each(sharegpt.shown),
        ),
        Format("sharegpt", sharegpt.PAGE, sharegpt.recognises, _each(sharegpt.shown)),
        Format("openai", openai_chat.PAGE, openai_chat.recognises, _each(openai_chat.shown)),
        Format("bfcl", bfcl_items.PAGE, bfcl_items.recognises, bfcl_items.opened),
        Format("browsergym", browsergym.PAGE, browsergym.recognises, _each(browsergym.shown)),
        Format("webarena", webarena.PAGE, webarena.recognises, _each(webarena.shown)),
        Format("webarena-traces", webarena_traces.PAGE, webarena_traces.recognises, webarena_traces.opened),
    )
}


def recognised(record: Record) -> Format | None:
    """The format that a record is of; None if it is of none that is known."""
    return next((each for each in FORMATS.values() if each.recognises(record)), None)


def beside(path: Path) -> list[Path]:
    """The files that are read along with a file: answers, and what came of traces."""
    known = (bfcl_items.answers_of(path), *webarena_traces.logs_of(path))
    return [each for each in known if each.is_file()]
