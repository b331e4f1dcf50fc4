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
"""

# ruff: noqa: N818 (a status is named as gRPC names it)
from __future__ import annotations

import grpc


class AgentLoopError(Exception):
    """Base of everything that this package raises."""


class ConfigurationError(AgentLoopError, ValueError):
    """An address, a token or a file is wrong; nothing was sent."""


class IncompleteStream(AgentLoopError):
    """The stream ended without saying that the answer is complete."""


class RpcError(AgentLoopError):
    """A call failed. `inference_id` is set where a stream had begun: the log has the inference by it."""

    def __init__(self, code: grpc.StatusCode, details: str, inference_id: str = "") -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details
        self.inference_id = inference_id


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
    return _BY_CODE.get(code, ServerError)(code, error.details() or "no details", inference_id)
