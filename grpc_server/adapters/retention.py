"""What of the log is too old: whole months go, and what belongs to them.

A month is detached, then dropped: both cost the same however many rows it has. PostgreSQL cannot detach
CONCURRENTLY where there is a default partition, so detaching waits for a lock on the table; it waits two
seconds at a time, because all who come later wait behind it, and tries again. What belongs to the months,
feedback and dead letters, and old rows of the default partition, goes by some thousand rows a transaction. A
run that was killed leaves nothing that the next does not find.

A month stays while a night has yet to learn something of it, unless forced: an inference, or feedback on one,
that no cycle with a verdict has frozen.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from psycopg import sql
from psycopg.types.json import Json

from grpc_server.adapters.learned import Learned
from grpc_server.adapters.partitions import LOCK, Connection, connected, first_id, is_attached, month
from grpc_server.domain.errors import Precondition, StoreUnavailable

SLICE_ROWS = 5000
LOCK_SECONDS = 2
LOCK_TRIES = 15
BETWEEN_TRIES_SECONDS = 1.0
RETENTION_LOCK = LOCK + 1
_NAME = re.compile(r"inference_(\d{4})_(\d{2})")
_NEXT_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Month:
    """A month that is too old. `rows` is exact in a dry run, and else what the database estimates.

    `reason` says why it was kept; it is empty for one that was, or would be, dropped.
    """

    name: str
    rows: int
    bytes: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Retained:
    """What went, or would go in a dry run: of everything before `before`."""

    before: datetime
    dry_run: bool
    months: tuple[Month, ...] = ()
    unpartitioned: int = 0  # inferences of the default partition
    feedback: int = 0
    dead_letters: int = 0

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        shown = [
            {"name": m.name, "rows": m.rows, "bytes": m.bytes, "kept_because": m.reason} for m in self.months
        ]
        return {
            "before": self.before.isoformat(),
            "dry_run": self.dry_run,
            "dropped": [one for one in shown if not one["kept_because"]],
            "kept": [one for one in shown if one["kept_because"]],
            "unpartitioned": self.unpartitioned,
            "feedback": self.feedback,
            "dead_letters": self.dead_letters,
        }


def retain(
    dsn: str,
    months: int,
    learned: Learned | None,
    *,
    force: bool = False,
    dry_run: bool = False,
    now: datetime | None = None,
    stop: Callable[[], bool] = lambda: False,
    actor: str = "retention",
) -> Retained:
    """Keep this month and the `months` before it; drop what is older and was learned (`force`: or not).

    Args:
        dsn: of a user who owns the tables.
        months: 1 or more.
        learned: what the nights have learned of this log.
        force: drop what was not learned, too.
        dry_run: only count.
        stop: asked between two steps; true ends the run early, with what it has done by then.
        now: the time; the database's own must be within a day of it, or a wrong clock would empty the log.
        actor: who does it, for the table `event`.

    Raises:
        ValueError: if `months` is less than 1.
        Precondition: if the clocks differ, another process does the same now, or `learned` is of another log.
        StoreUnavailable: if the database does not answer, or refuses.
    """
    if months < 1:
        raise ValueError(f"months is {months}; it must be 1 or more")
    now = datetime.now(UTC) if now is None else now
    before = month(now, -months)
    try:
        with connected(dsn, LOCK_SECONDS) as connection:
            _refuse_wrong_clock(connection, now)
            xid = 0 if learned is None else _watermark(connection, learned)
            if not _one(connection, "SELECT pg_try_advisory_lock(%s)", (RETENTION_LOCK,)):
                raise Precondition("another process drops old months now; wait for it")
            run = _Run(connection, before, None if force else xid, stop)
            return run.would() if dry_run else run.do(actor)
    except psycopg.Error as error:
        raise StoreUnavailable(
            f"old months were not dropped: {str(error).strip().partition(chr(10))[0]}"
        ) from error


class _Run:
    """One run. `learned` is the transaction below which all was learned; None: that does not matter."""

    def __init__(
        self, connection: Connection, before: datetime, learned: int | None, stop: Callable[[], bool]
    ) -> None:
        self._connection = connection
        self._before = before
        self._first_kept = first_id(before)
        self._learned = learned
        self._stop = stop

    def would(self) -> Retained:
        months = tuple(self._looked_at(one, exact=True) for one in self._old_months())
        dropped = [_bounds(one.name) for one in months if not one.reason]
        feedback = sum(
            self._count("feedback WHERE inference_id >= %s AND inference_id < %s", bounds)
            for bounds in dropped
        )
        return Retained(
            self._before,
            True,
            months,
            self._count(f"inference_default i WHERE {_OLD_ROW}", self._old_row()),
            feedback + self._count(f"feedback i WHERE {_ORPHAN}", (self._first_kept,)),
            self._count("dead_letter WHERE at < %s", (self._before,)),
        )

    def do(self, actor: str) -> Retained:
        months: list[Month] = []
        for one in self._old_months():
            if self._stop():
                break
            seen = self._looked_at(one, exact=False)
            if not seen.reason:
                seen = self._dropped(seen)
            months.append(seen)
        done = Retained(
            self._before,
            False,
            tuple(months),
            self._delete("inference_default", "id", _OLD_ROW, self._old_row()),
            self._delete("feedback", "inference_id", _ORPHAN, (self._first_kept,)),
            self._delete("dead_letter", "id", "i.at < %s", (self._before,)),
        )
        self._delete("erased", "inference_id", _ERASED, (self._first_kept,))
        if any(not one.reason for one in months) or done.unpartitioned or done.feedback or done.dead_letters:
            self._connection.execute(
                "INSERT INTO event (kind, actor, subject, detail) VALUES ('log_retained', %s, %s, %s)",
                (actor, f"{self._before:%Y-%m}", Json(done.plain())),
            )
        return done

    def _old_months(self) -> list[Month]:
        """Partitions, and those that a killed run left detached, of months that are wholly too old."""
        found = self._connection.execute(
            "SELECT relname, GREATEST(reltuples, 0)::bigint, pg_table_size(oid) FROM pg_class "
            "WHERE relkind = 'r' AND relnamespace = "
            "(SELECT relnamespace FROM pg_class WHERE oid = 'inference'::regclass) "
            "AND relname ~ '^inference_[0-9]{4}_[0-9]{2}$' ORDER BY relname"
        ).fetchall()
        return [Month(*row) for row in found if _bounds(row[0])[1] <= self._first_kept]

    def _looked_at(self, one: Month, *, exact: bool) -> Month:
        """With its rows counted, and with why it must stay, if it must."""
        if exact:
            one = replace(one, rows=self._count(sql.Identifier(one.name), ()))
        if self._learned is None:
            return one
        table = sql.Identifier(one.name)
        newer = self._connection.execute(
            sql.SQL("SELECT FROM {} i WHERE i.changed_xid >= %s::text::xid8 AND {} LIMIT 1").format(
                table, sql.SQL(_TEACHES)
            ),
            (str(self._learned),),
        ).fetchone()
        said = self._connection.execute(
            sql.SQL(
                "SELECT FROM feedback f JOIN {} i ON i.id = f.inference_id "
                "WHERE f.changed_xid >= %s::text::xid8 AND f.inference_id >= %s AND f.inference_id < %s "
                "AND f.learning AND {} LIMIT 1"
            ).format(table, sql.SQL(_TEACHES)),
            (str(self._learned), *_bounds(one.name)),
        ).fetchone()
        if newer is None and said is None:
            return one
        return replace(one, reason="no night has learned all of it yet")

    def _dropped(self, one: Month) -> Month:
        table = sql.Identifier(one.name)
        for _ in range(LOCK_TRIES):
            try:
                with self._connection.transaction():
                    if is_attached(self._connection, one.name):
                        self._connection.execute(
                            sql.SQL("ALTER TABLE inference DETACH PARTITION {}").format(table)
                        )
                self._connection.execute(sql.SQL("DROP TABLE {}").format(table))
            except psycopg.errors.LockNotAvailable:
                if self._stop():
                    break
                time.sleep(BETWEEN_TRIES_SECONDS)
            else:
                return one
        return replace(one, reason="it is in use: a long transaction reads the log")

    def _delete(self, table: str, key: str, old: str, values: tuple[Any, ...]) -> int:
        """Delete the rows `i` that are `old`, and nothing else of their key; how many they were.

        In slices, in the order of the key: no slice looks again at what those before saw.
        """
        last, deleted = first_id(_EPOCH), 0
        while not self._stop():
            with self._connection.transaction():
                rows = self._connection.execute(
                    f"DELETE FROM {table} WHERE ctid = ANY(ARRAY(SELECT i.ctid FROM {table} i "  # noqa: S608
                    f"WHERE {old} AND i.{key} >= %s ORDER BY i.{key} LIMIT {SLICE_ROWS})) RETURNING {key}",
                    (*values, last),
                ).fetchall()
                ids = [row[0] for row in rows]
                if table == "inference_default":
                    self._connection.execute("DELETE FROM feedback WHERE inference_id = ANY(%s)", (ids,))
            if not ids:
                break
            deleted += len(ids)
            last = max(ids)
        return deleted

    def _old_row(self) -> tuple[Any, ...]:
        learned = None if self._learned is None else str(self._learned)
        return (self._before, learned, learned, learned)

    def _count(self, which: str | sql.Identifier, values: tuple[Any, ...]) -> int:
        table = which if isinstance(which, sql.Identifier) else sql.SQL(which)
        found = self._connection.execute(sql.SQL("SELECT count(*) FROM {}").format(table), values).fetchone()
        return 0 if found is None else int(found[0])


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# What the view learning_log shows: the rest teaches nothing, and need not be waited for.
_TEACHES = "i.status <> 'started' AND i.learning"
_OLD_ROW = (
    f"i.started_at < %s AND (%s::text IS NULL OR NOT ({_TEACHES}) OR (i.changed_xid < %s::text::xid8 "
    "AND NOT EXISTS (SELECT FROM feedback f WHERE f.inference_id = i.id "
    "AND f.learning AND f.changed_xid >= %s::text::xid8)))"
)
# Nothing of these months can come back any more, but from a spool that is as old.
_ERASED = (
    "i.inference_id < %s AND EXISTS "
    "(SELECT FROM erasure e WHERE e.id = i.erasure AND e.finished_at IS NOT NULL)"
)
_ORPHAN = "i.inference_id < %s AND NOT EXISTS (SELECT FROM inference n WHERE n.id = i.inference_id)"


def _bounds(name: str) -> tuple[Any, Any]:
    """The first id of a month, and the first after it, by the partition's name."""
    found = _NAME.fullmatch(name)
    assert found is not None  # noqa: S101 - the query asks for such names only
    first = datetime(int(found[1]), int(found[2]), 1, tzinfo=UTC)
    return first_id(first), first_id(month(first, 1))


def _refuse_wrong_clock(connection: Connection, now: datetime) -> None:
    theirs = _one(connection, "SELECT now()", ())
    if abs(theirs - now) > _NEXT_DAY:
        raise Precondition(
            f"this machine's clock says {now:%Y-%m-%d %H:%M} UTC, the database's {theirs:%Y-%m-%d %H:%M}:"
            " with a wrong clock, months would go that are not old. Set the clock right"
        )


def _watermark(connection: Connection, learned: Learned) -> int:
    """Its transaction, if it is of this log. Raises Precondition if it is of another one."""
    found = connection.execute(
        "SELECT system_identifier::text, "
        "(SELECT oid::text FROM pg_database WHERE datname = current_database()) FROM pg_control_system()"
    ).fetchone()
    if found != (learned.system_identifier, learned.database_oid):
        raise Precondition(
            f"the cycles were frozen from database {learned.database_oid} of cluster"
            f" {learned.system_identifier}, which is not this one: set"
            " AGENTLOOP_CYCLES_DIR to the folder of this log's cycles"
        )
    return learned.xid


def _one(connection: Connection, query: str, values: tuple[Any, ...]) -> Any:
    row = connection.execute(query, values).fetchone()
    return None if row is None else row[0]
