"""The members of a JSON object, taken one by one: each of the kind it must be, errors by its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grpc_server.domain.errors import InvalidArgument
from grpc_server.domain.types import JsonObject

MAX_NUMBER = 2**63
"""No whole number here is as large: Python's have no end, and cannot all become floats."""

_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}


class Fields:
    """An object at `place`. What is null counts as absent. What was not taken is `left`."""

    def __init__(self, value: JsonObject, place: str = "") -> None:
        self._values = {name: each for name, each in value.items() if each is not None}
        self._place = place

    @classmethod
    def of(cls, value: Any, place: str) -> Fields:
        """The object that `value` must be. Raises InvalidArgument."""
        if not isinstance(value, Mapping):
            raise InvalidArgument(f"{place} is {kind(value)}; it must be an object", place)
        return cls(value, place)

    @property
    def left(self) -> list[str]:
        """The names of what was not taken yet."""
        return list(self._values)

    def place(self, name: str) -> str:
        """Where the member stands in the request."""
        return f"{self._place}.{name}" if self._place else name

    def take(self, name: str, *kinds: type) -> Any:
        """The member, of one of the kinds; None if it is absent. Raises InvalidArgument."""
        value = self._values.pop(name, None)
        if isinstance(value, int) and abs(value) >= MAX_NUMBER:
            raise InvalidArgument(f"{self.place(name)} is out of range", self.place(name))
        if value is None or _is(value, kinds):
            return value
        must = " or ".join(_KINDS[each] for each in kinds)
        raise InvalidArgument(f"{self.place(name)} is {kind(value)}; it must be {must}", self.place(name))

    def need(self, name: str, *kinds: type) -> Any:
        """As `take`; raises InvalidArgument also if the member is absent."""
        value = self.take(name, *kinds)
        if value is None:
            raise InvalidArgument(f"{self.place(name)} is missing", self.place(name))
        return value

    def drop(self, *names: str) -> None:
        """Pass over members whatever they hold."""
        for name in names:
            self._values.pop(name, None)

    def number(self, name: str, default: float) -> float:
        """The number, or `default`."""
        value = self.take(name, float)
        return default if value is None else float(value)

    def whole(self, name: str) -> int | None:
        """The whole number."""
        found: int | None = self.take(name, int)
        return found

    def text(self, name: str) -> str:
        """The text; empty if it is absent."""
        return self.take(name, str) or ""

    def items(self, name: str, limit: int) -> Sequence[Any]:
        """The list of at most `limit` items; empty if it is absent."""
        value: Sequence[Any] = self.take(name, list) or ()
        if len(value) > limit:
            place = self.place(name)
            raise InvalidArgument(f"{place} has {len(value)} {name}; at most {limit} are taken", place)
        return value


def kind(value: Any) -> str:
    """What `value` is, in the words of JSON."""
    return "null" if value is None else _KINDS[type(value)]


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))
