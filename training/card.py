"""The dataset's card: every number of dataset.json in words, in the form of a Hugging Face dataset's README.

(https://huggingface.co/docs/hub/datasets-cards: YAML between `---`, then Markdown.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from training import cycle

CARD = "card.md"
_TEMPLATE = "card.md.j2"
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def write(folder: Path) -> None:
    """Write `<folder>/card.md` from `<folder>/dataset.json`."""
    with cycle.new_file(folder / CARD) as building:
        building.write_text(text(cycle.read_json(folder / "dataset.json")), encoding="utf-8")


def text(record: Mapping[str, Any]) -> str:
    """The card of a dataset, from its record."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # noqa: S701 - Markdown; names that callers chose go through `cell`
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _cell
    examples = record["train"] + record["gate"]
    return environment.get_template(_TEMPLATE).render(
        data=record,
        name=record["cycles"][-1],
        size=next((name for most, name in _SIZES if examples < most), "n>1M"),
        licence_name="-".join(sorted(record["licences"])) or "not-declared",
    )


def _cell(name: str) -> str:
    """A name that a caller chose, as one cell of a table that renders as text."""
    kept = "".join(letter if letter.isalnum() or letter in " .-_:/()" else "?" for letter in name)
    return f"`{kept[:100]}`"
