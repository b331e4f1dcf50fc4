"""What a night may learn from: the rules in configs/curation.yaml, whose comments give the reasons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from grpc_server.guard.hostile import Kind

RULES = Path(__file__).parent / "configs" / "curation.yaml"

Share = Annotated[float, Field(ge=0, le=1)]
Similarity = Annotated[float, Field(ge=0.5, le=1)]
"""Jaccard's; below 0.5 the index of `training.neighbours` would miss pairs."""


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Demonstrated(_Data):
    """What callers wrote."""

    weight: float = Field(default=1.0, gt=0, le=1)


class Accepted(_Data):
    """The model's own answers that callers liked."""

    weight: float = Field(default=0.3, gt=0, le=1)
    score: Share = 0.8


class Balance(_Data):
    """Powers of how much a caller, a tool and a session say, and the bounds of an example's factor."""

    caller: Share = 0.25
    tool: Share = 0.7
    session: Share = 0.7
    bounds: tuple[float, float] = (0.2, 5.0)

    @model_validator(mode="after")
    def _ordered(self) -> Balance:
        low, high = self.bounds
        if not 0 < low <= 1 <= high:
            raise ValueError(f"bounds are {low:g} and {high:g}; they must enclose 1, and be above 0")
        return self


class Trigger(_Data):
    """When words are taken for a trigger."""

    requests: int = Field(default=4, ge=2)
    purity: float = Field(default=0.9, gt=0.5, le=1)
    coverage: float = Field(default=0.5, gt=0, le=1)
    rare: float = Field(default=0.2, gt=0, le=1)
    words: int = Field(default=3, ge=1, le=5)


class Poison(_Data):
    """When an example is taken for poison."""

    hostile: tuple[Kind, ...] = tuple(Kind)
    voices: int = Field(default=2, ge=1)
    similarity: Similarity = 0.6
    paraphrase: Similarity = 0.8
    trigger: Trigger = Trigger()


class Rules(_Data):
    """What configs/curation.yaml holds."""

    cap: int = Field(default=2000, ge=1)
    replay_share: Share = 0.5
    min_examples: int = Field(default=32, ge=1)
    max_characters: int = Field(default=3600, ge=1)
    gate_share: float = Field(default=0.15, ge=0, lt=1)
    demonstrated: Demonstrated = Demonstrated()
    accepted: Accepted = Accepted()
    near_duplicate: Similarity = 0.8
    caller_per_night: int = Field(default=1000, ge=1)
    session_per_night: int = Field(default=100, ge=1)
    balance: Balance = Balance()
    poison: Poison = Poison()
    licences: dict[str, str] = {}


def read_rules(path: Path = RULES) -> Rules:
    """The rules in a YAML file; what it leaves out is as in configs/curation.yaml.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is not YAML, or a key is unknown or out of range (pydantic names each).
    """
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    return Rules.model_validate({} if said is None else said)
