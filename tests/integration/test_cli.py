"""`agent-loop` against a server on the real gRPC: what it prints, sends, and ends with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner, Result

from agentloop.cli import app
from agentloop.cli_session import printable
from agentloop.v1 import inference_pb2, model_pb2
from tests.integration.conftest_client import ScriptedService, completed, running, started, text, tool_call

WEATHER = {"name": "weather", "description": "Weather.", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVER", "TOKEN", "TOKEN_FILE", "CA_FILE"):
        monkeypatch.delenv(f"AGENTLOOP_{name}", raising=False)


@pytest.fixture
def service() -> Iterator[ScriptedService]:
    with running(ScriptedService()) as made:
        yield made


def call(service: ScriptedService, *arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, ["--server", service.address, "--token", "al_x", *arguments], input=stdin)


def chat_asked(service: ScriptedService) -> inference_pb2.ChatRequest:
    (request,) = service.asked
    assert isinstance(request, inference_pb2.ChatRequest)
    return request


def test_infer_prints_the_answer_and_says_apart_which_inference_it_was(service: ScriptedService) -> None:
    service.chats = [[started(), text("Good "), text("morning"), completed()]]
    result = call(service, "infer", "hello")
    assert (result.exit_code, result.stdout) == (0, "Good morning\n")
    assert "inference i-1 by m:1" in result.stderr
    assert "3 tokens read, 2 written" in result.stderr


def test_infer_as_json_prints_a_line_for_each_event(service: ScriptedService) -> None:
    service.chats = [[started(), text("hi"), tool_call("f", '{"a": 1}'), completed()]]
    result = call(service, "infer", "hello", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["event"] for line in lines] == ["started", "text", "tool_call", "completed"]
    assert lines[0]["inference_id"] == "i-1"
    assert lines[2]["arguments"] == {"a": 1}
    assert lines[3]["finish_reason"] == "stop"


def test_infer_gives_scripts_the_whole_answer_as_one_object(service: ScriptedService) -> None:
    service.chats = [[started(), text("Good "), text("day"), tool_call("f", "{}"), completed()]]
    result = call(service, "infer", "hello", "--whole")
    answer = json.loads(result.stdout)
    assert (answer["inference_id"], answer["text"]) == ("i-1", "Good day")
    assert answer["tool_calls"] == [{"name": "f", "arguments": {}}]
    assert answer["completed"]["output_tokens"] == 2
    service.chats = [[started(), text("Good "), grpc.StatusCode.INTERNAL]]
    result = call(service, "infer", "hello", "--whole")
    assert (result.exit_code, result.stdout) == (1, "")
    assert json.loads(result.stderr)["error"]["status"] == "INTERNAL"


def test_infer_reads_the_prompt_from_standard_input(service: ScriptedService) -> None:
    service.chats = [[started(), completed()]]
    assert call(service, "infer", stdin="from a pipe").exit_code == 0
    assert chat_asked(service).messages[0].content == "from a pipe"


def test_infer_sends_every_option(service: ScriptedService, tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([WEATHER, {"type": "function", "function": WEATHER | {"name": "b"}}]))
    service.chats = [[started(), tool_call("weather", '{"city": "Oslo"}'), completed()]]
    options = ["--system", "be brief", "--tools", str(tools), "--tool-choice", "required", "--alias", "agent"]
    options += ["--temperature", "0", "--top-p", "0.5", "--top-k", "3", "--max-tokens", "4", "--seed", "5"]
    options += ["--stop", "x", "--stop", "y", "--session", "s", "--model-version", "m:1", "--timeout", "9"]
    result = call(service, "infer", "hello", *options)
    assert json.loads(result.stdout) == {"name": "weather", "arguments": {"city": "Oslo"}}
    request = chat_asked(service)
    assert [turn.content for turn in request.messages] == ["be brief", "hello"]
    assert [tool.name for tool in request.tools] == ["weather", "b"]
    assert request.tool_choice == inference_pb2.TOOL_CHOICE_REQUIRED
    assert (request.alias, request.model_version, request.session_id) == ("agent", "m:1", "s")
    drawn = request.sampling
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.max_tokens, drawn.seed) == (0, 0.5, 3, 4, 5)
    assert list(drawn.stop) == ["x", "y"]
    assert 0 < service.deadlines[0] < 10  # gRPC rounds a little up


def test_infer_holds_the_answer_to_a_schema(service: ScriptedService, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    service.chats = [[started(), text("{}"), completed()]]
    assert call(service, "infer", "hello", "--schema", str(schema)).exit_code == 0
    assert json.loads(chat_asked(service).response_format.json_schema) == {"type": "object"}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not JSON"),
        ("{}", "holds no JSON list"),
        ('[{"x": 1}]', "has no name"),
        ("[3]", "has no name"),
    ],
)
def test_a_file_of_tools_that_is_none_is_wrong_usage(
    service: ScriptedService, tmp_path: Path, content: str, complaint: str
) -> None:
    tools = tmp_path / "t.json"
    tools.write_text(content)
    result = call(service, "infer", "hello", "--tools", str(tools))
    assert result.exit_code == 2
    assert complaint in " ".join(result.stderr.replace("│", " ").split())
    assert service.asked == []


def test_a_file_that_is_not_there_is_wrong_usage(service: ScriptedService, tmp_path: Path) -> None:
    assert call(service, "infer", "hello", "--schema", str(tmp_path / "none")).exit_code == 2


def test_an_answer_cannot_drive_the_terminal_of_its_reader(service: ScriptedService) -> None:
    service.chats = [[started(), text("\x1b[2Jgone\n\tstays"), completed()]]
    assert "\x1b" in call(service, "infer", "hello").stdout  # a file or a pipe gets what was answered
    assert printable("\x1b[2Jgone\n\tstays", to_terminal=True) == "\N{REPLACEMENT CHARACTER}[2Jgone\n\tstays"


@pytest.mark.parametrize(
    ("status", "exit_code"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 1),
        (grpc.StatusCode.INTERNAL, 1),
        (grpc.StatusCode.UNAUTHENTICATED, 1),
        (grpc.StatusCode.NOT_FOUND, 4),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 5),
    ],
)
def test_the_exit_code_says_what_kind_of_failure_it_was(
    service: ScriptedService, status: grpc.StatusCode, exit_code: int
) -> None:
    service.chats = [[status]] * 2
    result = call(service, "infer", "hello")
    assert result.exit_code == exit_code
    assert f"{status.name}: as scripted" in result.stderr
    as_json = call(service, "infer", "hello", "--json")
    assert json.loads(as_json.stderr) == {"error": {"status": status.name, "message": "as scripted"}}


def test_no_server_is_exit_code_5_and_names_the_address() -> None:
    with running(ScriptedService()) as service:
        gone = service.address
    result = CliRunner().invoke(app, ["--server", gone, "health", "--timeout", "1"])
    assert result.exit_code == 5
    assert f"Is a server running at {gone}?" in result.stderr


def test_an_address_that_is_none_is_wrong_usage() -> None:
    result = CliRunner().invoke(app, ["--server", "http://x", "health"])
    assert result.exit_code == 2
    as_json = CliRunner().invoke(app, ["--server", "http://x", "health", "--json"])
    assert json.loads(as_json.stderr)["error"]["status"] == "ConfigurationError"


def test_the_token_may_lie_in_a_file(service: ScriptedService, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("al_file\n")
    options = ["--server", service.address, "--token-file", str(tmp_path / "token")]
    assert CliRunner().invoke(app, [*options, "models", "list"]).exit_code == 0
    assert service.tokens == ["Bearer al_file"]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--good"], "boolean"),
        (["--bad"], "boolean"),
        (["--score", "0.5"], "score"),
        (["--comment", "well"], "comment"),
    ],
)
def test_feedback_is_sent(service: ScriptedService, options: list[str], field: str) -> None:
    result = call(service, "feedback", "i-1", *options, "--id", "f-1")
    assert (result.exit_code, result.stdout) == (0, "f-1\n")
    (request,) = service.asked
    assert request.WhichOneof("value") == field  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("answer", "content", "calls"),
    [({"content": "right"}, "right", []), ({"name": "f", "arguments": {"a": 1}}, "", ["f"])],
)
def test_a_demonstration_is_read_from_standard_input(
    service: ScriptedService, answer: dict[str, object], content: str, calls: list[str]
) -> None:
    result = call(service, "feedback", "i-1", "--demonstration", "-", "--json", stdin=json.dumps(answer))
    assert json.loads(result.stdout)["inference_id"] == "i-1"
    (request,) = service.asked
    shown = request.demonstration  # type: ignore[attr-defined]
    assert (shown.role, shown.content) == (inference_pb2.ROLE_ASSISTANT, content)
    assert [call.name for call in shown.tool_calls] == calls


def test_feedback_without_a_value_or_with_a_strange_demonstration_is_wrong_usage(
    service: ScriptedService,
) -> None:
    assert call(service, "feedback", "i-1").exit_code == 2
    assert call(service, "feedback", "i-1", "--demonstration", "-", stdin="{}").exit_code == 2
    assert service.asked == []


def test_health_is_exit_code_0_only_if_it_serves(service: ScriptedService) -> None:
    assert call(service, "health").stdout == "SERVING\n"
    service.serving = False
    result = call(service, "health", "--json")
    assert json.loads(result.stdout) == {"service": "", "status": "NOT_SERVING"}
    assert result.exit_code == 1


def test_models_are_installed_with_the_hash_of_the_file(service: ScriptedService, tmp_path: Path) -> None:
    gguf = tmp_path / "räum & gguf"
    gguf.write_bytes(b"GGUF")
    first = call(service, "models", "install", "m:1", str(gguf), "--json")
    shown = json.loads(first.stdout)
    assert shown["changed"] is True
    assert shown["model"]["sha256"] == hashlib.sha256(b"GGUF").hexdigest()
    again = call(service, "models", "install", "m:1", str(gguf), "--sha256", "AB")
    assert again.stdout == "m:1 was installed already\n"
    assert service.asked[-1].sha256 == "ab"  # type: ignore[attr-defined]
    assert service.asked[-1].path == str(gguf)  # type: ignore[attr-defined]


def test_a_file_that_is_only_on_the_servers_host_needs_its_hash(service: ScriptedService) -> None:
    missing = call(service, "models", "install", "m:1", "/not/here.gguf")
    assert missing.exit_code == 2
    assert call(service, "models", "install", "m:1", "/not/here.gguf", "--sha256", "ab").exit_code == 0


def test_models_are_listed_and_removed(service: ScriptedService) -> None:
    service.installed["m:1"] = model_pb2.ModelVersion(name="m:1", sha256="ab" * 32, size_bytes=253_000_000)
    assert "253" in call(service, "models", "list").stdout
    (listed,) = json.loads(call(service, "models", "list", "--json").stdout)["models"]
    assert listed == {"name": "m:1", "sha256": "ab" * 32, "size_bytes": 253_000_000, "loaded": False}
    assert call(service, "models", "remove", "m:1").stdout == "m:1 removed\n"
    assert json.loads(call(service, "models", "remove", "m:1", "--json").stdout)["changed"] is False


def test_a_model_is_shown_loaded_and_unloaded(service: ScriptedService) -> None:
    service.installed["m:1"] = model_pb2.ModelVersion(name="m:1", sha256="ab" * 32, size_bytes=253_000_000)
    assert call(service, "models", "load", "m:1").stdout == "m:1 loaded\n"
    assert call(service, "models", "load", "m:1").stdout == "m:1 was loaded already\n"
    shown = json.loads(call(service, "models", "show", "m:1", "--json").stdout)
    assert shown["model"]["loaded"] is True
    assert (shown["parameters"], shown["quantization"]) == (268_098_176, "Q4_K_M")
    table = call(service, "models", "show", "m:1").stdout
    for what in ("268 million", "Q4_K_M", "32768 tokens", "m:base", "default"):
        assert what in table
    refused = call(service, "models", "unload", "m:1")
    assert (refused.exit_code, refused.stderr) == (1, "FAILED_PRECONDITION: route default leads to it\n")
    assert json.loads(call(service, "models", "unload", "m:1", "--force", "--json").stdout)["changed"] is True
    assert call(service, "models", "unload", "m:1", "--force").stdout == "m:1 was not loaded\n"
    assert call(service, "models", "show", "m:9").exit_code == 4


def test_an_installation_shows_a_bar_where_a_person_looks(
    service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    shown = call(service, "models", "install", "m:1", "/not/here.gguf", "--sha256", "ab")
    assert "copying, host 2 of 3" in shown.stderr
    assert shown.stdout == "m:1 installed\n"


def test_a_route_is_set_and_shown(service: ScriptedService) -> None:
    targets = ["--target", "m:1=stable:90", "--target", "m:2=canary:10"]
    first = json.loads(call(service, "route", "set", *targets, "--revision", "0", "--json").stdout)
    assert first == {
        "alias": "default",
        "revision": 1,
        "changed": True,
        "targets": [
            {"model_version": "m:1", "role": "stable", "weight": 90},
            {"model_version": "m:2", "role": "canary", "weight": 10},
        ],
    }
    shown = json.loads(call(service, "route", "get", "--json").stdout)
    assert shown == {name: first[name] for name in ("alias", "revision", "targets")}
    assert "m:2" in call(service, "route", "get").stdout


def test_the_same_route_again_changes_nothing(service: ScriptedService) -> None:
    set_route = ["route", "set", "--target", "m:1=stable:100", "--json"]
    assert json.loads(call(service, *set_route).stdout)["changed"] is True
    second = json.loads(call(service, *set_route, "--revision", "0").stdout)
    assert (second["changed"], second["revision"]) == (False, 1)


def test_a_route_that_has_moved_on_is_exit_code_3(service: ScriptedService) -> None:
    call(service, "route", "set", "--target", "m:1=stable:100")
    result = call(service, "route", "set", "--target", "m:2=stable:100", "--revision", "0")
    assert result.exit_code == 3
    assert "the revision is 1" in result.stderr


def test_an_alias_without_a_route_is_exit_code_4(service: ScriptedService) -> None:
    assert call(service, "route", "get", "--alias", "nobody").exit_code == 4


@pytest.mark.parametrize(
    "target",
    ["m:1", "m:1=boss:9", "=stable:9", "m:1=stable", "m:1=stable:x", "m:1=stable:101", "m:1=stable:-1"],
)
def test_a_target_that_is_none_is_wrong_usage(service: ScriptedService, target: str) -> None:
    assert call(service, "route", "set", "--target", target).exit_code == 2
    assert service.asked == []


def test_the_version_is_printed() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.strip().count(".") == 2
