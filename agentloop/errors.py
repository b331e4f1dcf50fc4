"""What can go wrong, as one tree.

AgentLoopError
├── ConfigurationError       no request was made: an address, a token or a file is wrong
├── IncompleteStream         the stream ended without its last event
└── RpcError                 the server (or the way to it) said no; `.code` is the gRPC status
    ├── InvalidArgument      the request breaks a rule; the message names it
    ├── Unauthenticated      no token, or not one that is valid
    ├── PermissionDenied     the token lacks a scope
    ├── NotFound             no such alias or model version
    ├── AlreadyExists        the name is taken by other bytes
    ├── FailedPrecondition   not now: a file is missing, a model version is in use
    ├── Conflict             somebody else changed the route first
    ├── ResourceExhausted    no place; try again later
    ├── Unavailable          engine down, server stopping, or no server there
    ├── DeadlineExceeded     the deadline passed
    ├── Cancelled            the call was cancelled
    └── ServerError          everything else: a fault of the server

Branch on these, on `.reason` (`SPOOL_FULL` …) and on `.field_violations`, never on the text.
"""

# ruff: noqa: N818 (a status is named as gRPC names it)
from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from agentloop.v1 import inference_pb2


class AgentLoopError(Exception):
    """Base of everything that this package raises."""


class ConfigurationError(AgentLoopError, ValueError):
    """An address, a token or a file is wrong; nothing was sent."""


class IncompleteStream(AgentLoopError):
    """The stream ended without saying that the answer is complete."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field that breaks a rule: its path as in the proto (`sampling.top_p`), and the rule."""

    field: str
    description: str


class RpcError(AgentLoopError):
    """A call failed. What the server did not say is empty, or None.

    Attributes:
        code: the gRPC status.
        details: its text, for a person.
        inference_id: set where a stream had begun: the log has the inference by it.
        reason: why, as a word for programs.
        field_violations: on InvalidArgument, the fields that are wrong.
        retry_after_s: seconds after which another try may help.
        quota_subject: on ResourceExhausted, whose quota is used up: `server` or `caller:<name>`.
        input_tokens: where a stream had begun, tokens read until it ended.
        output_tokens: the same for tokens written.
    """

    def __init__(self, code: grpc.StatusCode, details: str, inference_id: str = "") -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details
        self.inference_id = inference_id
        self.reason = ""
        self.field_violations: tuple[FieldViolation, ...] = ()
        self.retry_after_s: float | None = None
        self.quota_subject = ""
        self.input_tokens: int | None = None
        self.output_tokens: int | None = None


class InvalidArgument(RpcError):
    """The request breaks a rule."""


class Unauthenticated(RpcError):
    """There is no token, or it is not valid."""


class PermissionDenied(RpcError):
    """The token lacks the scope that the call needs."""


class NotFound(RpcError):
    """There is no such alias or model version."""


class AlreadyExists(RpcError):
    """The model version exists, with other bytes."""


class FailedPrecondition(RpcError):
    """The state does not allow it: a file is missing, a model version is in use."""


class Conflict(RpcError):
    """The route's revision moved on: read it again."""


class ResourceExhausted(RpcError):
    """There is no place for the request now."""


class Unavailable(RpcError):
    """The engine is down, the server is stopping, or none is there."""


class DeadlineExceeded(RpcError):
    """The deadline passed."""


class Cancelled(RpcError):
    """The call was cancelled."""


class ServerError(RpcError):
    """A fault of the server, or a status that it never sends."""


_BY_CODE: dict[grpc.StatusCode, type[RpcError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.INTERNAL: ServerError,
    grpc.StatusCode.UNKNOWN: ServerError,
    grpc.StatusCode.DATA_LOSS: ServerError,
    grpc.StatusCode.UNIMPLEMENTED: ServerError,
}


def from_grpc(error: grpc.RpcError, inference_id: str = "") -> RpcError:
    """The error of ours that a gRPC error is."""
    code = error.code()  # every call's error has these two, though grpc.RpcError does not declare them
    made = _BY_CODE.get(code, ServerError)(code, error.details() or "no details", inference_id)
    if info := _detail(error, error_details_pb2.ErrorInfo()):
        made.reason = info.reason
    if bad := _detail(error, error_details_pb2.BadRequest()):
        made.field_violations = tuple(
            FieldViolation(each.field, each.description) for each in bad.field_violations
        )
    if (quota := _detail(error, error_details_pb2.QuotaFailure())) and quota.violations:
        made.quota_subject = quota.violations[0].subject
    if interrupted := _detail(error, inference_pb2.Interrupted()):
        made.inference_id = interrupted.inference_id
        made.input_tokens = interrupted.usage.input_tokens
        made.output_tokens = interrupted.usage.output_tokens
    made.retry_after_s = retry_after_s(error)
    return made


def retry_after_s(error: grpc.RpcError) -> float | None:
    """Seconds after which the server says that another try may help; None if it says nothing of it."""
    info = _detail(error, error_details_pb2.RetryInfo())
    return None if info is None else max(0.0, info.retry_delay.seconds + info.retry_delay.nanos / 1e9)


Detail = TypeVar("Detail", bound=Message)


def _detail(error: grpc.RpcError, kind: Detail) -> Detail | None:
    """What the status holds of this kind, unpacked into `kind`; None if nothing, or nothing that is whole."""
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # every call's error is a call
        for each in status.details if status is not None else ():
            if each.Unpack(kind):
                return kind
    except (DecodeError, ValueError, OverflowError):  # a proxy rewrote the status, or it is none of ours
        return None
    return None
