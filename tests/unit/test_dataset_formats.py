"""Public datasets: each published format becomes requests with answers, and says what is wrong in it."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from grpc_server.domain import rules
from grpc_server.domain.types import Message, Role, ToolCall
from training import bfcl
from training.datasets import bfcl_items, browser_actions, toolbench, webarena, webarena_traces
from training.datasets.formats import FORMATS, recognised
from training.datasets.reading import Records
from training.datasets.shown import Shown

DATA = Path(__file__).parents[1] / "data" / "datasets"
FILES = {
    "agentinstruct": "agentinstruct.jsonl",
    "toolbench": "toolbench.json",
    "sharegpt": "sharegpt.json",
    "openai": "openai.jsonl",
    "browsergym": "browsergym.json",
    "webarena-traces": "webarena/render_3.html",
}


def records(name: str) -> list[dict[str, Any]]:
    return [record for _, record in Records(DATA / FILES[name])]


def read(name: str, record: dict[str, Any]) -> list[Shown | str]:
    return list(FORMATS[name].opened(DATA / FILES[name])(record))


def said(messages: Iterable[Message]) -> list[tuple[str, str]]:
    """Who says what, calls as `name {arguments}`."""
    return [
        (
            each.role.value,
            each.content or " ".join(f"{call.name} {json.dumps(call.arguments)}" for call in each.tool_calls),
        )
        for each in messages
    ]


def only(found: list[Shown | str]) -> Shown:
    (one,) = found
    assert isinstance(one, Shown)
    return one


@pytest.mark.parametrize("name", FILES)
def test_a_format_is_known_by_its_first_record(name: str) -> None:
    for record in records(name):
        found = recognised(record)
        assert found is not None and found.name == name
        assert found.page.startswith("https://")


def test_the_real_files_of_bfcl_and_webarena_are_known() -> None:
    for path, name in (
        (bfcl.data_folder() / "BFCL_v4_multiple.json", "bfcl"),
        (webarena_tasks(), "webarena"),
    ):
        _, record = next(iter(Records(path)))
        found = recognised(record)
        assert found is not None and found.name == name


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"text": "a document"},
        {"messages": "hello"},
        {"messages": []},
        {"conversations": [["human", "hello"]]},
        {"conversations": None, "question": "who?"},
        {"prompt": "a", "completion": "b"},
    ],
)
def test_what_is_of_no_format_is_not_taken_for_one(record: dict[str, Any]) -> None:
    assert recognised(record) is None


def test_agentinstruct_teaches_the_turns_that_its_loss_marks() -> None:
    first, _ = records("agentinstruct")
    found = [each for each in read("agentinstruct", first) if isinstance(each, Shown)]
    assert [str(each.answer and each.answer.content)[-11:] for each in found] == [
        "| wc -l\n```",
        "answer(220)",
    ]
    assert [len(each.request.messages) for each in found] == [3, 5]
    assert {each.session for each in found} == {"os_0"}


def test_sharegpt_teaches_every_turn_of_the_model_and_reads_calls_and_tools() -> None:
    talk, tools, _ = records("sharegpt")
    short, long = (each for each in read("sharegpt", talk) if isinstance(each, Shown))
    assert said(short.request.messages) == [
        ("system", "Answer in one sentence."),
        ("user", "Why is the sky blue?"),
    ]
    assert len(long.request.messages) == 4
    call, answer = (each for each in read("sharegpt", tools) if isinstance(each, Shown))
    assert call.answer == Message(Role.ASSISTANT, tool_calls=(ToolCall("age", {"born": 2020}),))
    assert [tool.name for tool in call.request.tools] == ["age"]
    assert answer.request.messages[-1] == Message(Role.TOOL, '{"years": 6}', tool_name="age")
    rules.check_chat(answer.request)


def test_toolbench_teaches_a_records_last_turn_as_a_call_or_the_final_answer() -> None:
    step, finish, gave_up, broken = (read("toolbench", record) for record in records("toolbench"))
    call, end = only(step), only(finish)
    assert said(call.request.messages) == [
        ("user", "I plan a trip to Oslo. What will the weather be for two days?")
    ]
    assert [tool.name for tool in call.request.tools] == ["search_for_weather_map"]
    assert "optional" not in call.request.tools[0].parameters
    assert call.answer is not None
    assert said([call.answer]) == [("assistant", 'search_for_weather_map {"place": "Oslo", "days": 2}')]
    assert end.answer == Message(Role.ASSISTANT, "Rain on the first day, sun on the second.")
    assert end.request.messages[-1].tool_name == "search_for_weather_map"
    assert call.session == end.session, "steps of one question are never on both sides of the gate"
    assert gave_up == ["gave_up"] and broken == ["invalid_demonstration"]
    rules.check_chat(end.request)


def test_a_toolbench_path_that_ends_before_its_answer_shows_nothing() -> None:
    record = records("toolbench")[0]
    assert read("toolbench", record | {"conversations": record["conversations"][:2]}) == ["no_demonstration"]
    for answer in ("I think so.", "Action: search\nAction Input: [1]", "Action: search\nAction Input: NaN"):
        turns = [*record["conversations"][:2], {"from": "assistant", "value": answer}]
        assert read("toolbench", record | {"conversations": turns}) == ["invalid_demonstration"]


def test_openai_files_teach_what_has_weight_and_one_call_a_turn() -> None:
    weighed, tools, parallel, deprecated = (read("openai", record) for record in records("openai"))
    assert only(weighed).answer == Message(Role.ASSISTANT, "No: Oslo.")
    call, answer = (each for each in tools if isinstance(each, Shown))
    assert said(call.request.messages) == [("user", "How is the weather in Oslo?")]
    assert call.answer == Message(Role.ASSISTANT, tool_calls=(ToolCall("get_weather", {"city": "Oslo"}),))
    assert answer.request.messages[-1].tool_name == "get_weather"
    both = only(parallel).answer
    assert both is not None and len(both.tool_calls) == 2  # the import leaves such a turn out
    old = only(deprecated)
    assert old.answer == Message(Role.ASSISTANT, tool_calls=(ToolCall("get_weather", {"city": "Bergen"}),))
    assert [tool.name for tool in old.request.tools] == ["get_weather"]


def test_a_browser_trajectory_teaches_each_action_with_the_page_that_it_was_done_on() -> None:
    (record,) = records("browsergym")
    found = read("browsergym", record)
    assert found[1] == "failed_action", "what the page refused is not taught"
    fill, click, answer = (each for each in found if isinstance(each, Shown))
    assert fill.answer is not None and click.answer is not None
    assert said([fill.answer, click.answer]) == [
        ("assistant", 'fill {"bid": "13", "value": "ann"}'),
        ("assistant", 'click {"bid": "15", "button": "left"}'),
    ]
    assert answer.answer == Message(Role.ASSISTANT, "You are in, ann.")
    assert "[15] button" in fill.request.messages[0].content
    shown = said(click.request.messages)
    assert [who for who, _ in shown] == ["user", "assistant", "tool", "assistant", "tool"]
    assert "there is no element 99" in shown[-1][1] and "[15] button" in shown[-1][1]
    assert "[15] button" not in shown[0][1] + shown[2][1], "former pages are not shown again"
    for each in (fill, click, answer):
        rules.check_chat(each.request)


def test_only_a_trajectory_that_reached_its_goal_by_known_actions_teaches() -> None:
    (record,) = records("browsergym")
    failed = record | {"summary_info": {"cum_reward": 0.0, "err_msg": None}}
    assert read("browsergym", failed) == ["failed_trajectory"]
    broken = record | {"summary_info": {"cum_reward": 1.0, "err_msg": "it broke"}}
    assert read("browsergym", broken) == ["failed_trajectory"]
    steps = [{"action": "mouse_click(1, 2)"}, {"action": "click('15')"}]
    assert read("browsergym", record | {"steps": steps}) == ["unknown_action"]


@pytest.mark.parametrize(
    "action",
    [
        "",
        "click",
        "click()",
        "click('1', 'left', [], 'more')",
        "click('1', bid='2')",
        "click(bid='1', speed=2)",
        "click('1'); click('2')",
        "click(open('/etc/passwd'))",
        "page.click('1')",
        "click(**{'bid': '1'})",
        "send_msg_to_user(1)",
        "report_infeasible()",
        "mouse_click(1, 2)",
        "(" * 1000,
        "click('\0')\0",
    ],
)
def test_what_is_not_one_known_call_of_literals_is_no_action(action: str) -> None:
    assert browser_actions.answer(action) is None


def test_the_actions_are_those_that_browsergym_declares() -> None:
    spec = find_spec("browsergym")
    assert spec is not None and spec.submodule_search_locations
    source = Path(next(iter(spec.submodule_search_locations)), "core", "action", "functions.py").read_text(
        "utf-8"
    )
    declared = {each.name: each for each in ast.parse(source).body if isinstance(each, ast.FunctionDef)}
    for tool in browser_actions.ACTIONS:
        arguments = declared[tool.name].args
        names = [each.arg for each in arguments.args]
        assert list(tool.parameters["properties"]) == names, tool.name
        required = names[: len(names) - len(arguments.defaults)]
        assert tool.parameters["required"] == required, tool.name
        for each in arguments.args:
            assert each.annotation is not None
            expected = _types(ast.unparse(each.annotation))
            assert _kinds(tool.parameters["properties"][each.arg]) == expected, (tool.name, each.arg)
    for name, parameter in browser_actions.SPOKEN.items():
        assert [each.arg for each in declared[name].args.args] == [parameter]


def _types(annotation: str) -> set[str]:
    """The JSON types that an annotation of BrowserGym's allows."""
    names = {"str": "string", "float": "number", "int": "integer", "bool": "boolean"}
    if annotation.startswith("Literal"):
        return {"string"}
    if annotation.startswith("list"):
        return {"array"}
    return {
        kind
        for each in annotation.split(" | ")
        for kind in ({names[each]} if each in names else _types(each))
    }


def _kinds(schema: dict[str, Any]) -> set[str]:
    if "anyOf" in schema:
        return {kind for each in schema["anyOf"] for kind in _kinds(each)}
    return {"string"} if "enum" in schema else {schema["type"]}


def test_a_trace_of_webarena_that_passed_teaches_each_action_with_the_page_that_it_was_done_on() -> None:
    (record,) = records("webarena-traces")
    found = [each for each in read("webarena-traces", record) if isinstance(each, Shown)]
    assert said(each.answer for each in found if each.answer is not None) == [
        ("assistant", 'type {"id": "18", "text": "blue mug", "press_enter": true}'),
        ("assistant", 'click {"id": "31"}'),
        ("assistant", "$7.00"),
    ]
    assert {each.session for each in found} == {"webarena.3"}
    shown = said(found[2].request.messages)
    assert shown[0] == ("user", "How much is the blue mug?")
    assert shown[-1][1].startswith("done\n\nhttp://localhost:7770/blue-mug\n[4] RootWebArea 'Blue mug'")
    for each in found:
        rules.check_chat(each.request)


def test_a_trace_that_failed_or_tells_no_goal_teaches_nothing(tmp_path: Path) -> None:
    (record,) = records("webarena-traces")
    assert list(webarena_traces.opened(tmp_path / "render_3.html")(record)) == ["failed_trajectory"]
    aimless = {"html": record["html"].replace("\nintent:", "\nwish:")}
    assert read("webarena-traces", aimless) == ["no_demonstration"]
    blind = {"html": record["html"].replace("```click [31]```", "```look around```")}
    assert [each for each in read("webarena-traces", blind) if isinstance(each, str)] == ["unknown_action"]


@pytest.mark.parametrize(
    ("raw", "parsed", "expected"),
    [
        ("", "click [5] where [5] is [5] link 'x [6]'", 'click {"id": "5"}'),
        ("```type [5] [a [b] c] [0]```", "", 'type {"id": "5", "text": "a [b] c", "press_enter": false}'),
        ("```click [1]``` no: ```hover [2]```", "", 'hover {"id": "2"}'),
        ("", "page_focus [1]", 'tab_focus {"index": "1"}'),
        ("", "new_tab", "new_tab {}"),
        ("", "scroll [down]", 'scroll {"direction": "down"}'),
        ("```stop [It is 7.]```", "", "It is 7."),
        ("```stop []```", "", None),
        ("", "click", None),
        ("", "none", None),
        ("", "", None),
    ],
)
def test_actions_of_webarena_are_read_as_it_writes_them(raw: str, parsed: str, expected: str | None) -> None:
    found = webarena_traces.answer({"raw_parsed_prediction": raw, "parsed_action": parsed})
    assert (None if found is None else said([found])[0][1]) == expected


def webarena_tasks() -> Path:
    """The tasks that the package libwebarena holds."""
    spec = find_spec("webarena")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)), "test.raw.json")


def test_every_real_task_of_webarena_is_a_request_without_an_answer() -> None:
    found = [only(list(webarena.shown(record))) for _, record in Records(webarena_tasks())]
    assert len(found) == 812
    for each in found:
        assert each.answer is None
        rules.check_chat(each.request)
    assert found[0].session == "webarena.0" and len({each.session for each in found}) == 812


def test_real_questions_of_bfcl_are_taught_with_their_accepted_call_and_nothing_held_out_is_parsed() -> None:
    path = bfcl.data_folder() / "BFCL_v4_simple_python.json"
    shown, questions = bfcl_items.opened(path), Records(path)
    taught = [each for _, record in questions for each in shown(record)]
    assert questions.held_out == 200
    known = {item.id: item for item in bfcl.items("simple_python")}
    found = [each for each in taught if isinstance(each, Shown)]
    assert len(found) > 190
    for each in found:
        assert each.answer is not None
        assert bfcl.score(each.answer.tool_calls[0], known[each.session])


@pytest.mark.parametrize(
    ("category", "reason"),
    [
        ("parallel", "several_calls"),
        ("irrelevance", "no_demonstration"),
        ("multi_turn_base", "no_demonstration"),
    ],
)
def test_questions_of_bfcl_that_no_single_call_answers_teach_nothing(category: str, reason: str) -> None:
    path = bfcl.data_folder() / f"BFCL_v4_{category}.json"
    read = bfcl_items.opened(path)
    assert {each for _, record in Records(path) for each in read(record)} == {reason}


def test_types_that_json_has_not_are_left_out() -> None:
    path = bfcl.data_folder() / "BFCL_v4_simple_java.json"
    read = bfcl_items.opened(path)
    reasons = {each for _, record in Records(path) for each in read(record) if isinstance(each, str)}
    assert "foreign_types" in reasons


def test_answers_of_bfcl_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "possible_answer").mkdir()
    (tmp_path / "possible_answer" / "BFCL_v4_x.json").write_text(
        '{"id": "x_0", "ground_truth": []}\n\n{"id": 1}\n'
    )
    with pytest.raises(ValueError, match=r"possible_answer/BFCL_v4_x.json, line 3: .* id and ground_truth"):
        bfcl_items.opened(tmp_path / "BFCL_v4_x.json")


@pytest.mark.parametrize(
    ("name", "record", "place"),
    [
        ("openai", {"messages": [{"role": "robot", "content": "x"}]}, ("messages", 0, "role")),
        ("openai", {"messages": [{"role": "user", "content": 5}]}, ("messages", 0, "content", "str")),
        (
            "openai",
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}
                ]
            },
            ("messages", 0, "tool_calls", 0, "function", "arguments"),
        ),
        (
            "openai",
            {"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": "[" * 100_000}}]},
            ("messages", 0, "function_call", "arguments"),
        ),
        ("openai", {"messages": [{"role": "user", "content": "x", "weight": 2}]}, ("messages", 0, "weight")),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, ("conversations", 0, "from")),
        ("sharegpt", {"conversations": [{"from": "gpt"}]}, ("conversations", 0, "value")),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "f(1)"}]}, ("conversations",)),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "x"}], "tools": "none"}, ("tools",)),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "x"}], "tools": '[{"n": 1}]'}, ("tools",)),
        (
            "agentinstruct",
            {"conversations": [{"from": "gpt", "value": "x", "loss": "yes"}]},
            ("conversations", 0, "loss"),
        ),
        ("toolbench", {"id": "q", "conversations": [{"from": "user", "value": "x"}]}, ("conversations",)),
        (
            "toolbench",
            {"id": "q", "conversations": [{"from": "system", "value": "x"}] * 2},
            ("conversations", 0, "value"),
        ),
        (
            "toolbench",
            {
                "id": "q",
                "conversations": [{"from": "system", "value": f"{toolbench._LISTED} __import__('os')"}] * 2,
            },
            ("conversations", 0, "value"),
        ),
        (
            "toolbench",
            {"id": "q", "conversations": [{"from": "system", "value": f"{toolbench._LISTED} [1]"}] * 2},
            ("conversations", 0, "value"),
        ),
        ("bfcl", {"id": "x_1", "question": [[{"role": "user"}]]}, ("question", 0, 0, "content")),
        (
            "browsergym",
            {"benchmark": "b", "goal": "", "steps": [{}], "summary_info": {"cum_reward": 1.0}},
            ("goal",),
        ),
        ("webarena", {"task_id": "1", "intent": "x", "sites": ["map"]}, ("task_id",)),
    ],
)
def test_a_record_that_is_not_in_its_format_names_the_field(
    name: str, record: dict[str, Any], place: tuple[Any, ...]
) -> None:
    with pytest.raises(ValidationError) as told:
        read(name, record) if name in FILES else list(FORMATS[name].opened(Path("x"))(record))
    assert place in {each["loc"] for each in told.value.errors()}
