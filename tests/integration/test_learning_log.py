"""The view that is frozen: told from which transaction on, it shows the same, and reads no more than that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import psycopg

from benchmarks.large_log import filled
from tests.integration import log_by_hand as log
from tests.integration.conftest_log import dsn, postgres

__all__ = ["dsn", "postgres"]

QUERY = "SELECT * FROM learning_log WHERE changed_xid::xid8 >= %s::xid8 ORDER BY inference_id"


def shown(connection: psycopg.Connection[Any], first: str, *, told: bool) -> list[tuple[Any, ...]]:
    """The rows that transactions from `first` on have touched, with the view told so or not."""
    connection.execute("SELECT set_config('agentloop.changed_from', %s, true)", (first if told else "",))
    rows = connection.execute(QUERY, (first,)).fetchall()
    connection.rollback()
    return rows


def test_from_any_transaction_on_it_shows_the_same_rows_whether_it_is_told_or_not(dsn: str) -> None:
    ids, first = [uuid4() for _ in range(4)], []
    with psycopg.connect(dsn) as connection:

        def committed() -> None:
            first.append(connection.execute("SELECT pg_current_xact_id()::text").fetchone()[0])  # type: ignore[index]
            connection.commit()

        log.give_feedback(connection, ids[0], boolean=True)  # before its inference
        committed()
        for identity in ids[:3]:
            log.infer(connection, id=identity)
            committed()
        log.infer(connection, id=ids[3], status="started", answer=None, finish_reason=None)
        log.infer(connection, learning=False)
        committed()
        for identity in (ids[1], ids[1], ids[3], uuid4()):
            log.give_feedback(connection, identity, comment="late")
            committed()
        connection.execute("UPDATE feedback SET learning = false WHERE inference_id = %s", (ids[0],))
        log.give_feedback(connection, ids[2], boolean=False)
        connection.execute("UPDATE feedback SET learning = false WHERE inference_id = %s", (ids[2],))
        committed()
        committed()
        counts = []
        for transaction in first:
            assert shown(connection, transaction, told=True) == shown(connection, transaction, told=False)
            counts.append(len(shown(connection, transaction, told=True)))
    assert counts == [3, 3, 2, 2, 1, 1, 1, 0, 0, 0, 0]


def test_a_nights_rows_are_found_without_reading_the_log(dsn: str) -> None:
    old = filled(dsn, 20_000)
    with psycopg.connect(dsn) as connection:
        connection.execute(
            'INSERT INTO feedback (id, inference_id, caller, key_id, created_at, "boolean") '
            f"SELECT gen_random_uuid(), id, caller, 'k', now(), true FROM {old}"
        )
        connection.commit()
        told = connection.execute("SELECT pg_snapshot_xmin(pg_current_snapshot())::text").fetchone()
        assert told is not None
        connection.commit()
        new = [log.infer(connection) for _ in range(3)]
        [(late,)] = connection.execute(f"SELECT id FROM {old} ORDER BY id LIMIT 1").fetchall()
        log.give_feedback(connection, late, boolean=False)
        connection.commit()
        connection.execute("ANALYZE inference, feedback")
        connection.commit()
        assert {row[0] for row in shown(connection, told[0], told=True)} == {late, *new}
        connection.execute("SELECT set_config('agentloop.changed_from', %s, true)", told)
        [(plan,)] = connection.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {QUERY}", told).fetchall()
    scans = [node for node in _nodes(plan[0]["Plan"]) if "Relation Name" in node]
    read = [(node["Relation Name"], _rows_read(node)) for node in scans]
    assert old in dict(read)
    assert max(rows for _, rows in read) < 100, read


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from _nodes(below)


def _rows_read(node: dict[str, Any]) -> float:
    """Rows that a scan has looked at, in all its rounds."""
    looked = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
    return float(looked * node["Actual Loops"])
