"""Every error has its HTTP status; what nobody expected keeps its text to itself."""

from __future__ import annotations

import json
import logging

import pytest

from grpc_server.domain import errors
from grpc_server.http.refusal import BodyTooLarge, BodyTooSlow, refusal

STATUS = {
    "InvalidArgument": 400,
    "PromptTooLong": 400,
    "Unauthenticated": 401,
    "PermissionDenied": 403,
    "NotFound": 404,
    "BodyTooSlow": 408,
    "AlreadyExists": 409,
    "Precondition": 409,
    "Conflict": 409,
    "BodyTooLarge": 413,
    "Exhausted": 429,
    "SpoolFull": 429,
    "Cancelled": 499,
    "EngineFailed": 500,
    "Unavailable": 503,
    "EngineUnavailable": 503,
    "StoreUnavailable": 503,
    "ShuttingDown": 503,
    "DeadlineExceeded": 504,
}


def kinds(kind: type[errors.AgentLoopError] = errors.AgentLoopError) -> list[type[errors.AgentLoopError]]:
    return [each for below in kind.__subclasses__() for each in (below, *kinds(below))]


def test_every_error_has_a_status_that_is_no_accident() -> None:
    assert kinds()
    for kind in kinds():
        if kind.__module__.startswith("grpc_server."):
            told = refusal(kind("why"))
            above = [STATUS[each.__name__] for each in kind.__mro__ if each.__name__ in STATUS]
            assert told.status == above[0], kind
            assert json.loads(told.body())["error"]["message"] == "why"


def test_a_wait_is_told_in_whole_seconds_and_only_where_waiting_helps() -> None:
    assert refusal(errors.Exhausted("full", retry_after_seconds=1.2)).headers == {"retry-after": "2"}
    assert refusal(errors.Exhausted("full", retry_after_seconds=None)).headers == {}
    assert refusal(errors.InvalidArgument("no")).headers == {}


def test_a_caller_without_a_token_is_told_how_to_show_one() -> None:
    assert refusal(errors.Unauthenticated()).headers == {"www-authenticate": "Bearer"}


@pytest.mark.parametrize("error", [BodyTooLarge("large"), BodyTooSlow("slow")])
def test_a_body_that_is_not_read_to_its_end_ends_the_connection(error: errors.AgentLoopError) -> None:
    assert refusal(error).headers["connection"] == "close"


def test_fields_have_the_names_that_callers_wrote() -> None:
    for field, param in {
        "sampling.top_p": "top_p",
        "alias": "model",
        "session_id": "user",
        "messages[0]": "messages[0]",
        "": None,
    }.items():
        assert refusal(errors.InvalidArgument("no", field)).error["param"] == param


def test_what_nobody_expected_is_in_the_log_and_not_in_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        told = refusal(KeyError("secret"))
    assert told.status == 500
    assert "secret" not in told.body().decode()
    assert caplog.records[0].__dict__["reference"] in told.error["message"]
