"""Errors as OpenAI's API tells them: an HTTP status, and a JSON body that its clients read.

| status | is                                                          | clients try again |
|--------|-------------------------------------------------------------|-------------------|
| 400    | the request is wrong; `param` names the field               | no                |
| 401    | no token, or none that is valid                             | no                |
| 403    | the token's scopes do not allow this                        | no                |
| 404    | no such model                                               | no                |
| 408    | the request's body came too slowly                          | yes               |
| 409    | the state of things does not allow this now                 | yes               |
| 413    | the request's body is too large                             | no                |
| 429    | no place, or a quota is used up; `Retry-After` says when    | yes               |
| 499    | the inference was cancelled by its id                       | no                |
| 500    | the engine answered nonsense, or a fault of the server      | yes               |
| 503    | the engine is down, or the server stops; `Retry-After` too  | yes               |
| 504    | the deadline has passed                                     | yes               |
"""

from __future__ import annotations

import json
import logging
import math
import uuid
from dataclasses import dataclass
from typing import Any

from grpc_server.domain import errors

log = logging.getLogger(__name__)


class BodyTooLarge(errors.InvalidArgument):
    """More bytes than are taken."""


class BodyTooSlow(errors.DeadlineExceeded):
    """The body did not arrive in time."""


STATUSES: dict[type[errors.AgentLoopError], tuple[int, str, str]] = {
    errors.InvalidArgument: (400, "invalid_request_error", "invalid_value"),
    errors.PromptTooLong: (400, "invalid_request_error", "context_length_exceeded"),
    BodyTooLarge: (413, "invalid_request_error", "body_too_large"),
    BodyTooSlow: (408, "invalid_request_error", "body_too_slow"),
    errors.Unauthenticated: (401, "authentication_error", "invalid_api_key"),
    errors.PermissionDenied: (403, "permission_error", "permission_denied"),
    errors.NotFound: (404, "invalid_request_error", "model_not_found"),
    errors.AlreadyExists: (409, "invalid_request_error", "already_exists"),
    errors.Precondition: (409, "invalid_request_error", "precondition"),
    errors.Conflict: (409, "invalid_request_error", "conflict"),
    errors.Exhausted: (429, "rate_limit_error", "rate_limit_exceeded"),
    errors.Cancelled: (499, "invalid_request_error", "cancelled"),
    errors.DeadlineExceeded: (504, "timeout_error", "deadline_exceeded"),
    errors.Unavailable: (503, "server_error", "unavailable"),
    errors.EngineFailed: (500, "server_error", "engine_failed"),
}
"""Of each error: status, and OpenAI's `type` and `code`. A class below takes what its nearest has."""

_UNEXPECTED = (500, "server_error", "internal_error")
_FIELDS = {"alias": "model", "model_version": "model", "session_id": "user", "texts": "input"}
"""What a request of OpenAI's calls our fields."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a caller is told."""

    status: int
    error: dict[str, Any]
    headers: dict[str, str]

    def body(self) -> bytes:
        """The JSON, as UTF-8."""
        return json.dumps({"error": self.error}, ensure_ascii=False).encode(errors="replace")


def refusal(error: BaseException) -> Refusal:
    """What to tell of `error`. The text of one that nobody expected stays here, in the log."""
    if not isinstance(error, errors.AgentLoopError):
        reference = uuid.uuid4().hex[:12]
        log.error("unexpected error", extra={"reference": reference}, exc_info=error)
        return _made(_UNEXPECTED, f"internal error; the server's log has it as {reference}", None, {})
    kind = next((STATUSES[each] for each in type(error).__mro__ if each in STATUSES), _UNEXPECTED)
    headers = {}
    if isinstance(error, errors.Exhausted | errors.Unavailable) and error.retry_after_seconds is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_seconds)))
    if kind[0] == 401:
        headers["www-authenticate"] = "Bearer"
    if kind[0] in (408, 413):
        headers["connection"] = "close"  # what is left of the body is not waited for
    field = error.field if isinstance(error, errors.InvalidArgument) else ""
    return _made(kind, str(error), _param(field), headers)


def _made(kind: tuple[int, str, str], text: str, param: str | None, headers: dict[str, str]) -> Refusal:
    status, name, code = kind
    return Refusal(status, {"message": text, "type": name, "param": param, "code": code}, headers)


def _param(field: str) -> str | None:
    return _FIELDS.get(field, field.removeprefix("sampling.")) or None
