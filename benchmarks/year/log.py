"""A day's rows as records of the log, with ids and times of their day, and feedback that comes late."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from uuid import UUID

from benchmarks.poison import Row
from grpc_server.domain.plain import message_from_plain
from grpc_server.domain.types import (
    Feedback,
    FinishReason,
    InferenceEnded,
    InferenceStarted,
    LogRecord,
    Status,
    TargetRole,
    Timings,
    Usage,
)

LATE = 0.12
"""Share of feedback that comes one to 40 nights later."""


def identity(moment: datetime, draw: random.Random) -> UUID:
    """A UUIDv7 of that moment (RFC 9562, 5.7)."""
    number = int(moment.timestamp() * 1000) << 80 | 0x7 << 76 | draw.getrandbits(12) << 64
    return UUID(int=number | 0b10 << 62 | draw.getrandbits(62))


def named(rows: Sequence[Row], day: datetime, draw: random.Random) -> dict[str, UUID]:
    """The id in the log of each row, by its own: in their order, spread over the day."""
    step = timedelta(hours=20) / max(1, len(rows))
    return {row["inference_id"]: identity(day + step * n, draw) for n, row in enumerate(rows)}


def records(rows: Sequence[Row], ids: Mapping[str, UUID], champion: str) -> list[LogRecord]:
    """Starts and ends of the inferences."""
    made: list[LogRecord] = []
    for row in rows:
        own = ids[row["inference_id"]]
        at = _moment(own)
        made.append(
            InferenceStarted(
                own,
                "year",
                row["caller"],
                "k" * 12,
                "default",
                champion,
                TargetRole.STABLE,
                row["session_id"],
                json.loads(row["request_json"]),
                at,
            )
        )
        made.append(
            InferenceEnded(
                own,
                Status(row["status"]),
                FinishReason(row["finish_reason"]) if row["finish_reason"] else None,
                json.loads(row["answer_json"]),
                Usage(90, 24),
                Timings(1.0, 40.0, 600.0),
                "" if row["status"] == "ok" else "the engine did not answer",
                at + timedelta(seconds=1),
            )
        )
    return made


def feedback(
    rows: Sequence[Row], ids: Mapping[str, UUID], draw: random.Random, *, all_late: bool = False
) -> list[tuple[int, Feedback]]:
    """What callers said, and how many nights later it is stored."""
    made = []
    for row in rows:
        for each in json.loads(row["feedback_json"]):
            own = ids[row["inference_id"]]
            at = _moment(own) + timedelta(minutes=5)
            shown = each["demonstration"]
            late = draw.randint(1, 40) if all_late or draw.random() < LATE else 0
            made.append(
                (
                    late,
                    Feedback(
                        identity(at, draw),
                        own,
                        each["caller"],
                        "k" * 12,
                        at + timedelta(days=late),
                        boolean=each["boolean"],
                        demonstration=None if shown is None else message_from_plain(shown),
                    ),
                )
            )
    return made


def _moment(own: UUID) -> datetime:
    from datetime import UTC

    return datetime.fromtimestamp((own.int >> 80) / 1000, UTC)
