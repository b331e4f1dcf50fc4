"""JSON that callers write as text: objects, and the schemas that their answers and tools are held to."""

from __future__ import annotations

import functools
import json
import math
import re
from re import _parser  # type: ignore[attr-defined]
from typing import Any

import jsonschema

from grpc_server.domain.errors import InvalidArgument
from grpc_server.domain.rules import check_json
from grpc_server.domain.types import JsonObject

_FORMATS = jsonschema.FormatChecker(formats=())


@_FORMATS.checks("regex", raises=(re.error, OverflowError, RecursionError))
def _is_pattern(value: object) -> bool:
    """Whether `value` is a regular expression, if it is a text.

    It is parsed and not compiled: as many ranges of all characters as a schema holds, without regard to case,
    would take 13 s to compile.
    """
    if isinstance(value, str):
        _parser.parse(value)
    return True


MAX_SCHEMA_BYTES = 65536
"""Of one schema. Checking costs time: 0.15 s for the largest."""


def json_object(field: str, text: str) -> JsonObject:
    """The JSON object that `text` is. Raises InvalidArgument."""
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        reason = (
            str(error)
            if isinstance(error, json.JSONDecodeError | _UnfitError)
            else "it is too deep or too long"
        )
        raise InvalidArgument(f"{field} is not JSON: {reason}", field) from error
    if not isinstance(value, dict):
        raise InvalidArgument(f"{field} is a JSON {_kind(value)}; it must be an object", field)
    return value


def json_schema(field: str, text: str) -> JsonObject:
    """The JSON Schema that `text` is. Raises InvalidArgument. No reference is ever fetched.

    It is checked against draft 7, whose keywords all later drafts keep: checking draft 2020-12, which is
    written with dynamic references, takes 0.85 ms a property where draft 7 takes 0.13 ms. Callers send the
    same tools again and again, so that what was checked is kept.
    """
    size = len(text.encode(errors="surrogatepass"))
    if size > MAX_SCHEMA_BYTES:
        raise InvalidArgument(f"{field} has {size} bytes; at most {MAX_SCHEMA_BYTES} are taken", field)
    return _checked_schema(field, text)


@functools.lru_cache(maxsize=128)
def _checked_schema(field: str, text: str) -> JsonObject:
    schema = json_object(field, text)
    check_json(field, schema)
    try:
        jsonschema.Draft7Validator.check_schema(schema, format_checker=_FORMATS)
    except jsonschema.SchemaError as error:
        place = error.json_path.removeprefix("$").lstrip(".") or "the schema"
        raise InvalidArgument(
            f"{field} is not a JSON Schema: {place} breaks the rule {error.validator}", field
        ) from error
    return schema


class _UnfitError(ValueError):
    """JSON's grammar allows it, or Python's reader does; we do not."""


def _refuse(constant: str) -> float:
    raise _UnfitError(f"{constant} is no number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _UnfitError("a number is out of range")
    return number


def _kind(value: Any) -> str:
    names = {
        list: "array",
        str: "string",
        bool: "boolean",
        int: "number",
        float: "number",
        type(None): "null",
    }
    return names[type(value)]
