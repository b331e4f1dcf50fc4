"""From where on a log has to be learned that was restored to a point in time.

Its transactions count on from that point, so that what it gets now has numbers that a night before the
restore has seen already. The playbook `restore` writes down where that is, as a setting of the database,
`agentloop.restored`: `<timeline>:<first transaction>`, by commas where there were several. A snapshot says
on which timeline it was frozen; each restore begins a new one.
"""

from __future__ import annotations

from typing import Any

import psycopg

_ASK = (
    "SELECT timeline_id::int AS timeline,"
    " coalesce(current_setting('agentloop.restored', true), '') AS restored FROM pg_control_checkpoint()"
)


def timeline_of(log: psycopg.Connection[dict[str, Any]]) -> tuple[int, dict[int, int]]:
    """The log's timeline now, and each that a restore began with its first transaction.

    Raises:
        ValueError: if the setting has another form.
    """
    row = log.execute(_ASK).fetchone() or {"timeline": 0, "restored": ""}
    begun = [each.split(":") for each in str(row["restored"]).split(",") if each]
    return int(row["timeline"]), {int(timeline): int(xid) for timeline, xid in begun}


def resumed(xid: int, timeline: int, begun: dict[int, int]) -> int:
    """Up to which transaction a log is learned that was so up to `xid` while it was on `timeline`."""
    return min([xid, *(first for began, first in begun.items() if began > timeline)])
