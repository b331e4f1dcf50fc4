"""Berkeley Function-Calling Leaderboard v4, read from the installed package `bfcl_eval`: files only, no code.

An item is a question, the functions offered for it, and the calls that the leaderboard accepts:

| items                                                         | are for                                |
|---------------------------------------------------------------|----------------------------------------|
| `simple_python` 0-199, `multiple`, `live_simple`, `live_multiple` | traffic, and so training           |
| `simple_python` 200-299; what `bfcl_calls` reads              | evaluation                             |
| `simple_python` 300-399                                       | sealed: `sealed` scores them, once     |

Traffic leaves out every item that shares a question or a function with `simple_python` 200-399; their ids
are in `data/barred.json`, which `python -m training.data.make_barred` makes.

Source: Patil et al., "The Berkeley Function Calling Leaderboard", https://gorilla.cs.berkeley.edu.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from grpc_server.domain.chat_format import render
from grpc_server.domain.types import JsonObject, Message, Role, Tool, ToolCall

TRAFFIC_CATEGORIES = ("simple_python", "multiple", "live_simple", "live_multiple")
TRAFFIC_SIMPLE = range(200)
EVALUATION = range(200, 300)
SEALED = range(300, 400)
BARRED_FILE = Path(__file__).parent / "data" / "barred.json"

# BFCL writes Python's types; "any" is its name for no type at all.
_JSON_TYPES = {
    "dict": "object",
    "float": "number",
    "tuple": "array",
    "list": "array",
    "bool": "boolean",
    "int": "integer",
    "str": "string",
}
# What the official checker takes each type for ("any" is str there).
_PYTHON_TYPES: dict[str, type] = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
    "object": dict,
}
_ID = re.compile(r'^\{"id": "([a-z_]+?)_(\d+)((?:-\d+)*)"')


class SealedItemError(PermissionError):
    """An item of `simple_python` 300-399 was asked for."""


class DataNotInstalledError(FileNotFoundError):
    """The package that holds the leaderboard's files is not there."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question of the leaderboard.

    `answers` maps each parameter to the values accepted for it, in the published order; "" among them means
    that the parameter may be left out.
    """

    id: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    function: str
    answers: JsonObject

    @property
    def tool(self) -> Tool:
        """The tool that the published answer calls."""
        return next(tool for tool in self.tools if tool.name == self.function)

    @property
    def demonstration(self) -> ToolCall:
        """One accepted call: of each parameter the first accepted value that the question says, or the first.

        A parameter that may be left out is left out, unless the question says its value.
        """
        required = self.tool.parameters.get("required", ())
        properties = self.tool.parameters["properties"]
        said = " ".join(message.content for message in self.messages)
        arguments = {}
        for name, accepted in self.answers.items():
            values = [value for value in accepted if value != ""]
            stated = [value for value in values if _says(said, value)]
            if name not in required and "" in accepted and not stated:
                continue
            chosen = (stated or values or [""])[0]
            arguments[name] = _first_value(chosen, properties.get(name, {}))
        return ToolCall(self.function, arguments)

    @property
    def answer(self) -> Message:
        """What a caller shows: the demonstration, as a turn of the model."""
        return Message(Role.ASSISTANT, tool_calls=(self.demonstration,))

    @property
    def prompt_characters(self) -> int:
        """Length of the rendered prompt."""
        return len(render(self.messages, self.tools))


def items(category: str) -> list[Item]:
    """Every item of a traffic category, in the published order; of `simple_python` only 0-199."""
    if category not in TRAFFIC_CATEGORIES:
        raise ValueError(f"category is {category!r}; it must be one of {', '.join(TRAFFIC_CATEGORIES)}")
    return _read(category, TRAFFIC_SIMPLE if category == "simple_python" else None)


def item(item_id: str) -> Item:
    """The item of that id.

    Raises:
        SealedItemError: for `simple_python` 300-399.
        KeyError: if there is no such item.
    """
    category, _, number = item_id.rpartition("_")
    if category == "simple_python" and number.isdigit():
        if int(number) in SEALED:
            raise SealedItemError(
                f"{item_id} is sealed: simple_python {SEALED[0]}-{SEALED[-1]} may not be read"
            )
        found = _read(category, range(int(number), int(number) + 1))
    else:
        found = items(category)
    for one in found:
        if one.id == item_id:
            return one
    raise KeyError(f"there is no item {item_id}")


def evaluation_items() -> list[Item]:
    """`simple_python` 200-299: what the gate's accuracy is measured on, and nothing is trained on."""
    return _read("simple_python", EVALUATION)


def traffic(limit: int | None = None) -> list[Item]:
    """The items that traffic may play, without the barred ones, shorter prompts first; at most `limit`."""
    barred = barred_ids()
    playable = [
        one
        for category in TRAFFIC_CATEGORIES
        for one in items(category)
        # Of four items the published answer does not pass the leaderboard's own check.
        if one.id not in barred and score(one.demonstration, one)
    ]
    return sorted(playable, key=lambda one: (one.prompt_characters, one.id))[:limit]


@lru_cache(maxsize=1)
def barred_ids() -> frozenset[str]:
    """Ids of the items that share a question or a function with `simple_python` 200-399."""
    return frozenset(json.loads(BARRED_FILE.read_text(encoding="utf-8"))["barred"])


def score(call: ToolCall | None, asked: Item) -> bool:
    """Whether `call` is an accepted answer to `asked`, by the rules of the leaderboard's AST checker.

    The name must match, required parameters be there, no other parameters; a value's type must be the
    declared one (an integer serves as a float) or the accepted values' own; strings are compared without
    case, blanks and `,./-_*^`.
    """
    if call is None or call.name != asked.function:
        return False
    parameters = asked.tool.parameters
    if any(name not in call.arguments for name in parameters.get("required", ())):
        return False
    for name, value in call.arguments.items():
        if name not in parameters["properties"] or name not in asked.answers:
            return False
        if not _accepts(value, parameters["properties"][name], asked.answers[name]):
            return False
    return all(name in call.arguments or "" in accepted for name, accepted in asked.answers.items())


# Reading.


def data_folder() -> Path:
    """Where the leaderboard's JSON files are.

    Raises:
        DataNotInstalledError: if `bfcl_eval` is not installed.
    """
    found = find_spec("bfcl_eval")  # does not import it
    if found is None or not found.submodule_search_locations:
        raise DataNotInstalledError("bfcl-eval is not installed: run `uv sync --extra demo`")
    return Path(found.submodule_search_locations[0]) / "data"


def read_lines(category: str, numbers: range | None, *, unsealed: bool = False) -> Iterator[str]:
    """The question lines of a category whose item number is in `numbers` (None: all).

    Lines of other numbers are dropped unparsed, and so are the sealed ones unless they are `unsealed`, which
    is for two modules alone (a test looks): `sealed`, which scores them, and `data.make_barred`.
    """
    return _lines(data_folder() / f"BFCL_v4_{category}.json", numbers, unsealed=unsealed)


def _lines(path: Path, numbers: range | None, *, unsealed: bool) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            found = _ID.match(line)
            if not found or not (numbers is None or int(found[2]) in numbers):
                continue
            if unsealed or found[1] != "simple_python" or int(found[2]) not in SEALED:
                yield line


def read_answers(
    category: str, numbers: range | None, *, unsealed: bool = False
) -> dict[str, Sequence[Mapping[str, JsonObject]]]:
    """By item id the calls that a category accepts, of the items whose number is in `numbers`.

    For `unsealed` see `read_lines`.
    """
    path = data_folder() / "possible_answer" / f"BFCL_v4_{category}.json"
    return {
        row["id"]: row["ground_truth"] for row in map(json.loads, _lines(path, numbers, unsealed=unsealed))
    }


def _read(category: str, numbers: range | None) -> list[Item]:
    accepted = read_answers(category, numbers)
    return [item_of(row, accepted[row["id"]][0]) for row in map(json.loads, read_lines(category, numbers))]


def item_of(row: JsonObject, accepted: Mapping[str, JsonObject]) -> Item:
    """A question line of a category, and one call that is accepted for it."""
    function, answers = next(iter(accepted.items()))
    return Item(
        id=row["id"],
        messages=tuple(Message(Role(turn["role"]), turn["content"]) for turn in row["question"][0]),
        tools=tools_of(row),
        function=function,
        answers=answers,
    )


def tools_of(row: JsonObject) -> tuple[Tool, ...]:
    """The functions that a question line offers."""
    return tuple(
        Tool(each["name"], each["description"], json_schema(each["parameters"])) for each in row["function"]
    )


def json_schema(declared: JsonObject) -> JsonObject:
    """BFCL's declaration of a parameter as JSON Schema: `dict` is an object, `float` a number, `any` free."""
    schema: dict[str, Any] = {}
    for key, value in declared.items():
        if key == "type":
            if value != "any":
                schema["type"] = _JSON_TYPES.get(value, value)
        elif key == "properties":
            schema[key] = {name: json_schema(each) for name, each in value.items()}
        elif key == "items":
            schema[key] = json_schema(value)
        elif key != "optional":  # says again what `required` says
            schema[key] = value
    return schema


def _says(text: str, value: Any) -> bool:
    """Whether `text` has `value`, a string or a number, as words of its own."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return False
    return re.search(rf"(?<!\w){re.escape(str(value))}(?!\w)", text, re.IGNORECASE) is not None


def _first_value(value: Any, schema: JsonObject) -> Any:
    """`value` with each accepted list inside its dictionaries replaced by one value."""
    if isinstance(value, Mapping):
        chosen = {}
        for name, accepted in value.items():
            if isinstance(accepted, list):
                if "" in accepted:
                    continue
                accepted = accepted[0]
            chosen[name] = _first_value(accepted, schema.get("properties", {}).get(name, {}))
        return chosen
    if isinstance(value, list):
        return [_first_value(each, schema.get("items", {})) for each in value]
    return value


# Checking, as bfcl_eval/eval_checker/ast_eval/ast_checker.py does (version 2026.3.23).


def _accepts(value: Any, schema: JsonObject, accepted: Sequence[Any]) -> bool:
    declared = _PYTHON_TYPES[schema.get("type", "string")]
    inner = _PYTHON_TYPES[schema.get("items", {}).get("type", "string")] if declared is list else None
    if declared is float and type(value) is int:
        value = float(value)
    own_type = next((type(one) for one in accepted if one != ""), None)  # of the accepted values themselves
    given_type = type(value)
    if given_type is not declared or own_type not in (None, declared):
        # The answers name a variable, or were written in another type: compared as they stand.
        return given_type in (declared, own_type) and value in accepted
    if inner is not None and not _has_elements(value, inner, accepted):
        return False
    if declared is dict:
        return _accepts_object(value, accepted)
    if declared is list and inner is dict:
        return _accepts_objects(value, accepted)
    if declared is list:
        return [_plain(each) for each in value] in [[_plain(each) for each in one] for one in accepted]
    if declared is str:
        return _plain(value) in [_plain(one) for one in accepted if isinstance(one, str)]
    return value in accepted


def _has_elements(value: Sequence[Any], inner: type, accepted: Sequence[Any]) -> bool:
    """Whether each element is of the declared type, or of the type of an accepted list's elements."""
    for one in accepted:
        if not isinstance(one, list):
            return True
        own_type = next((type(each) for each in one if each != ""), None)
        if all(type(each) in (inner, own_type) for each in value):
            return True
    return False


def _plain(value: Any) -> Any:
    """A string without case, blanks and `,./-_*^`, and with one kind of quote; anything else as it is."""
    if isinstance(value, str):
        return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"')
    return value


def _accepts_object(value: Any, accepted: Sequence[Any]) -> bool:
    if not isinstance(value, Mapping):
        return False
    for one in accepted:
        if not isinstance(one, Mapping):
            continue
        fits = all(
            name in one and _plain(each) in [_plain(choice) for choice in one[name]]
            for name, each in value.items()
        )
        if fits and all(name in value or "" in choices for name, choices in one.items()):
            return True
    return False


def _accepts_objects(value: Sequence[Any], accepted: Sequence[Any]) -> bool:
    return any(
        len(value) == len(one)
        and all(_accepts_object(each, [choice]) for each, choice in zip(value, one, strict=True))
        for one in accepted
    )
