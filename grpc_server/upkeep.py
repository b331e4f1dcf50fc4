"""What the log needs from time to time: the coming months' partitions, and an end to the old ones.

Each server looks once an hour, by its monotonic clock; that several do so harms nothing, as they take turns
(`adapters.partitions`, `adapters.retention`). The work is done in a thread, on connections of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import psycopg

from grpc_server.adapters.learned import learned
from grpc_server.adapters.partitions import ensure_partitions, month, months_ahead, rows_without_month
from grpc_server.adapters.retention import Retained, retain
from grpc_server.background import in_rounds
from grpc_server.domain.errors import AgentLoopError

EVERY_SECONDS = 3600.0
AFTER_FAILURE_SECONDS = 60.0
LOCK_SECONDS = 2.0
"""Whoever waits for a lock on the log makes all others wait behind it; rather try again later."""

_log = logging.getLogger(__name__)


class Gauges(Protocol):
    """Who shows how the log is."""

    def months_ahead(self, months: int) -> None:
        """How many coming months have a partition; -1 if even this one has none."""

    def rows_without_month(self, rows: int) -> None:
        """Rows in the default partition, counted up to some thousands."""

    def months_dropped(self, months: int) -> None:
        """So many months were too old."""


class Upkeep:
    """One round, and the rounds of a server.

    Args:
        dsn: the log's database.
        spool_dir: whose dead letters age, too.
        cycles_dir: tells what the nights have learned.
        retain_months: months that are kept before this one; 0: all.
        keep_unlearned: whether what no night has learned is kept, however old.
    """

    def __init__(
        self,
        dsn: str,
        gauges: Gauges,
        *,
        spool_dir: Path,
        cycles_dir: Path,
        retain_months: int = 0,
        keep_unlearned: bool = True,
        actor: str = "retention",
    ) -> None:
        self._dsn = dsn
        self._gauges = gauges
        self._spool_dir = spool_dir
        self._cycles_dir = cycles_dir
        self._retain_months = retain_months
        self._keep_unlearned = keep_unlearned
        self._actor = actor
        self._ending = threading.Event()

    def running(self) -> AbstractAsyncContextManager[None]:
        """Rounds while the block runs; a round that is under way at its end stops at its next step."""
        return in_rounds(
            lambda: EVERY_SECONDS if self.round() else AFTER_FAILURE_SECONDS, "upkeep", self._ending
        )

    def round(self) -> bool:
        """Look after everything once; False if something failed, which the log tells. Raises nothing."""
        return all([self._look_ahead(), self._look_back()])

    def _look_ahead(self) -> bool:
        try:
            for name in ensure_partitions(self._dsn, wait_seconds=LOCK_SECONDS):
                _log.info("a month's partition was made", extra={"partition": name})
            failure = ""
        except psycopg.Error as error:
            failure = str(error).strip().partition("\n")[0]
        try:
            ahead = months_ahead(self._dsn)
            self._gauges.months_ahead(ahead)
            self._gauges.rows_without_month(rows_without_month(self._dsn))
        except psycopg.Error as error:  # the database is down: others tell that
            _log.info("the log's partitions were not looked after", extra={"error": failure or str(error)})
            return False
        if ahead < 1:
            _log.warning(
                "the next month's partition of the log is missing: its rows will go to inference_default",
                extra={"months_ahead": ahead, "error": failure},
            )
        elif failure:
            _log.info("a later month's partition could not be made yet", extra={"error": failure})
        return not failure

    def _look_back(self) -> bool:
        if not self._retain_months:
            return True
        try:
            retained = retain(
                self._dsn,
                self._retain_months,
                learned(self._cycles_dir),
                force=not self._keep_unlearned,
                stop=self._ending.is_set,
                actor=self._actor,
            )
            forget_dead_letters(self._spool_dir, self._retain_months)
        except (AgentLoopError, OSError) as error:
            _log.warning("old months were not dropped", extra={"error": str(error)})
            return False
        self._tell(retained)
        return True

    def _tell(self, retained: Retained) -> None:
        dropped = [one.name for one in retained.months if not one.reason]
        kept = {one.name: one.reason for one in retained.months if one.reason}
        if dropped:
            self._gauges.months_dropped(len(dropped))
            _log.info("old months of the log were dropped", extra={"partitions": dropped})
        if kept:
            _log.warning("old months of the log were kept", extra={"partitions": kept})


def forget_dead_letters(
    spool_dir: Path, months: int, *, now: float | None = None, dry_run: bool = False
) -> int:
    """Delete the spool's dead letters that are older than this month and the `months` before; how many."""
    now = time.time() if now is None else now
    before = month(_utc(now), -months).timestamp()
    old = [path for path in (spool_dir / "dead").glob("*.json") if path.stat().st_mtime < before]
    for path in [] if dry_run else old:
        path.unlink(missing_ok=True)
    return len(old)


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
