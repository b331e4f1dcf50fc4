"""Errors as `google.rpc.Status`: what clients branch on, within what fits into trailers."""

from __future__ import annotations

import base64
from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from grpc_server.domain import errors
from grpc_server.interceptors import status

CLIENTS_LIMIT = 8 * 1024
"""gRPC's soft limit of a caller's metadata; each entry counts 32 bytes more than its name and value."""
KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.AgentLoopError)
]


def details(error: errors.AgentLoopError) -> dict[str, object]:
    """The details of an error's status, by the name of their kind."""
    _, _, trailers = status.of_error(error)
    [(key, value)] = trailers
    assert key == "grpc-status-details-bin"
    assert isinstance(value, bytes)
    found: dict[str, object] = {}
    for packed in status_pb2.Status.FromString(value).details:
        name = packed.type_url.rpartition(".")[2]
        message = getattr(error_details_pb2, name)()
        assert packed.Unpack(message)
        found[name] = message
    return found


def test_every_error_tells_its_reason_and_whose_error_it_is() -> None:
    for kind in KINDS:
        info = details(kind("why"))["ErrorInfo"]
        assert isinstance(info, error_details_pb2.ErrorInfo)
        assert info.domain == "agentloop"
        assert info.reason.replace("_", "").lower() == kind.__name__.lower()
        assert info.reason == info.reason.upper()


def test_the_status_says_the_same_as_its_details() -> None:
    code, text, [(_, value)] = status.of_error(errors.NotFound("there is no alias x"))
    assert isinstance(value, bytes)
    whole = status_pb2.Status.FromString(value)
    assert (code, text) == (grpc.StatusCode.NOT_FOUND, "there is no alias x")
    assert (whole.code, whole.message) == (code.value[0], text)


def test_a_wrong_field_is_named() -> None:
    bad = details(errors.InvalidArgument("top_p is 2; it must be above 0, to 1", "sampling.top_p"))[
        "BadRequest"
    ]
    assert isinstance(bad, error_details_pb2.BadRequest)
    [violation] = bad.field_violations
    assert (violation.field, violation.description) == (
        "sampling.top_p",
        "top_p is 2; it must be above 0, to 1",
    )
    assert "BadRequest" not in details(errors.InvalidArgument("no field of it"))


def test_a_quota_says_whose_it_is_and_when_to_come_back() -> None:
    found = details(errors.Exhausted("too many", retry_after_seconds=2.5, subject="caller:billing"))
    quota, retry = found["QuotaFailure"], found["RetryInfo"]
    assert isinstance(quota, error_details_pb2.QuotaFailure)
    assert isinstance(retry, error_details_pb2.RetryInfo)
    assert [violation.subject for violation in quota.violations] == ["caller:billing"]
    assert retry.retry_delay.ToTimedelta().total_seconds() == 2.5


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (errors.Exhausted("full"), 1.0),
        (errors.SpoolFull("full"), 5.0),
        (errors.Exhausted("a full disk", retry_after_seconds=None), None),
        (errors.EngineUnavailable("down"), 1.0),
        (errors.ShuttingDown("away", retry_after_seconds=0.25), 0.25),
        (errors.Exhausted("", retry_after_seconds=-3), 0.0),
        (errors.Exhausted("", retry_after_seconds=1e300), 3600.0),
        (errors.InvalidArgument("wrong"), None),
        (errors.DeadlineExceeded("late"), None),
    ],
)
def test_what_passes_with_time_says_how_long_to_wait(
    error: errors.AgentLoopError, seconds: float | None
) -> None:
    retry = details(error).get("RetryInfo")
    if seconds is None:
        assert retry is None
    else:
        assert isinstance(retry, error_details_pb2.RetryInfo)
        assert retry.retry_delay.ToTimedelta().total_seconds() == seconds


@given(
    text=st.text(min_size=1).map(lambda text: text * 500), field=st.text(min_size=1).map(lambda t: t * 500)
)
def test_a_status_fits_into_a_callers_headers_whatever_it_quotes(text: str, field: str) -> None:
    for error in (
        errors.InvalidArgument(text, field),
        errors.Exhausted(text, retry_after_seconds=1e9, subject=field),
    ):
        _, message, [(key, value)] = status.of_error(error)
        assert isinstance(value, bytes)
        size = len("grpc-message") + len(quote(message)) + 32 + len(key) + len(base64.b64encode(value)) + 32
        assert size < CLIENTS_LIMIT - 512, size


def test_a_long_text_is_cut_at_a_character() -> None:
    assert status.clipped("short") == "short"
    assert status.clipped("ä" * 600) == "ä" * 498 + "…"
    assert status.clipped("a\ud800b") == "a?b"
