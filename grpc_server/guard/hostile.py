"""Finds hostile text: the rules are data (`hostile.yaml`), and this only matches them.

Which rule, never what it found: who reads a finding need not see the text. What is done about it is decided
by those who ask. Python's `re` has no bound of time, and the rules' patterns are written to need none; who
scans what a caller sent sets a limit all the same.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

RULES = Path(__file__).with_name("hostile.yaml")
_NOT_SHOWN = re.compile(
    "[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufe00-\ufe0f\ufeff\U000e0000-\U000e01ef]"
)
_ACCENTS = re.compile("[\u0300-\u036f]")


class Kind(StrEnum):
    """What hostile text is about."""

    INJECTION = "injection"
    CONTROL = "control"
    INVISIBLE = "invisible"
    LOOKALIKE = "lookalike"
    ENCODED = "encoded"


@dataclass(frozen=True, slots=True)
class Rule:
    """One sign of hostile text; `hostile.yaml` says what the fields mean."""

    name: str
    kind: Kind
    folded: bool
    pattern: re.Pattern[str]
    says: str
    reason: str
    needs: tuple[str, ...] = ()
    beyond_ascii: bool = False
    length: int = 0


class Matcher:
    """Says which rules a text breaks."""

    def __init__(self, path: Path = RULES) -> None:
        """Read the rules.

        Raises:
            ValueError: if the file holds no rules, or one with a mistake; the text names it.
        """
        data = _read(path)
        self._plain = str.maketrans({str(key): str(value) for key, value in data["lookalikes"].items()})
        self.rules: Sequence[Rule] = tuple(_rule(each, path) for each in data["rules"])
        self._in_ascii = tuple(rule for rule in self.rules if not rule.beyond_ascii)

    def find(self, text: str) -> Iterator[Rule]:
        """Each rule that has a hit in `text`, once, in the order of the file."""
        folded = self.folded(text)
        for rule in self._in_ascii if text.isascii() else self.rules:
            if len(text) < rule.length:
                continue
            for need in rule.needs:
                if need in folded:
                    break
            else:
                if rule.needs:
                    continue
            if rule.pattern.search(folded if rule.folded else text):
                yield rule

    def folded(self, text: str) -> str:
        """`text` as a reader takes it: lower case, plain letters, single blanks, no hidden ones."""
        if not text.isascii():
            apart = unicodedata.normalize("NFKD", _NOT_SHOWN.sub("", text))
            text = _ACCENTS.sub("", apart).casefold().translate(self._plain)
        return " ".join(text.lower().split())


def _read(path: Path) -> Mapping[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(data, dict) or set(data) != {"lookalikes", "rules"} or not data["rules"]:
        raise ValueError(f"{path} must hold `lookalikes` and `rules`, and nothing else")
    return data


def _rule(each: Mapping[str, Any], path: Path) -> Rule:
    try:
        given = dict(each)
        reads, parts = given.pop("reads"), given["pattern"]
        if reads not in ("folded", "raw"):
            raise ValueError(f"`reads` is {reads!r}; it must be folded or raw")
        given |= {
            "kind": Kind(given["kind"]),
            "folded": reads == "folded",
            "pattern": re.compile(parts if isinstance(parts, str) else "".join(parts), re.DOTALL),
            "needs": tuple(given.get("needs", ())),
        }
        rule = Rule(**given)
        if rule.folded and not rule.needs:
            raise ValueError("a folded rule must say what it `needs`")
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        name = each.get("name", each) if isinstance(each, Mapping) else each
        raise ValueError(f"{path}: the rule {name} has a mistake: {error}") from error
    return rule
