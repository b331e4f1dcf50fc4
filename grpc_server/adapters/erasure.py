"""Takes a caller's or a session's rows, or one inference, out of the log, with feedback and dead letters.

Every step can be done twice, so an erasure that was killed is taken up by the next call for the same name.
Rows go by the thousand, in the order of their key, each slice with the note of which they were; nobody waits
for more than one slice.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import psycopg
from psycopg.types.json import Json

from grpc_server.adapters.erased import digest_of
from grpc_server.adapters.partitions import Connection, connected
from grpc_server.adapters.postgres_text import to_text
from grpc_server.domain.errors import StoreUnavailable

SLICE_ROWS = 1000
LOCK_SECONDS = 10
_NOBODY = UUID(int=0)

Kind = Literal["caller", "session", "inference"]
_COLUMNS = {"caller": "caller", "session": "session_id", "inference": "id"}


@dataclass(frozen=True, slots=True)
class Erasure:
    """An erasure under way: whose rows go, and those from before when."""

    id: UUID
    kind: Kind
    name: str
    before: datetime

    @property
    def column(self) -> str:
        """The column of `inference` that has the name."""
        return _COLUMNS[self.kind]


@contextmanager
def erasing(dsn: str) -> Iterator[Connection]:
    """A connection for all that is here. Raises StoreUnavailable for what the database refuses."""
    try:
        with connected(dsn, LOCK_SECONDS) as connection:
            yield connection
    except psycopg.errors.UndefinedTable as error:
        raise StoreUnavailable(
            "the database is not up to date: run `python -m grpc_server migrate`"
        ) from error
    except psycopg.Error as error:
        reason = str(error).strip().partition("\n")[0]
        raise StoreUnavailable(f"the erasure was not finished, run it again: {reason}") from error


def begin(connection: Connection, kind: Kind, name: str, by: str) -> Erasure:
    """A new erasure of everything until now, or that of the same name that was not finished."""
    found = connection.execute(
        "SELECT id, salt, digest FROM erasure WHERE kind = %s AND finished_at IS NULL", (kind,)
    )
    for identity, salt, digest in found.fetchall():
        if digest_of(bytes(salt), name) == bytes(digest):
            row = connection.execute(
                "UPDATE erasure SET before = now() WHERE id = %s RETURNING before", (identity,)
            ).fetchone()
            assert row is not None  # noqa: S101 - it was there
            return Erasure(identity, kind, name, row[0])
    salt = os.urandom(16)
    row = connection.execute(
        "INSERT INTO erasure (kind, salt, digest, before, requested_by) VALUES (%s, %s, %s, now(), %s) "
        "RETURNING id, before",
        (kind, salt, digest_of(salt, name), to_text(by)),
    ).fetchone()
    assert row is not None  # noqa: S101 - it was just inserted
    return Erasure(row[0], kind, name, row[1])


def count(connection: Connection, kind: Kind, name: str) -> dict[str, int]:
    """What `erase_rows` would delete now."""
    erasure = Erasure(_NOBODY, kind, name, now(connection))
    (inferences,) = _one(
        connection,
        f"SELECT count(*) FROM inference WHERE {erasure.column} = %s AND started_at < %s",  # noqa: S608
        (to_text(name), erasure.before),
    )
    (feedback,) = _one(
        connection,
        "SELECT count(*) FROM feedback f WHERE (%s AND f.caller = %s) OR EXISTS (SELECT FROM inference i "  # noqa: S608
        f"WHERE i.id = f.inference_id AND i.{erasure.column} = %s)",
        (kind == "caller", to_text(name), to_text(name)),
    )
    letters = sum(_is_theirs(erasure, record) for rows in _dead_letters(connection) for _, record in rows)
    return {"inference": inferences, "feedback": feedback, "dead_letter": letters}


def taught(connection: Connection, erasure: Erasure | None, kind: Kind, name: str) -> Iterator[UUID]:
    """The inferences that teach what must go: deleted ones, and, before that is done, those in the log."""
    query, values = (
        "SELECT inference_id FROM erased WHERE erasure = %s",
        (erasure.id if erasure else _NOBODY,),
    )
    with connection.transaction(), connection.cursor(name="erased") as cursor:
        cursor.execute(query, values)
        for row in cursor:
            yield row[0]
        if erasure is not None:
            return
    column = _COLUMNS[kind]
    with connection.transaction(), connection.cursor(name="theirs") as cursor:
        cursor.execute(
            f"SELECT id FROM inference WHERE {column} = %s UNION ALL "  # noqa: S608
            "SELECT inference_id FROM feedback WHERE %s AND caller = %s",
            (to_text(name), kind == "caller", to_text(name)),
        )
        for row in cursor:
            yield row[0]


def erase_rows(connection: Connection, erasure: Erasure) -> dict[str, int]:
    """Delete, and note which inferences they were; returns how many of each table."""
    counts: Counter[str] = Counter()
    _erase_dead_letters(connection, erasure, counts)
    _erase_inferences(connection, erasure, counts)
    _erase_feedback(connection, erasure, counts)
    return _add(connection, erasure, counts)


def erase_dead_files(
    connection: Connection, erasure: Erasure, spool_dir: Path, *, dry_run: bool = False
) -> int:
    """Delete the spool's own dead letters; returns how many. Those of ends name nobody: their starts do."""
    letters = {path: path.read_text(encoding="ascii") for path in (spool_dir / "dead").glob("*.json")}
    about = {path: _inference_in(text) for path, text in letters.items()}
    theirs = {path for path, text in letters.items() if _is_theirs(erasure, text)}
    ids = {about[path] for path in theirs} | _of_theirs(connection, erasure, about.values())
    theirs |= {path for path, one in about.items() if one is not None and one in ids}
    for path in () if dry_run else theirs:
        path.unlink(missing_ok=True)
    return len(theirs)


def finish(connection: Connection, erasure: Erasure, by: str, counts: dict[str, Any]) -> None:
    """Note that all of it is done."""
    with connection.transaction():
        connection.execute(
            "UPDATE erasure SET finished_at = now(), counts = %s WHERE id = %s", (Json(counts), erasure.id)
        )
        connection.execute(
            "INSERT INTO event (kind, actor, subject, detail) VALUES ('erased', %s, %s, %s)",
            (to_text(by), str(erasure.id), Json(counts)),
        )


def _erase_inferences(connection: Connection, erasure: Erasure, counts: Counter[str]) -> None:
    last = _NOBODY
    while True:
        rows = connection.execute(
            f"SELECT id FROM inference WHERE id > %s AND {erasure.column} = %s AND started_at < %s "  # noqa: S608
            f"ORDER BY id LIMIT {SLICE_ROWS}",
            (last, to_text(erasure.name), erasure.before),
        ).fetchall()
        if not rows:
            return
        ids = [row[0] for row in rows]
        with connection.transaction():
            _remember(connection, erasure, ids, whole=True)
            said = connection.execute("DELETE FROM feedback WHERE inference_id = ANY(%s)", (ids,))
            gone = connection.execute("DELETE FROM inference WHERE id = ANY(%s)", (ids,))
        counts["inference"] += gone.rowcount
        counts["feedback"] += said.rowcount
        last = ids[-1]


def _erase_feedback(connection: Connection, erasure: Erasure, counts: Counter[str]) -> None:
    """What they said of others' inferences, and what was late on theirs."""
    last = _NOBODY
    while True:
        rows = connection.execute(
            "SELECT f.id, f.inference_id FROM feedback f WHERE f.id > %s AND f.created_at < %s AND "  # noqa: S608
            "((%s AND f.caller = %s) OR EXISTS (SELECT FROM erased e WHERE e.inference_id = f.inference_id "
            f"AND e.erasure = %s AND e.whole)) ORDER BY f.id LIMIT {SLICE_ROWS}",
            (last, erasure.before, erasure.kind == "caller", to_text(erasure.name), erasure.id),
        ).fetchall()
        if not rows:
            return
        with connection.transaction():
            _remember(connection, erasure, {row[1] for row in rows}, whole=False)
            gone = connection.execute("DELETE FROM feedback WHERE id = ANY(%s)", ([row[0] for row in rows],))
        counts["feedback"] += gone.rowcount
        last = rows[-1][0]


def _erase_dead_letters(connection: Connection, erasure: Erasure, counts: Counter[str]) -> None:
    """First what names them; then ends, and feedback of others, of inferences that are theirs."""
    for rows in _dead_letters(connection):
        theirs = [(identity, _inference_in(text)) for identity, text in rows if _is_theirs(erasure, text)]
        with connection.transaction():
            _remember(connection, erasure, (one for _, one in theirs if one is not None), whole=True)
            counts["dead_letter"] += _delete_letters(connection, [identity for identity, _ in theirs])
    for rows in _dead_letters(connection):
        about = {identity: _inference_in(text) for identity, text in rows}
        ids = _of_theirs(connection, erasure, about.values())
        counts["dead_letter"] += _delete_letters(
            connection, [identity for identity, one in about.items() if one in ids]
        )


def _of_theirs(connection: Connection, erasure: Erasure, ids: Iterable[UUID | None]) -> set[UUID]:
    """Which of these inferences are theirs, be they erased already or not."""
    asked = [one for one in ids if one is not None]
    found = connection.execute(
        "SELECT inference_id FROM erased WHERE whole AND erasure = %s AND inference_id = ANY(%s) "  # noqa: S608
        f"UNION ALL SELECT id FROM inference WHERE id = ANY(%s) AND {erasure.column} = %s",
        (erasure.id, asked, asked, to_text(erasure.name)),
    )
    return {row[0] for row in found.fetchall()}


def _delete_letters(connection: Connection, ids: list[UUID]) -> int:
    return connection.execute("DELETE FROM dead_letter WHERE id = ANY(%s)", (ids,)).rowcount if ids else 0


def _dead_letters(connection: Connection) -> Iterator[list[tuple[UUID, str]]]:
    last = _NOBODY
    while rows := connection.execute(
        f"SELECT id, record FROM dead_letter WHERE id > %s ORDER BY id LIMIT {SLICE_ROWS // 10}",  # noqa: S608
        (last,),
    ).fetchall():
        yield [(row[0], row[1]) for row in rows]
        last = rows[-1][0]


def _is_theirs(erasure: Erasure, text: str) -> bool:
    """Whether a dead letter names them: as a record does, or in bytes that are no record any more."""
    written = json.dumps(erasure.name)
    names = (f'"{erasure.column}":{written}', f'"{erasure.column}": {written}')
    return any(name in text or json.dumps(name)[1:-1] in text for name in names)


def _inference_in(text: str) -> UUID | None:
    """The inference that a dead letter is about."""
    try:
        value = json.loads(text)
        value = value.get("record", value)
        return UUID(value.get("inference_id") or value["id"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _remember(connection: Connection, erasure: Erasure, ids: Iterable[UUID], *, whole: bool) -> None:
    with connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO erased (inference_id, erasure, whole) VALUES (%s, %s, %s) "
            "ON CONFLICT (inference_id, erasure) DO UPDATE SET whole = erased.whole OR excluded.whole",
            [(one, erasure.id, whole) for one in ids],
        )


def _add(connection: Connection, erasure: Erasure, counts: Counter[str]) -> dict[str, int]:
    """These counts and those of attempts before."""
    (before,) = _one(connection, "SELECT counts FROM erasure WHERE id = %s", (erasure.id,))
    total = {name: counts[name] + before.get(name, 0) for name in ("inference", "feedback", "dead_letter")}
    connection.execute("UPDATE erasure SET counts = %s WHERE id = %s", (Json(total), erasure.id))
    return total


def now(connection: Connection) -> datetime:
    """The database's time."""
    (moment,) = _one(connection, "SELECT now()", ())
    assert isinstance(moment, datetime)  # noqa: S101 - as the query says
    return moment


def _one(connection: Connection, query: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    row = connection.execute(query, values).fetchone()
    assert row is not None  # noqa: S101 - each query here gives one row
    return tuple(row)
