"""What the reader of the leaderboard promises, on its real files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from grpc_server.domain.types import Message, Role, Tool, ToolCall
from training import bfcl
from training.data import make_barred


def asked(
    properties: dict[str, Any], answers: dict[str, Any], required: list[str] | None = None
) -> bfcl.Item:
    declared = {"type": "dict", "properties": properties, "required": required or []}
    tool = Tool("f", "", bfcl.json_schema(declared))
    return bfcl.Item("x_0", (Message(Role.USER, "?"),), (tool,), "f", answers)


def accepts(properties: dict[str, Any], answers: dict[str, Any], arguments: dict[str, Any]) -> bool:
    return bfcl.score(ToolCall("f", arguments), asked(properties, answers))


@pytest.mark.parametrize("number", [300, 350, 399])
def test_sealed_items_are_refused(number: int) -> None:
    with pytest.raises(bfcl.SealedItemError, match="300-399"):
        bfcl.item(f"simple_python_{number}")


def test_sealed_lines_are_dropped_before_they_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "possible_answer").mkdir()
    question = {"question": [[{"role": "user", "content": "?"}]], "function": []}
    lines = [json.dumps({"id": f"simple_python_{n}", **question}) for n in (199, 200, 299)]
    sealed = '{"id": "simple_python_300", not even JSON\n'
    (tmp_path / "BFCL_v4_simple_python.json").write_text("\n".join([*lines, sealed]))
    answers = [json.dumps({"id": f"simple_python_{n}", "ground_truth": [{"f": {}}]}) for n in (199, 200, 299)]
    (tmp_path / "possible_answer" / "BFCL_v4_simple_python.json").write_text("\n".join([*answers, sealed]))
    monkeypatch.setattr(bfcl, "data_folder", lambda: tmp_path)
    assert [one.id for one in bfcl.evaluation_items()] == ["simple_python_200", "simple_python_299"]
    assert [one.id for one in bfcl.items("simple_python")] == ["simple_python_199"]


def test_an_unknown_item_or_category_is_named() -> None:
    with pytest.raises(KeyError, match="multiple_9999"):
        bfcl.item("multiple_9999")
    with pytest.raises(ValueError, match="'irrelevance'"):
        bfcl.items("irrelevance")


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfcl, "find_spec", lambda name: None)
    with pytest.raises(bfcl.DataNotInstalledError, match="uv sync --extra demo"):
        bfcl.data_folder()


def test_an_item_can_be_read_by_its_id() -> None:
    assert bfcl.item("simple_python_1").demonstration == ToolCall("math.factorial", {"number": 5})
    assert bfcl.item("live_simple_0-0-0").function == "get_user_info"


def test_evaluation_is_the_hundred_items_from_200() -> None:
    found = bfcl.evaluation_items()
    assert [one.id for one in found] == [f"simple_python_{n}" for n in range(200, 300)]
    assert all(bfcl.score(one.demonstration, one) for one in found)


def test_traffic_shares_no_question_and_no_function_with_evaluation() -> None:
    evaluated = bfcl.evaluation_items()
    functions = {tool.name for one in evaluated for tool in one.tools}
    questions = {one.messages[-1].content.lower() for one in evaluated}
    for one in bfcl.traffic():
        assert not functions & {tool.name for tool in one.tools}
        assert one.messages[-1].content.lower() not in questions


def test_traffic_demonstrations_are_accepted_and_fit_their_schema() -> None:
    played = bfcl.traffic(400)
    assert len(played) == 400
    assert len({one.id for one in played}) == 400
    for one in played:
        assert bfcl.score(one.demonstration, one)
        jsonschema_rs.Draft202012Validator(dict(one.tool.parameters)).validate(one.demonstration.arguments)


def test_the_list_of_barred_ids_is_what_its_script_makes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "barred.json"
    make_barred.main(made)
    assert made.read_text() == bfcl.BARRED_FILE.read_text()
    printed = json.loads(capsys.readouterr().out)
    assert printed["multiple"] == {"share_a_question": 48, "share_a_function": 98, "barred": 98}


def test_types_become_json_schema() -> None:
    declared = {
        "type": "dict",
        "required": ["a"],
        "properties": {
            "a": {"type": "tuple", "items": {"type": "float"}, "description": "d"},
            "b": {"type": "any", "optional": True},
            "c": {"type": "dict", "properties": {"d": {"type": "boolean", "default": True}}},
        },
    }
    assert bfcl.json_schema(declared) == {
        "type": "object",
        "required": ["a"],
        "properties": {
            "a": {"type": "array", "items": {"type": "number"}, "description": "d"},
            "b": {},
            "c": {"type": "object", "properties": {"d": {"type": "boolean", "default": True}}},
        },
    }


def test_every_schema_of_the_traffic_is_valid_json_schema() -> None:
    for one in bfcl.traffic():
        for tool in one.tools:
            jsonschema_rs.meta.validate(dict(tool.parameters))


def test_a_demonstration_takes_first_values_and_leaves_out_what_may_be_left_out() -> None:
    one = asked(
        {
            "a": {"type": "string"},
            "b": {"type": "integer"},
            "c": {"type": "dict", "properties": {"x": {"type": "string"}, "y": {"type": "string"}}},
            "d": {"type": "array", "items": {"type": "dict"}},
            "e": {"type": "string"},
        },
        {
            "a": ["New York", "NYC"],
            "b": ["", 3],
            "c": [{"x": ["u", "v"], "y": ["", "w"]}],
            "d": [[{"k": [1]}, {"k": [2]}]],
            "e": [""],
        },
        required=["a", "e"],
    )
    assert one.demonstration.arguments == {
        "a": "New York",
        "c": {"x": "u"},
        "d": [{"k": 1}, {"k": 2}],
        "e": "",
    }


def test_a_demonstration_prefers_what_the_question_says() -> None:
    one = replace(
        asked(
            {"city": {"type": "string"}, "unit": {"type": "string"}, "days": {"type": "integer"}},
            {"city": ["New York", "NYC"], "unit": ["", "Celsius"], "days": [7, ""]},
            required=["city"],
        ),
        messages=(Message(Role.USER, "The weather in NYC in celsius, in the next 17 days?"),),
    )
    assert one.demonstration.arguments == {"city": "NYC", "unit": "Celsius"}


def test_no_call_and_a_call_of_another_function_are_wrong() -> None:
    one = asked({"a": {"type": "integer"}}, {"a": [1]})
    assert bfcl.score(ToolCall("f", {"a": 1}), one)
    assert not bfcl.score(None, one)
    assert not bfcl.score(ToolCall("g", {"a": 1}), one)


def test_required_parameters_must_be_there_and_unknown_ones_not() -> None:
    one = asked(
        {"a": {"type": "integer"}, "b": {"type": "integer"}}, {"a": [1], "b": [2, ""]}, required=["a"]
    )
    assert bfcl.score(ToolCall("f", {"a": 1}), one)
    assert bfcl.score(ToolCall("f", {"a": 1, "b": 2}), one)
    assert not bfcl.score(ToolCall("f", {"b": 2}), one)
    assert not bfcl.score(ToolCall("f", {"a": 1, "c": 3}), one)


def test_an_optional_parameter_that_the_question_gives_must_be_there() -> None:
    assert not accepts({"a": {"type": "integer"}}, {"a": [1]}, {})


def test_strings_are_compared_without_case_blanks_and_punctuation() -> None:
    declared, answers = {"a": {"type": "string"}}, {"a": ["April 1, 2024", "Bob's"]}
    assert accepts(declared, answers, {"a": "april 1 2024"})
    assert accepts(declared, answers, {"a": 'Bob"s'})
    assert not accepts(declared, answers, {"a": "April 2, 2024"})


def test_an_integer_serves_as_a_float_but_not_the_other_way() -> None:
    assert accepts({"a": {"type": "float"}}, {"a": [5.0]}, {"a": 5})
    assert not accepts({"a": {"type": "integer"}}, {"a": [5]}, {"a": 5.0})
    assert not accepts({"a": {"type": "integer"}}, {"a": [1]}, {"a": True})


def test_lists_are_compared_element_by_element() -> None:
    declared = {"a": {"type": "array", "items": {"type": "string"}}}
    assert accepts(declared, {"a": [["New York", "Oslo"]]}, {"a": ["new york", "OSLO"]})
    assert not accepts(declared, {"a": [["New York", "Oslo"]]}, {"a": ["Oslo", "New York"]})
    assert not accepts(declared, {"a": [["1"]]}, {"a": [1]})


def test_dictionaries_are_compared_key_by_key() -> None:
    declared = {"a": {"type": "dict"}}
    answers = {"a": ["", {"x": ["u", "v"], "y": ["", 2]}]}
    assert accepts(declared, answers, {"a": {"x": "V"}})
    assert accepts(declared, answers, {"a": {"x": "u", "y": 2}})
    assert not accepts(declared, answers, {"a": {"y": 2}})
    assert not accepts(declared, answers, {"a": {"x": "u", "z": 1}})
    assert not accepts(declared, answers, {"a": {"x": "w"}})


def test_lists_of_dictionaries_are_compared_in_order() -> None:
    declared = {"a": {"type": "array", "items": {"type": "dict"}}}
    answers = {"a": [[{"x": [1]}, {"x": [2]}]]}
    assert accepts(declared, answers, {"a": [{"x": 1}, {"x": 2}]})
    assert not accepts(declared, answers, {"a": [{"x": 2}, {"x": 1}]})
    assert not accepts(declared, answers, {"a": [{"x": 1}]})
    assert not accepts(declared, answers, {"a": [1, 2]})


def test_a_variables_name_is_accepted_as_it_stands() -> None:
    declared, answers = {"a": {"type": "array", "items": {"type": "integer"}}}, {"a": ["my_list"]}
    assert accepts(declared, answers, {"a": "my_list"})
    assert not accepts(declared, answers, {"a": "My List"})
