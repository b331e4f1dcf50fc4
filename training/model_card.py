"""A cycle's model card: MODEL_CARD.md, in the form that the Hugging Face Hub reads, of what the records say.

The metadata follow https://github.com/huggingface/hub-docs/blob/main/modelcard.md. Nothing is published: the
card goes with the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import ChainableUndefined, Environment, FileSystemLoader

from agentloop.night import Night
from training import cycle

CARD = "MODEL_CARD.md"


def write(directory: Path) -> Path:
    """Write the card of a cycle that has a verdict; return its path.

    Raises:
        ValueError: if the verdict does not name its candidate.
    """
    path = directory / CARD
    text = render(Night(directory))
    with cycle.new_file(path) as building:
        building.write_text(text, encoding="utf-8")
    return path


def render(night: Night) -> str:
    """The card as text; what the records do not say is a dash or `unknown`.

    Raises:
        ValueError: if the verdict does not name its candidate.
    """
    candidate = night.gate.get("candidate")
    if not isinstance(candidate, Mapping) or "model_version" not in candidate:
        raise ValueError(f"gate.json of {night.cycle_id} does not name its candidate: judge the cycle again")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # noqa: S701 - Markdown, of our own figures
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = _number
    version = str(candidate["model_version"])
    inputs = night.finetune.get("inputs") or {}
    energy = night.notes["finetune"].get("gpu_energy_joules")
    return environment.get_template(f"{CARD.lower()}.j2").render(
        metadata=yaml.safe_dump(metadata(night, version), sort_keys=False, allow_unicode=True),
        night=night,
        version=version,
        base=version.rpartition(":")[0],
        candidate=candidate,
        files=inputs.get("files") or {},
        cycles=", ".join(map(str, night.dataset.get("cycles") or ())) or "unknown",
        config=list(_flat(night.finetune.get("config") or {})),
        versions=sorted((night.notes["finetune"].get("versions") or {}).items()),
        processor=night.notes["finetune"].get("processor") or "unknown",
        energy="not measured" if energy is None else f"{energy:,.0f} J",
    )


def metadata(night: Night, version: str) -> dict[str, Any]:
    """What stands above the card for programs: licence, tags, and the candidate's results on each suite."""
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": suite, "type": suite},
            "metrics": [
                {"type": "accuracy", "value": figures["accuracy"], "name": f"of {figures['n']} items"}
            ],
        }
        for suite, subjects in night.summary.items()
        if isinstance(subjects, Mapping) and (figures := subjects.get("candidate"))
    ]
    return {
        "license": "gemma",
        "base_model": version.rpartition(":")[0],
        "base_model_relation": "quantized",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "lora", "function-calling", "agent-loop"],
        "model-index": [{"name": version, "results": results}],
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "\N{EN DASH}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
