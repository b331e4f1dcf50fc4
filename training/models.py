"""Which models does a night train? One, or those of a list: `AGENTLOOP_NIGHT_MODELS` names a YAML file.

Each model has its own watermark, since only a verdict on *it* says that it has learned: so each has a folder
of cycles of its own. The first of the list keeps the cycles folder; each other one has a folder in it, by its
name.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

_NAME = r"^[a-z0-9][a-z0-9.-]{0,63}$"


class Model(BaseModel):
    """One model of the list; paths are absolute, or from the checkout."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(pattern=_NAME)
    alias: str = Field(pattern=_NAME)
    recipe: Path
    base: Path


class Models(BaseModel):
    """The list: no two models of one name, or of one alias."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[Model, ...] = Field(min_length=1, max_length=16)

    @model_validator(mode="after")
    def _apart(self) -> Models:
        for field in ("model", "alias"):
            named = [getattr(each, field) for each in self.models]
            twice = sorted({name for name in named if named.count(name) > 1})
            if twice:
                raise ValueError(f"two models have the {field} {', '.join(twice)}; each needs its own")
        return self


def read(path: Path) -> Models:
    """The list in a YAML file.

    Raises:
        FileNotFoundError: if it, a recipe or a base is not there.
        pydantic.ValidationError: naming each key that is missing, unknown or wrong.
        ValueError: if it is no YAML.
    """
    try:
        found = Models.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    for each in found.models:
        for name, file in (("recipe", each.recipe), ("base", each.base)):
            if not file.exists():
                raise FileNotFoundError(f"{path}: the {name} of {each.model} is not there: {file}")
    return found


def listed(found: Models, cycles: Path) -> list[dict[str, str]]:
    """For each model what its steps are told: model, alias, recipe, base, cycles (its folder of them)."""
    return [
        {
            "model": each.model,
            "alias": each.alias,
            "recipe": str(each.recipe.absolute()),
            "base": str(each.base.absolute()),
            "cycles": str((cycles / each.model if number else cycles).absolute()),
        }
        for number, each in enumerate(found.models)
    ]
