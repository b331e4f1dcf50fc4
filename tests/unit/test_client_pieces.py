"""The client without a server: addresses, tokens, what is sent, what comes back, when to try again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from google.protobuf.message import Message as ProtobufMessage
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from agentloop import errors, wire
from agentloop.connection import connection
from agentloop.retry import ATTEMPTS, Attempts
from agentloop.types import Completed, Message, Route, Sampling, Started, Target, TextDelta, Tool, ToolCall
from agentloop.v1 import feedback_pb2, inference_pb2, model_pb2


class Refusal(grpc.RpcError):
    """A gRPC error as the library raises it."""

    def __init__(
        self, code: grpc.StatusCode, details: str | None = "why", *, status: bytes | None = None
    ) -> None:
        super().__init__()
        self._code, self._details = code, details
        self._trailers = () if status is None else (("grpc-status-details-bin", status),)

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._trailers


def told(code: grpc.StatusCode, *details: ProtobufMessage, text: str = "why") -> Refusal:
    """A refusal with details."""
    status = status_pb2.Status(code=code.value[0], message=text)
    for detail in details:
        status.details.add().Pack(detail)
    return Refusal(code, status=status.SerializeToString())


def wait(seconds: int) -> ProtobufMessage:
    info: ProtobufMessage = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=seconds))
    return info


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVER", "TOKEN", "TOKEN_FILE", "CA_FILE"):
        monkeypatch.delenv(f"AGENTLOOP_{name}", raising=False)


@pytest.mark.parametrize(
    ("address", "target", "tls"),
    [
        ("127.0.0.1:50051", "127.0.0.1:50051", False),
        ("127.8.0.1:1", "127.8.0.1:1", False),
        ("localhost:50051", "localhost:50051", False),
        ("[::1]:50051", "[::1]:50051", False),
        ("unix:/run/agentloop.sock", "unix:/run/agentloop.sock", False),
        ("models.example.org:443", "models.example.org:443", True),
        ("localhost.example.org:443", "localhost.example.org:443", True),
        ("10.0.0.1:50051", "10.0.0.1:50051", True),
        ("grpcs://127.0.0.1:50051", "127.0.0.1:50051", True),
        ("grpc://10.0.0.1:50051", "10.0.0.1:50051", False),
    ],
)
def test_a_token_leaves_the_host_in_plaintext_only_where_the_address_says_so(
    address: str, target: str, tls: bool
) -> None:
    found = connection(address)
    assert (found.target, found.tls) == (target, tls)


@pytest.mark.parametrize("address", ["http://127.0.0.1:80", "grpc://", "host:1 ", " "])
def test_an_address_that_is_none_is_refused_before_anything_is_sent(address: str) -> None:
    with pytest.raises(errors.ConfigurationError, match="server is"):
        connection(address)


def test_the_environment_gives_what_the_arguments_do_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ca.pem").write_bytes(b"pem")
    monkeypatch.setenv("AGENTLOOP_SERVER", "grpcs://a:1")
    monkeypatch.setenv("AGENTLOOP_TOKEN", "al_env")
    monkeypatch.setenv("AGENTLOOP_CA_FILE", str(tmp_path / "ca.pem"))
    found = connection()
    assert (found.target, found.token, found.ca_pem) == ("a:1", "al_env", b"pem")
    assert connection("b:1").target == "b:1"


def test_a_token_comes_from_the_argument_then_the_file_then_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    named, general = tmp_path / "named", tmp_path / "general"
    named.write_text("al_named\n")
    general.write_text("al_general\n")
    monkeypatch.setenv("AGENTLOOP_TOKEN_FILE", str(general))
    assert connection().token == "al_general"
    monkeypatch.setenv("AGENTLOOP_TOKEN", "al_env")
    assert connection().token == "al_env"
    assert connection(token_file=named).token == "al_named"
    assert connection(token="al_argument", token_file=named).token == "al_argument"


def test_a_tokens_file_is_read_again_when_it_changes_and_kept_to_while_it_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("al_first\n")
    found = connection(token_file=path)
    assert found.metadata == (("authorization", "Bearer al_first"),)
    path.write_text("al_second_one\n")
    assert found.token == "al_second_one"
    for broken in ("", "al_ü", "two words"):
        path.write_text(broken)
        assert found.token == "al_second_one"
    path.unlink()
    assert found.token == "al_second_one"
    other = tmp_path / "other"
    other.write_text("al_third")
    other.replace(path)
    assert found.token == "al_third"
    assert "al_third" not in repr(found)


def test_without_a_token_nothing_is_shown_and_a_token_is_not_in_the_repr() -> None:
    assert connection().metadata == ()
    found = connection(token="al_secret")
    assert found.metadata == (("authorization", "Bearer al_secret"),)
    assert "al_secret" not in repr(found)


def test_calls_that_nobody_waits_for_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = ("x-agentloop-priority", "batch")
    assert batch in connection(token="al_x", priority="batch").metadata
    monkeypatch.setenv("AGENTLOOP_PRIORITY", "batch")
    assert batch in connection().metadata
    assert connection(priority="interactive").metadata == ()
    monkeypatch.setenv("AGENTLOOP_PRIORITY", "urgent")
    with pytest.raises(errors.ConfigurationError, match="'urgent'; it must be interactive or batch"):
        connection()


def test_a_token_that_no_header_can_carry_and_a_file_that_is_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigurationError, match="ASCII"):
        connection(token="al_ä")
    with pytest.raises(errors.ConfigurationError, match=r"token file .*nowhere"):
        connection(token_file=tmp_path / "nowhere")
    with pytest.raises(errors.ConfigurationError, match="CA file"):
        connection(ca_file=tmp_path / "nowhere")


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_of_grpc_is_an_error_of_ours_that_keeps_it(code: grpc.StatusCode) -> None:
    error = errors.from_grpc(Refusal(code), "id")
    assert type(error) is not errors.RpcError
    assert (error.code, error.details, error.inference_id) == (code, "why", "id")
    assert str(error) == f"{code.name}: why"


def test_a_status_without_details_still_says_something() -> None:
    assert errors.from_grpc(Refusal(grpc.StatusCode.INTERNAL, None)).details == "no details"


def test_only_unavailable_is_tried_again_and_not_for_ever() -> None:
    attempts = Attempts.within(1000)
    delays = [attempts.delay_after(Refusal(grpc.StatusCode.UNAVAILABLE)) for _ in range(ATTEMPTS)]
    assert all(delay is not None and 0 <= delay <= 2 for delay in delays[:-1])
    assert delays[-1] is None
    for code in grpc.StatusCode:
        if code is not grpc.StatusCode.UNAVAILABLE:
            assert Attempts.within(1000).delay_after(Refusal(code)) is None


def test_a_wait_that_the_server_tells_is_kept_to() -> None:
    for code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
        delay = Attempts.within(1000).delay_after(told(code, wait(30)))
        assert delay is not None
        assert 30 <= delay <= 30 + 2
        assert Attempts.within(20).delay_after(told(code, wait(30))) is None
        assert Attempts.within(1000, safe=False).delay_after(told(code, wait(1))) is None
    assert Attempts.within(1000).delay_after(told(grpc.StatusCode.INTERNAL, wait(1))) is None


@pytest.mark.parametrize("seconds", [-(2**63), 2**63 - 1])
def test_a_wait_without_sense_does_no_harm(seconds: int) -> None:
    delay = Attempts.within(10).delay_after(told(grpc.StatusCode.UNAVAILABLE, wait(seconds)))
    assert delay is None or 0 <= delay < 10


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(grpc.StatusCode.NOT_FOUND, status=b"\xff\xff"),
        Refusal(
            grpc.StatusCode.NOT_FOUND, status=status_pb2.Status(code=3, message="why").SerializeToString()
        ),
        Refusal(grpc.StatusCode.NOT_FOUND, status=b""),
        Refusal(grpc.StatusCode.NOT_FOUND),
    ],
)
def test_details_that_are_broken_or_of_another_status_are_passed_over(refusal: Refusal) -> None:
    error = errors.from_grpc(refusal)
    assert isinstance(error, errors.NotFound)
    assert (error.reason, error.field_violations, error.retry_after_s) == ("", (), None)


def test_nothing_is_tried_again_where_that_may_do_harm_or_the_deadline_is_near() -> None:
    assert Attempts.within(1000, safe=False).delay_after(Refusal(grpc.StatusCode.UNAVAILABLE)) is None
    spent = Attempts.within(0)
    assert spent.remaining_s == 0
    assert spent.delay_after(Refusal(grpc.StatusCode.UNAVAILABLE)) is None


def chat(**options: object) -> inference_pb2.ChatRequest:
    values: dict[str, object] = {
        "tools": (),
        "tool_choice": "auto",
        "sampling": Sampling(),
        "json_schema": None,
        "alias": "",
        "model_version": "",
        "session_id": "",
        "messages": "hi",
    }
    return wire.chat_request(**(values | options))  # type: ignore[arg-type]


def test_a_plain_string_is_one_message_of_the_user_and_what_is_not_set_is_left_to_the_server() -> None:
    request = chat()
    assert [(turn.role, turn.content) for turn in request.messages] == [(inference_pb2.ROLE_USER, "hi")]
    assert not request.sampling.HasField("temperature")
    assert not request.HasField("response_format")


def test_all_that_a_request_can_hold_is_sent() -> None:
    request = chat(
        messages=[
            Message("system", "be brief"),
            Message("assistant", tool_calls=(ToolCall("f", {"a": [1, "ä"]}),)),
            Message("tool", "7", tool_name="f"),
        ],
        tools=[Tool("f", "does f", {"type": "object"})],
        tool_choice="required",
        sampling=Sampling(0, 0.5, 3, 4, 5, ("x",)),
        json_schema={"type": "object"},
        alias="agent",
        model_version="m:1",
        session_id="s",
    )
    assert json.loads(request.messages[1].tool_calls[0].arguments_json) == {"a": [1, "ä"]}
    assert request.messages[2].tool_name == "f"
    assert json.loads(request.tools[0].parameters_json_schema) == {"type": "object"}
    assert request.tool_choice == inference_pb2.TOOL_CHOICE_REQUIRED
    sampling = request.sampling
    drawn = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens, sampling.seed)
    assert (*drawn, list(sampling.stop)) == (0, 0.5, 3, 4, 5, ["x"])
    assert json.loads(request.response_format.json_schema) == {"type": "object"}
    assert (request.alias, request.model_version, request.session_id) == ("agent", "m:1", "s")


@pytest.mark.parametrize(
    "options",
    [
        {"tool_choice": "maybe"},
        {"messages": [Message("robot", "hi")]},  # type: ignore[arg-type]
        {"tools": [Tool("f", "", {"x": float("nan")})]},
        {"tools": [Tool("f", "", {"x": object()})]},
        {"sampling": Sampling(top_k=-1)},
        {"sampling": Sampling(seed=2**40)},
        {"messages": "\ud800"},
    ],
)
def test_what_cannot_be_sent_is_refused_here_with_a_reason(options: dict[str, object]) -> None:
    with pytest.raises(errors.ConfigurationError):
        chat(**options)


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.lists(st.booleans())))
def test_arguments_of_a_tool_call_come_back_as_they_went(arguments: dict[str, object]) -> None:
    sent = wire.message_to_proto(Message("assistant", tool_calls=(ToolCall("f", arguments),)))
    response = inference_pb2.ChatResponse(tool_call=sent.tool_calls[0])
    assert wire.event_from_proto(response) == ToolCall("f", arguments)


def test_an_answer_is_what_its_events_make() -> None:
    done = Completed("stop", 3, 2, 0.5, 1.5, 2.5)
    answer = wire.collect([Started("id", "m:1"), TextDelta("a"), TextDelta("b"), ToolCall("f", {}), done])
    assert (answer.inference_id, answer.model_version, answer.text) == ("id", "m:1", "ab")
    assert (answer.tool_calls, answer.completed) == ((ToolCall("f", {}),), done)


def test_an_answer_without_its_last_event_is_no_answer() -> None:
    with pytest.raises(errors.IncompleteStream):
        wire.collect([Started("id", "m:1"), TextDelta("half")])


def test_an_event_that_this_client_does_not_know_is_passed_over() -> None:
    assert wire.event_from_proto(inference_pb2.ChatResponse()) is None


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"boolean": False}, "boolean"),
        ({"score": 0.0}, "score"),
        ({"comment": ""}, "comment"),
        ({"demonstration": Message("assistant", "right")}, "demonstration"),
    ],
)
def test_feedback_is_the_one_value_given_even_if_it_is_empty(value: dict[str, object], field: str) -> None:
    absent = {"boolean": None, "score": None, "comment": None, "demonstration": None}
    request = wire.feedback_request("i", "f", **(absent | value))  # type: ignore[arg-type]
    assert isinstance(request, feedback_pb2.SubmitRequest)
    assert request.WhichOneof("value") == field


def test_feedback_of_none_or_two_values_is_refused() -> None:
    with pytest.raises(errors.ConfigurationError, match="2 values"):
        wire.feedback_request("i", "f", boolean=True, score=1.0, comment=None, demonstration=None)
    with pytest.raises(errors.ConfigurationError, match="0 values"):
        wire.feedback_request("i", "f", boolean=None, score=None, comment=None, demonstration=None)


def test_a_route_comes_back_as_it_went_without_roles_that_are_unknown() -> None:
    targets = (Target("m:1", "stable", 90), Target("m:2", "canary", 10))
    sent = wire.route_to_proto("default", targets, 7)
    sent.targets.append(model_pb2.Target(model_version="m:3", weight=5))
    assert wire.route_from_proto(sent) == Route("default", 7, targets)
    assert wire.route_from_proto(sent).stable == "m:1"
    assert Route("default", 0, ()).stable == ""


def test_a_weight_below_zero_is_refused() -> None:
    with pytest.raises(errors.ConfigurationError):
        wire.route_to_proto("default", [Target("m:1", "stable", -1)], 0)
