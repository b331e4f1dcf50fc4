"""How urgent a call is: metadata or a header, as neither the request nor the token knows.

One token serves people by day and jobs by night, and the same request may come from either. It needs no
permission: callers have their turns in each priority, so who calls everything interactive gains nothing.
"""

from __future__ import annotations

from typing import Any

from grpc_server.domain.errors import InvalidArgument
from grpc_server.domain.types import Priority

KEY = "x-agentloop-priority"


def priority_of(metadata: Any) -> Priority:
    """The one priority in a call's metadata; INTERACTIVE where there is none.

    Raises:
        InvalidArgument: for another value, or several.
    """
    values = [value for key, value in metadata or () if key == KEY]
    if not values:
        return Priority.INTERACTIVE
    if len(values) > 1 or values[0] not in tuple(Priority):
        shown = str(values[0])[:64] if len(values) == 1 else f"given {len(values)} times"
        raise InvalidArgument(
            f"the metadata {KEY} is {shown!a}; it must be one of {', '.join(Priority)}, once", KEY
        )
    return Priority(values[0])
