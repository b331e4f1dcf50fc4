"""What the log is asked, and what it shows: filters, pages and their tokens. Pure.

A caller's own inferences are those of its name, not of its key: tokens are rotated, and an audit must reach
back beyond the last rotation.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

from grpc_server.domain.errors import InvalidArgument, PermissionDenied
from grpc_server.domain.rules import MAX_SESSION_CHARACTERS, check_identifier, check_model_version
from grpc_server.domain.types import (
    Caller,
    Feedback,
    FinishReason,
    JsonObject,
    Scope,
    Status,
    TargetRole,
    Timings,
    Usage,
)

DEFAULT_PAGE = 50
LARGEST_PAGE = 200
MAX_CALLER_CHARACTERS = 128
_MAX_TOKEN_CHARACTERS = 64
_LAST = UUID(int=2**128 - 1)
_DIGEST_BYTES = 12


@dataclass(frozen=True, slots=True)
class LogFilter:
    """Which inferences; what is None or empty does not matter. Times are those of acceptance: the id's."""

    caller: str = ""
    since: datetime | None = None
    until: datetime | None = None
    session_id: str = ""
    model_version: str = ""
    status: Status | None = None


@dataclass(frozen=True, slots=True)
class LoggedInference:
    """A row of the log. Request, answer and feedback are only there where one inference was asked for."""

    id: UUID
    caller: str
    key_id: str
    alias: str
    model_version: str
    target_role: TargetRole
    session_id: str
    status: Status
    finish_reason: FinishReason | None
    error: str
    usage: Usage
    timings: Timings
    started_at: datetime
    ended_at: datetime | None
    feedback_count: int = 0
    request: JsonObject | None = None
    answer: JsonObject | None = None
    feedback: tuple[Feedback, ...] = ()


@dataclass(frozen=True, slots=True)
class LogPage:
    """Rows by falling id, and the id below which the next page goes on; None: there is none."""

    rows: Sequence[LoggedInference]
    below: UUID | None


def allowed(caller: Caller, wanted: LogFilter) -> LogFilter:
    """The filter, narrowed to what `caller` may see.

    Raises:
        InvalidArgument: for what no row can be.
        PermissionDenied: for another caller's rows, without the scope admin.
    """
    check_identifier("caller", wanted.caller, MAX_CALLER_CHARACTERS)
    check_identifier("session_id", wanted.session_id, MAX_SESSION_CHARACTERS)
    if wanted.model_version:
        check_model_version(wanted.model_version)
    if caller.may(Scope.ADMIN):
        return wanted
    if wanted.caller not in ("", caller.name):
        raise PermissionDenied(f"caller needs the scope {Scope.ADMIN}; leave it out to see your own")
    return replace(wanted, caller=caller.name)


def page_size(wanted: int) -> int:
    """How many rows a page may hold: a caller who wants more gets the most (https://google.aip.dev/158)."""
    return min(wanted or DEFAULT_PAGE, LARGEST_PAGE)


def id_range(wanted: LogFilter) -> tuple[UUID, UUID]:
    """The first id of the filter's time, and the last one that is below its end; both inclusive."""
    first = UUID(int=0) if wanted.since is None else first_id(wanted.since)
    if wanted.until is None:
        return first, _LAST
    return first, UUID(int=max(first_id(wanted.until).int - 1, 0))


def first_id(moment: datetime) -> UUID:
    """The least UUIDv7 of a moment: its first 48 bits are Unix milliseconds (RFC 9562, 5.7)."""
    milliseconds = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    return UUID(int=min(max(milliseconds, 0), 2**48 - 1) << 80)


def page_token(caller: Caller, wanted: LogFilter, below: UUID | None) -> str:
    """What goes on below an id, of this filter and for this caller only; empty if there is no such id."""
    if below is None:
        return ""
    return base64.urlsafe_b64encode(_bound_to(caller, wanted) + below.bytes).rstrip(b"=").decode()


def below_of(token: str, caller: Caller, wanted: LogFilter) -> UUID | None:
    """The id that a page token goes on below; None for an empty one.

    Raises:
        InvalidArgument: for one that is none, or of another filter or caller. (Who forges one moves within
            what the filter lets through anyway.)
    """
    if not token:
        return None
    try:
        if len(token) > _MAX_TOKEN_CHARACTERS:
            raise ValueError
        content = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        below = UUID(bytes=content[_DIGEST_BYTES:])
    except ValueError:
        raise InvalidArgument(
            "page_token is none that this service gave; take next_page_token as it is", "page_token"
        ) from None
    if content[:_DIGEST_BYTES] != _bound_to(caller, wanted):
        raise InvalidArgument(
            "page_token belongs to another filter or caller; begin with an empty one", "page_token"
        )
    return below


def _bound_to(caller: Caller, wanted: LogFilter) -> bytes:
    about = [
        caller.name,
        wanted.caller,
        None if wanted.since is None else wanted.since.isoformat(),
        None if wanted.until is None else wanted.until.isoformat(),
        wanted.session_id,
        wanted.model_version,
        wanted.status,
    ]
    return hashlib.sha256(json.dumps(about).encode()).digest()[:_DIGEST_BYTES]
