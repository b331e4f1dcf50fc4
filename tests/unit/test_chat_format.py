"""What the renderer of Gemma's turns promises."""

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpc_server.domain.chat_format import (
    END_OF_TURN,
    STOP,
    parse_tool_call,
    render,
    render_answer,
    tool_call_schema,
)
from grpc_server.domain.types import Message, Role, Tool, ToolCall, ToolChoice

WEATHER = Tool(
    "weather.get",
    "The weather   in a city.\nUp to ten days ahead.",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "The city"},
            "days": {"type": "integer", "maximum": 10},
            "unit": {"type": "string", "enum": ["C", "F"]},
        },
        "required": ["city"],
    },
)
ASK = Message(Role.USER, "Weather in Oslo?")

CONTROL_TOKENS = (
    "<bos>",
    "<eos>",
    "<pad>",
    "<unk>",
    "<mask>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<unused0>",
    "<unused6241>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
    "<start_of_audio>",
    "[multimodal]",
)
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
hostile_text = st.lists(
    st.sampled_from([*CONTROL_TOKENS, "<", ">", "end_of_turn>", "<end_of", "_turn>", "[", " ", "\n", "a"])
    | st.text(max_size=5),
    max_size=6,
).map("".join)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | hostile_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(hostile_text, inner, max_size=3),
    max_leaves=8,
)
schemas = st.recursive(
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["string", "integer", "number", "boolean"]) | hostile_text,
            "enum": st.lists(json_values, max_size=3),
            "const": json_values,
            "description": hostile_text,
        },
    ),
    lambda inner: (
        st.fixed_dictionaries({"type": st.just("array"), "items": inner})
        | st.fixed_dictionaries(
            {
                "type": st.just("object"),
                "properties": st.dictionaries(hostile_text, inner, max_size=3),
                "required": st.lists(hostile_text, max_size=2),
            }
        )
        | st.fixed_dictionaries({"anyOf": st.lists(inner, max_size=3)})
    ),
    max_leaves=6,
)
tools = st.builds(
    Tool,
    name=hostile_text,
    description=hostile_text,
    parameters=st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(hostile_text, schemas, max_size=3)},
        optional={"required": st.lists(hostile_text, max_size=2)},
    ),
)
calls = st.builds(
    ToolCall, name=hostile_text, arguments=st.dictionaries(hostile_text, json_values, max_size=3)
)
messages = st.builds(
    Message,
    role=st.sampled_from(Role),
    content=hostile_text,
    tool_calls=st.just(()) | calls.map(lambda call: (call,)),
    tool_name=hostile_text,
)


def control_tokens(text: str) -> list[str]:
    pattern = (
        r"<(?:pad|eos|bos|unk|mask|unused\d+|(?:start|end)_of_\w+|\w+_soft_token)>|\[multimodal\]|\[@BOS@\]"
    )
    return re.findall(pattern, text)


def test_a_tool_is_one_line_like_a_signature() -> None:
    assert render([ASK], [WEATHER]) == (
        "<start_of_turn>user\n"
        'weather.get(city: string, days?: integer, unit?: "C"|"F")'
        " - The weather in a city. Up to ten days ahead.\n\n"
        "Weather in Oslo?<end_of_turn>\n"
        "<start_of_turn>model\n"
    )


def test_system_texts_tools_and_schema_open_the_first_turn() -> None:
    prompt = render(
        [
            Message(Role.SYSTEM, "Be brief."),
            ASK,
            Message(Role.ASSISTANT, "Cold."),
            Message(Role.USER, "Sure?"),
        ],
        [WEATHER],
        response_schema={"type": "integer"},
    )
    first, second, third, last = prompt.split("<start_of_turn>")[1:]
    assert first.startswith("user\nBe brief.\n\nweather.get(")
    assert first.endswith('schema: {"type": "integer"}\n\nWeather in Oslo?<end_of_turn>\n')
    assert second == "model\nCold.<end_of_turn>\n"
    assert third == "user\nSure?<end_of_turn>\n"
    assert last == "model\n"


def test_tools_are_left_out_when_none_may_be_called() -> None:
    assert "weather.get" not in render([ASK], [WEATHER], ToolChoice.NONE)
    assert render([ASK], [WEATHER], ToolChoice.REQUIRED) == render([ASK], [WEATHER], ToolChoice.AUTO)


def test_a_call_and_its_result_are_turns_of_the_conversation() -> None:
    call = Message(Role.ASSISTANT, tool_calls=(ToolCall("weather.get", {"city": "Oslo"}),))
    result = Message(Role.TOOL, "-3 C", tool_name="weather.get")
    assert render([ASK, call, result]).endswith(
        'model\n{"name": "weather.get", "arguments": {"city": "Oslo"}}<end_of_turn>\n'
        "<start_of_turn>user\nweather.get returned: -3 C<end_of_turn>\n<start_of_turn>model\n"
    )


def test_a_conversation_that_the_model_opens_still_begins_with_a_user() -> None:
    assert render([Message(Role.ASSISTANT, "Hello.")]).startswith("<start_of_turn>user\n<end_of_turn>\n")


def test_long_descriptions_and_enums_are_cut() -> None:
    wordy = Tool(
        "t",
        "word " * 100,
        {"type": "object", "properties": {"a": {"enum": [f"choice {i}" for i in range(99)]}}},
    )
    line = render([ASK], [wordy]).split("\n")[1]
    assert len(line) < 300
    assert "|..." in line


def test_nested_lists_unions_and_unknown_types_have_a_notation() -> None:
    tool = Tool(
        "t",
        "",
        {
            "properties": {
                "points": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
                "who": {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]},
                "either": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "both": {"type": ["string", "null"]},
                "free": {},
                "map": {"type": "object"},
                "always": True,
            },
            "required": ["points", "who", "either", "both", "free", "map", "always"],
        },
    )
    assert render([ASK], [tool]).split("\n")[1] == (
        "t(points: number[][], who: {age: integer}, either: string|null, both: string|null, free: any,"
        " map: object, always: any)"
    )


def test_an_answer_ends_where_engines_stop() -> None:
    assert render_answer(Message(Role.ASSISTANT, "Hi")) == "Hi" + STOP[0]


def test_an_answer_of_two_calls_is_refused() -> None:
    call = ToolCall("weather.get", {})
    with pytest.raises(ValueError, match="one tool call, but this message has 2"):
        render_answer(Message(Role.ASSISTANT, tool_calls=(call, call)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure! Let me check.",
        'I call {"name": "weather.get", "arguments": {}}',
        '{"name": "weather.get", "arguments": {}} and more',
        '{"name": "weather.get"}',
        '{"name": "weather.get", "arguments": []}',
        '{"name": "weather.get", "arguments": {}, "id": 1}',
        '{"name": "unknown", "arguments": {}}',
        '{"name": ["weather.get"], "arguments": {}}',
        '{"name": "weather.get", "arguments": {"days": NaN}}',
        '{"name": "weather.get", "arguments": {"days": 1e999}}',
        pytest.param('{"name": "weather.get", "arguments": {"a": ' + "[" * 100_000, id="nested 100,000 deep"),
        '["weather.get"]',
    ],
)
def test_what_is_not_wholly_a_call_of_an_offered_tool_is_text(text: str) -> None:
    assert parse_tool_call(text, [WEATHER]) is None


def test_blanks_around_a_call_do_not_matter() -> None:
    text = ' \n{"name":"weather.get","arguments":{"city":"Oslo"}}\n<end_of_turn>'
    assert parse_tool_call(text, [WEATHER]) == ToolCall("weather.get", {"city": "Oslo"})


def test_the_schema_of_one_tool_is_a_call_of_it() -> None:
    assert tool_call_schema([WEATHER]) == {
        "type": "object",
        "properties": {
            "name": {"const": "weather.get"},
            "arguments": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer", "maximum": 10},
                    "unit": {"enum": ["C", "F"]},
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def test_the_schema_of_several_tools_is_a_call_of_any() -> None:
    other = Tool("stop", "", {"type": "object", "properties": {}, "additionalProperties": False})
    schema = tool_call_schema([WEATHER, other])
    assert [choice["properties"]["name"]["const"] for choice in schema["anyOf"]] == ["weather.get", "stop"]
    assert schema["anyOf"][1]["properties"]["arguments"]["additionalProperties"] is False


def test_a_required_call_without_tools_is_refused() -> None:
    with pytest.raises(ValueError, match="offer at least one"):
        tool_call_schema([])


def test_what_no_grammar_can_hold_is_left_out_of_the_schema() -> None:
    tool = Tool(
        "t",
        "",
        {
            "properties": {
                "n": {"type": "number", "minimum": 0},
                "s": {"type": "string", "pattern": "a+", "format": "email"},
                "list": {"type": "array", "items": {"type": "string", "pattern": "b"}},
                "inner": {"properties": {"x": {"const": 1, "type": "integer"}}},
                "either": {"oneOf": [{"type": "string"}, {"$ref": "#/nowhere"}]},
                "always": True,
                "map": {"type": "object"},
            },
            "required": ["n", "missing"],
        },
    )
    arguments = tool_call_schema([tool])["properties"]["arguments"]
    assert arguments["required"] == ["n"]
    assert arguments["properties"] == {
        "n": {"type": "number"},
        "s": {"type": "string"},
        "list": {"type": "array", "items": {"type": "string"}},
        "inner": {
            "type": "object",
            "properties": {"x": {"const": 1}},
            "required": [],
            "additionalProperties": False,
        },
        "either": {"anyOf": [{"type": "string"}, {}]},
        "always": {},
        "map": {"type": "object"},
    }


@unhurried
@given(
    conversation=st.lists(messages, max_size=3),
    offered=st.lists(tools, max_size=2),
    schema=st.none() | schemas,
)
def test_no_control_token_in_a_callers_text_survives(
    conversation: list[Message], offered: list[Tool], schema: dict[str, object] | None
) -> None:
    prompt = render(conversation, offered, response_schema=schema)
    turns = max(1, sum(message.role is not Role.SYSTEM for message in conversation))
    opens_itself = next((m.role for m in conversation if m.role is not Role.SYSTEM), None) is Role.ASSISTANT
    turns += opens_itself
    assert control_tokens(prompt) == ["<start_of_turn>", "<end_of_turn>"] * turns + ["<start_of_turn>"]
    assert prompt.endswith("<start_of_turn>model\n")


@unhurried
@given(call=calls)
def test_a_call_survives_being_written_and_read(call: ToolCall) -> None:
    text = render_answer(Message(Role.ASSISTANT, tool_calls=(call,)))
    assert control_tokens(text) == [END_OF_TURN]
    assert parse_tool_call(text, [Tool(call.name, "", {})]) == call


@unhurried
@given(content=hostile_text)
def test_an_answer_holds_one_end_of_turn(content: str) -> None:
    assert control_tokens(render_answer(Message(Role.ASSISTANT, content))) == [END_OF_TURN]


@unhurried
@given(text=st.text(max_size=40) | json_values.map(json.dumps))
def test_parsing_never_fails(text: str) -> None:
    parse_tool_call(text, [WEATHER])
