"""OpenAI's requests become ours; what would change the answer and is not offered is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpc_server.domain import rules
from grpc_server.domain.errors import AgentLoopError, InvalidArgument
from grpc_server.domain.types import Message, Role, Tool, ToolCall, ToolChoice
from grpc_server.http.completion_request import Asked, completion_request

HELLO = [{"role": "user", "content": "Hi"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Weather.", "parameters": PARAMETERS, "strict": True},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


def asked(**fields: Any) -> Asked:
    return completion_request({"model": "default", "messages": HELLO, **fields})


def refused(**fields: Any) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        rules.check_chat(asked(**fields).request)
    return caught.value


def test_a_plain_request_takes_our_defaults() -> None:
    made = asked()
    assert made.request.messages == (Message(Role.USER, "Hi"),)
    assert (made.request.alias, made.request.model_version) == ("default", "")
    assert (made.request.sampling.max_tokens, made.stream, made.include_usage) == (512, False, False)


def test_every_field_that_is_offered_is_taken() -> None:
    made = asked(
        model="agent",
        temperature=0,
        top_p=0.5,
        top_k=3,
        max_completion_tokens=7,
        max_tokens=7,
        seed=5,
        stop="END",
        user="somebody",
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
    )
    drawn = made.request.sampling
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.max_tokens, drawn.seed) == (0, 0.5, 3, 7, 5)
    assert drawn.stop == ("END",)
    assert (made.request.alias, made.request.session_id) == ("agent", "somebody")
    assert made.stream and made.include_usage
    assert asked(stop=["a", "b"]).request.sampling.stop == ("a", "b")
    assert asked(max_tokens=9).request.sampling.max_tokens == 9


def test_null_is_the_same_as_leaving_a_field_out() -> None:
    names = (
        "temperature",
        "stop",
        "seed",
        "tools",
        "tool_choice",
        "response_format",
        "user",
        "metadata",
        "n",
    )
    assert asked(**dict.fromkeys(names), stream=None, stream_options=None, unheard_of=None) == asked()


def test_a_model_with_a_colon_is_one_version_and_any_other_an_alias() -> None:
    assert asked(model="gemma:base").request.model_version == "gemma:base"
    assert refused(model="GPT-4o").field == "model"
    assert refused(model="a:b:c").field == "model"
    with pytest.raises(InvalidArgument, match="model is missing"):
        completion_request({"messages": HELLO})


def test_the_session_is_what_metadata_says_else_the_user() -> None:
    assert asked(user="u", metadata={"session_id": "s", "run": "7"}).request.session_id == "s"
    assert asked(metadata={"run": "7"}, user="u").request.session_id == "u"
    assert refused(user="u" * 129).field == "session_id"


def test_texts_in_parts_are_joined_and_anything_but_text_is_refused() -> None:
    parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "morning"}]
    made = asked(messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}])
    assert made.request.messages == (Message(Role.SYSTEM, "Be brief."), Message(Role.USER, "Good morning"))
    image = [{"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}]
    error = refused(messages=[{"role": "user", "content": image}])
    assert (error.field, "text only" in str(error)) == ("messages[0].content[0].type", True)


def test_a_tools_answer_is_led_back_to_its_tool_by_the_calls_id() -> None:
    history: list[dict[str, Any]] = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "c1", "content": "4 degrees"},
    ]
    messages = asked(messages=history).request.messages
    assert messages[1] == Message(Role.ASSISTANT, "", (ToolCall("weather", {"city": "Oslo"}),))
    assert messages[2] == Message(Role.TOOL, "4 degrees", (), "weather")
    history[2]["tool_call_id"] = "c2"
    assert refused(messages=history).field == "messages[2].tool_call_id"


def test_tools_and_how_they_are_chosen_are_taken() -> None:
    request = asked(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False).request
    assert request.tools == (Tool("weather", "Weather.", PARAMETERS),)
    assert request.tool_choice is ToolChoice.REQUIRED
    bare = {"type": "function", "function": {"name": "now"}}
    assert asked(tools=[bare]).request.tools[0].parameters == {"type": "object", "properties": {}}
    named = {"type": "function", "function": {"name": "now"}}
    request = asked(tools=[WEATHER, bare], tool_choice=named).request
    assert ([tool.name for tool in request.tools], request.tool_choice) == (["now"], ToolChoice.REQUIRED)
    assert refused(tools=[WEATHER], tool_choice=named).field == "tool_choice"
    assert refused(tools=[WEATHER], tool_choice="any").field == "tool_choice"
    assert refused(tools=[{"type": "custom", "custom": {"name": "x"}}]).field == "tools[0].type"


def test_an_answer_is_held_to_the_form_that_is_asked_for() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    assert asked(response_format=form).request.response_schema == schema
    assert asked(response_format={"type": "json_object"}).request.response_schema == {"type": "object"}
    assert asked(response_format={"type": "text"}).request.response_schema is None
    assert refused(response_format={"type": "grammar"}).field == "response_format.type"
    assert refused(response_format=form, tools=[WEATHER]).field == "response_format"
    broken = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "thing"}}}
    assert "is not a JSON Schema" in str(refused(response_format=broken))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("n", True),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("logit_bias", {"50256": -100}),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -0.5),
        ("modalities", ["text", "audio"]),
        ("functions", []),
        ("web_search_options", {}),
        ("prediction", {"type": "content", "content": "x"}),
        ("min_p", 0.1),
    ],
)
def test_what_would_change_the_answer_and_is_not_offered_is_refused_by_name(name: str, value: Any) -> None:
    error = refused(**{name: value})
    assert str(error).startswith(f"{name} is not offered here; leave it out")
    assert error.field == name


def test_what_changes_nothing_is_passed_over() -> None:
    neutral = {"n": 1, "logprobs": False, "logit_bias": {}, "frequency_penalty": 0.0, "modalities": ["text"]}
    ours = {"store": True, "service_tier": "flex", "prompt_cache_key": "k", "reasoning_effort": "low"}
    named = [{"role": "user", "content": "Hi", "name": "ann"}]
    assert asked(**neutral, **ours, messages=named) == asked()


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"temperature": "hot"}, "temperature is text; it must be a number"),
        ({"temperature": True}, "temperature is true or false; it must be a number"),
        ({"temperature": 3}, "temperature is 3; it must be from 0 to 2"),
        ({"seed": 1.5}, "seed is a number; it must be a whole number"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is out of range"),
        ({"max_tokens": 10**400}, "max_tokens is out of range"),
        ({"temperature": -(10**400)}, "temperature is out of range"),
        ({"n": 10**400}, "n is out of range"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be from 1 to 8192"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "send one of them"),
        ({"stop": [1]}, r"stop\[0\] must be text"),
        ({"stop": ""}, "has 0 characters"),
        ({"stream": "yes"}, "stream is text; it must be true or false"),
        ({"stream_options": {"chunks": 3}}, "stream_options.chunks is not offered here"),
        ({"messages": []}, "messages has 0 messages"),
        ({"messages": [None]}, r"messages\[0\] is null; it must be an object"),
        ({"messages": HELLO * 257}, "messages has 257 messages; at most 256 are taken"),
        ({"messages": [{"content": "Hi"}]}, r"messages\[0\].role is missing"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, r"messages\[0\].role is 'robot'"),
        (
            {"messages": [{"role": "user", "content": "a", "audio": {}}]},
            r"messages\[0\].audio is not offered",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 1025}]}, "1025 parts"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
        ({"user": "\0"}, "control character"),
        ({"x" * 9999: 1}, r"x{57}\.\.\. is not offered here"),
    ],
)
def test_what_is_wrong_is_named_with_its_place_and_the_remedy(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidArgument, match=complaint):
        rules.check_chat(asked(**fields).request)


def test_arguments_that_are_no_object_are_refused() -> None:
    for arguments in ("{", "[]", "NaN", "1e999"):
        call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
        error = refused(messages=[*HELLO, {"role": "assistant", "tool_calls": [call]}])
        assert error.field == "messages[1].tool_calls[0].function.arguments"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = [
    "model",
    "messages",
    "tools",
    "tool_choice",
    "response_format",
    "stop",
    "seed",
    "stream",
    "stream_options",
    "metadata",
    "user",
    "n",
    "temperature",
    "max_tokens",
    "logit_bias",
]


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), JSON, max_size=6))
def test_any_json_object_is_a_request_or_refused_with_a_sentence(body: dict[str, Any]) -> None:
    try:
        rules.check_chat(completion_request(body).request)
    except AgentLoopError as error:
        assert str(error)
