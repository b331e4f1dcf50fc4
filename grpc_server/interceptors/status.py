"""An error as `google.rpc.Status`: code and text, and what clients branch on without reading the text.

| detail        | on                                        | says                                          |
|---------------|-------------------------------------------|-----------------------------------------------|
| ErrorInfo     | every error                               | `reason`: SPOOL_FULL …; `domain`: agentloop   |
| BadRequest    | INVALID_ARGUMENT that names a field       | the field's path, as in the proto             |
| QuotaFailure  | RESOURCE_EXHAUSTED                        | whose quota: `server`, or `caller:<name>`     |
| RetryInfo     | what time alone may mend                  | seconds to wait, at the least                 |
| Interrupted   | every error that ends a begun stream      | the inference, its tokens and times so far    |

Status and details travel in trailers, and callers refuse those beyond 8 KiB (gRPC's default): the text takes
at most 3 bytes a byte in `grpc-message`, and with the details 4 for 3 in `grpc-status-details-bin`.
"""

from __future__ import annotations

import re

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from agentloop.v1 import inference_pb2
from grpc_server.domain import errors
from grpc_server.domain.types import InferenceEnded

DOMAIN = "agentloop"
KEY = "grpc-status-details-bin"
MAX_TEXT_BYTES = 1000
"""Of a status' text, in UTF-8. It may quote the caller."""
MAX_FIELD_BYTES = 200
MAX_DESCRIPTION_BYTES = 400
"""Of the text that stands once more beside a field, or a quota."""
MAX_RETRY_SECONDS = 3600.0

CODES: dict[type[errors.AgentLoopError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.Precondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Conflict: grpc.StatusCode.ABORTED,
    errors.Exhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.EngineFailed: grpc.StatusCode.INTERNAL,
}

Trailers = tuple[tuple[str, str | bytes], ...]


def code(error: errors.AgentLoopError) -> grpc.StatusCode:
    """The status of `error`: its own, or that of the nearest class above it."""
    return next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), grpc.StatusCode.INTERNAL)


def reason(error: errors.AgentLoopError) -> str:
    """The class's name as ErrorInfo writes it: SPOOL_FULL."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).upper()


def of_error(error: errors.AgentLoopError) -> tuple[grpc.StatusCode, str, Trailers]:
    """What ends the call: status, text, and the trailers that hold the details."""
    return made(code(error), str(error), reason(error), *_details(error))


def made(
    status: grpc.StatusCode, text: str, why: str, *details: Message
) -> tuple[grpc.StatusCode, str, Trailers]:
    """A status of this text, with an ErrorInfo of this reason and the other details."""
    text = clipped(text)
    packed = []
    for detail in (error_details_pb2.ErrorInfo(reason=why, domain=DOMAIN), *details):
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    message = status_pb2.Status(code=status.value[0], message=text, details=packed)
    return status, text, ((KEY, message.SerializeToString()),)


def clipped(text: str, size: int = MAX_TEXT_BYTES) -> str:
    """`text` within `size` bytes of UTF-8, an ellipsis for what is left out."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= size:
        return encoded.decode()
    return encoded[: size - len("…".encode())].decode(errors="ignore") + "…"


def _details(error: errors.AgentLoopError) -> list[Message]:
    text = clipped(str(error), MAX_DESCRIPTION_BYTES)
    details: list[Message] = []
    if isinstance(error, errors.InvalidArgument) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=clipped(error.field, MAX_FIELD_BYTES), description=text
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, errors.Exhausted):
        quota = error_details_pb2.QuotaFailure.Violation(
            subject=clipped(error.subject, MAX_FIELD_BYTES), description=text
        )
        details.append(error_details_pb2.QuotaFailure(violations=[quota]))
    if isinstance(error, errors.Exhausted | errors.Unavailable) and error.retry_after_seconds is not None:
        details.append(_retry_info(error.retry_after_seconds))
    if error.ended is not None:
        details.append(_interrupted(error.ended))
    return details


def _interrupted(end: InferenceEnded) -> Message:
    return inference_pb2.Interrupted(
        inference_id=str(end.id),
        usage=inference_pb2.Usage(input_tokens=end.usage.input_tokens, output_tokens=end.usage.output_tokens),
        timings=inference_pb2.Timings(
            queue_ms=end.timings.queue_ms,
            time_to_first_token_ms=end.timings.ttft_ms or 0.0,
            total_ms=end.timings.total_ms,
        ),
    )


def _retry_info(seconds: float) -> Message:
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(round(min(max(seconds, 0.0), MAX_RETRY_SECONDS) * 1000))
    info: Message = error_details_pb2.RetryInfo(retry_delay=delay)
    return info
