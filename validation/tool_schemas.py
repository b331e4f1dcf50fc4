"""Whether a tool's parameters are a JSON Schema, and whether a call's arguments are what it allows.

`jsonschema` decides, in 120 µs a call and 900 a schema. Most schemas of tools use a dozen keywords only; of
those jsonschema-rs says the same in 2 and 20, and is asked instead. Whatever could take long or reach outside
(references, patterns, combinations, very deep ones) is left to `jsonschema`, which can be interrupted.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jsonschema_rs
from jsonschema import Draft202012Validator
from referencing import Registry

from validation.sized_cache import SizedCache
from validation.time_limit import within

# Of processor time: a schema of 64 KiB, the largest that is taken, needs 1.3 s; arguments need milliseconds.
_SCHEMA_SECONDS = 5.0
_ARGUMENTS_SECONDS = 0.5
_CACHE_BYTES = 16 << 20
_DEEPEST = 16
_PLAIN = frozenset(
    (
        *("type", "required", "enum", "title", "description", "default", "examples", "format"),
        *("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems"),
    )
)
"""Keywords that take time by the size of what they judge, and say the same in both libraries."""


class Arguments:
    """What one schema allows."""

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._quick = _quick(schema)

    def allow(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the schema allows these arguments; False if it cannot be told."""
        if self._quick is not None:
            try:
                return bool(self._quick.is_valid(arguments))
            except Exception:  # noqa: S110 - a value that Rust cannot hold, as a lone surrogate
                pass
        try:
            with within(_ARGUMENTS_SECONDS):
                return bool(self._exact.is_valid(arguments))
        except Exception:  # a schema that points nowhere, at itself, has a broken pattern, …
            return False

    @cached_property
    def _exact(self) -> Draft202012Validator:
        # What it refers to elsewhere is never fetched.
        return Draft202012Validator(self._schema, registry=Registry())


def arguments_of(schema: Mapping[str, Any]) -> Arguments | None:
    """What a schema allows; None if it is none."""
    return _checked(json.dumps(schema, sort_keys=True).encode())


def _check(schema_json: bytes) -> Arguments | None:
    schema = json.loads(schema_json)
    try:
        return Arguments(schema) if _is_schema(schema) else None
    except Exception:  # SchemaError, and whatever else a caller's schema does to the libraries
        return None


def _is_schema(schema: Any) -> bool:
    if _is_plain(schema, _DEEPEST):
        with contextlib.suppress(ValueError):  # a number that Rust cannot hold
            return bool(jsonschema_rs.meta.is_valid(schema))
    with within(_SCHEMA_SECONDS):
        Draft202012Validator.check_schema(schema)
    return True


_checked = SizedCache(_check, _CACHE_BYTES)


def _quick(schema: Any) -> Any:
    """jsonschema-rs's validator, if the schema is plain."""
    if not _is_plain(schema, _DEEPEST):
        return None
    try:
        return jsonschema_rs.Draft202012Validator(schema)
    except Exception:  # a number that Rust cannot hold
        return None


def _is_plain(schema: Any, deep: int) -> bool:
    """Whether a schema, and every one in it, has plain keywords only."""
    if not isinstance(schema, dict):
        return isinstance(schema, bool)
    if deep == 0:
        return False
    for keyword, value in schema.items():
        if keyword == "properties":
            if not isinstance(value, dict) or not all(_is_plain(each, deep - 1) for each in value.values()):
                return False
        elif keyword in ("items", "additionalProperties"):
            if not _is_plain(value, deep - 1):
                return False
        elif keyword not in _PLAIN:
            return False
    return True
