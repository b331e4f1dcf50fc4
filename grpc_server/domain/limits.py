"""How much a caller may use, as plain JSON and back: in caches, claims, events and what commands print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grpc_server.domain.errors import InvalidArgument
from grpc_server.domain.rules import check_alias
from grpc_server.domain.types import NO_LIMITS, Limits

AMOUNTS = ("requests_per_minute", "tokens_per_minute", "concurrent_streams")
MAX_AMOUNT = 1_000_000_000
MAX_ALIASES = 64


def limits_to_plain(limits: Limits) -> dict[str, Any]:
    """`{"requests_per_minute", "tokens_per_minute", "concurrent_streams", "aliases"}`; None: no limit."""
    return {
        **{name: getattr(limits, name) for name in AMOUNTS},
        "aliases": None if limits.aliases is None else sorted(limits.aliases),
    }


def limits_from_plain(value: Any, otherwise: Limits = NO_LIMITS) -> Limits:
    """The limits that an object names; for what it does not name, those of `otherwise`.

    Raises:
        ValueError: for a name that is no limit (a wrong word must not mean "as much as there is"), and for a
            value that is none.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"limits must be an object with some of: {', '.join((*AMOUNTS, 'aliases'))}")
    for name in value:
        if name not in (*AMOUNTS, "aliases"):
            raise ValueError(f"{name[:40]!a} is no limit; there are: {', '.join((*AMOUNTS, 'aliases'))}")
    amounts = {name: _amount(name, value.get(name, getattr(otherwise, name))) for name in AMOUNTS}
    return Limits(**amounts, aliases=_aliases(value["aliases"]) if "aliases" in value else otherwise.aliases)


def _amount(name: str, value: Any) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_AMOUNT:
        raise ValueError(f"{name} must be a whole number from 1 to {MAX_AMOUNT}")
    return value


def _aliases(value: Any) -> frozenset[str] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_ALIASES:
        raise ValueError(f"aliases must be a list of 1 to {MAX_ALIASES} aliases")
    for alias in value:
        if not isinstance(alias, str):
            raise ValueError("aliases must be a list of texts")
        try:
            check_alias(alias)
        except InvalidArgument as error:
            raise ValueError(str(error)) from error
    return frozenset(value)
