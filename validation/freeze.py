"""Freeze what was stored since the last verdict into `snapshot/`.

One REPEATABLE READ transaction reads one view, `learning_log`, in a role that may read nothing else, and
takes the rows with `watermark_from <= changed_xid < watermark_to`. `watermark_to` is
`pg_snapshot_xmin(pg_current_snapshot())` of that very transaction: below it every transaction has ended, so
that none can commit a row there later, whatever the order of commits. A row that later feedback touches gets
a newer `changed_xid`, and is frozen once more.

A transaction's number says something in one cluster only, and rows of another of its databases would count as
learned: so a snapshot names both, and freezing anything else after it is refused. One that was restored to a
point in time is learned from there on (`restored`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
from psycopg import sql
from psycopg.rows import dict_row

from validation import snapshot
from validation.files import discard_unfinished, new_folder, read_json, sha256, sync, write_json
from validation.note import NothingToDoError, Progress, silent
from validation.restored import resumed, timeline_of

ROLE = "agentloop_freeze"
VIEW = "learning_log"
_BATCH_ROWS = 1000
_CONNECT_SECONDS = 10


class FreezeError(Exception):
    """The log could not be frozen; nothing was kept. The text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Log:
    """Which log it is: the cluster, by the identifier that initdb draws, and the database in it."""

    system_identifier: str
    database_oid: str

    def __str__(self) -> str:
        return f"database {self.database_oid} of cluster {self.system_identifier}"


@dataclass(frozen=True, slots=True)
class Watermark:
    """What of `log`, on that timeline, was learned: all below `xid`, says `record`."""

    xid: int
    log: Log
    record: Path
    timeline: int = 0


@dataclass(frozen=True, slots=True)
class Frozen:
    """A snapshot's record, and whether this call made it (or found it finished)."""

    record: Mapping[str, Any]
    new: bool


def freeze(cycle: Path, database_url: str, on_progress: Progress = silent) -> Frozen:
    """Freeze the log into `cycle/snapshot`, unless a finished snapshot is there.

    Raises:
        NothingToDoError: if nothing was stored since the last verdict.
        FreezeError: if the log cannot be read, or the snapshot not be written.
    """
    if not snapshot.is_cycle_id(cycle.name):
        raise FreezeError(f"cycle folder is {cycle.name!r}; it must be an id like 20260131T020000Z")
    folder = cycle / "snapshot"
    if (folder / snapshot.RECORD).is_file():
        return Frozen(read_json(folder / snapshot.RECORD), new=False)
    last = last_watermark(cycle)
    try:
        cycle.mkdir(parents=True, exist_ok=True)
        discard_unfinished(folder)
        with new_folder(folder) as building:
            with _log(database_url) as log:
                record = {
                    "cycle_id": cycle.name,
                    **_copy(log, last, building / snapshot.ROWS, on_progress),
                    "schema": snapshot.described(snapshot.SCHEMA),
                }
            record["files"] = {snapshot.ROWS: sha256(building / snapshot.ROWS)}
            write_json(building / snapshot.RECORD, record)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise FreezeError(
            f"a column of {VIEW} has another type than snapshots have: {error}."
            " Run `python -m grpc_server migrate`"
        ) from error
    except OSError as error:
        raise FreezeError(
            f"the snapshot cannot be written to {folder}: {error.strerror or error}; nothing of it was kept."
            " Make room or mend the folder, then run `freeze` again"
        ) from error
    return Frozen(record, new=True)


def last_watermark(cycle: Path) -> Watermark | None:
    """Where this cycle begins: the `watermark_to` of the last cycle before it, by its id, that has a verdict.

    That is the cycle whose dataset this one's continues, so that what this one adds is all that was stored
    since: after a night whose clock was set back, too, whose own rows the next night takes again, and would
    lose if it began where that night ended. A cycle without gate.json has learned nothing, so what it froze
    is frozen again.

    Raises:
        FreezeError: if that cycle's record cannot be read; to guess would lose rows or learn them twice.
    """
    others = cycle.parent.iterdir() if cycle.parent.is_dir() else ()
    earlier = [each for each in others if snapshot.is_cycle_id(each.name) and each.name < cycle.name]
    for other in sorted(earlier, reverse=True):
        record = other / "snapshot" / snapshot.RECORD
        if not (other / "gate.json").is_file() or not record.is_file():
            continue
        try:
            told = read_json(record)
            log = Log(str(told["system_identifier"]), str(told["database_oid"]))
            return Watermark(int(told["watermark_to"]), log, record, int(told.get("timeline", 0)))
        except (KeyError, TypeError, ValueError) as error:
            raise FreezeError(
                f"{record} does not say up to where which log was learned ({error}); restore that file, or"
                " remove that cycle's folder to learn its rows again"
            ) from error
    return None


def local_database(state_dir: Path) -> str:
    """The DSN of the Postgres that the server keeps in `state_dir`/postgres.

    Raises:
        FreezeError: if none runs there.
    """
    pid_file = state_dir / "postgres" / "cluster" / "postmaster.pid"
    try:
        # Its lines, by Postgres' own documentation: pid, data folder, start time, port, socket folder, …
        lines = pid_file.read_text(encoding="utf-8").splitlines()
        port, sockets = lines[3].strip(), lines[4].strip()
    except (OSError, IndexError):
        raise FreezeError(
            f"no database is given, and none runs in {pid_file.parent}: start the server, or set"
            " AGENTLOOP_DATABASE_URL"
        ) from None
    # The sockets' folder may be given as seen from the data folder.
    host = str((pid_file.parent / sockets).resolve()) if sockets else "127.0.0.1"
    return psycopg.conninfo.make_conninfo(host=host, port=port, user="postgres", dbname="agentloop")


@contextmanager
def _log(database_url: str) -> Iterator[psycopg.Connection[dict[str, Any]]]:
    """One read-only REPEATABLE READ transaction, in the role that may read only the view."""
    where = _without_password(database_url)
    try:
        connection = psycopg.connect(
            database_url,
            connect_timeout=_CONNECT_SECONDS,
            application_name="agentloop freeze",
            row_factory=dict_row,
        )
    except psycopg.Error as error:
        raise FreezeError(
            f"Postgres ({where}) cannot be reached: {_first_line(error)}; nothing was frozen."
            " Start it, or set AGENTLOOP_DATABASE_URL"
        ) from error
    with connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        try:
            with connection.transaction():
                _take_role(connection)
                yield connection
        except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn) as error:
            raise FreezeError(
                f"the log in {where} has not the view that is frozen: {_first_line(error)}."
                " Run `python -m grpc_server migrate`"
            ) from error
        except psycopg.errors.InsufficientPrivilege as error:
            raise FreezeError(
                f"the log in {where} may not be read: {_first_line(error)}."
                f" Connect as a member of the role {ROLE}"
            ) from error
        except psycopg.Error as error:
            raise FreezeError(
                f"reading the log in {where} failed: {_first_line(error)}; nothing was kept:"
                " run `freeze` again"
            ) from error


def _take_role(connection: psycopg.Connection[dict[str, Any]]) -> None:
    """Give up every right but to read the view, where the role exists and may be taken."""
    try:
        with connection.transaction():  # a savepoint, as the transaction has begun
            connection.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(ROLE)))
    except (psycopg.errors.InvalidParameterValue, psycopg.errors.InsufficientPrivilege):
        return


def _copy(
    log: psycopg.Connection[dict[str, Any]], last: Watermark | None, target: Path, on_progress: Progress
) -> dict[str, Any]:
    """Write the window's rows to `target`; return which log it is, watermarks and counts."""
    window = "changed_xid::xid8 >= %(from)s::xid8 AND changed_xid::xid8 < %(to)s::xid8"
    this = Log(
        _one(log, "SELECT system_identifier::text AS found FROM pg_control_system()", {}),
        _one(log, "SELECT oid::text AS found FROM pg_database WHERE datname = current_database()", {}),
    )
    watermark_to = int(_one(log, "SELECT pg_snapshot_xmin(pg_current_snapshot())::text AS found", {}))
    timeline, begun = timeline_of(log)
    if last is not None:
        last = replace(last, xid=resumed(last.xid, last.timeline, begun))
        _continues(last, this, watermark_to)
    watermark_from = 0 if last is None else last.xid
    bounds = {"from": str(watermark_from), "to": str(watermark_to)}
    # By the view's own condition its tables would be read whole; told so, it looks only at what is new.
    log.execute("SELECT set_config('agentloop.changed_from', %(from)s, true)", bounds)
    total = int(_one(log, f"SELECT count(*) AS found FROM {VIEW} WHERE {window}", bounds))  # noqa: S608
    if total == 0:
        raise NothingToDoError(
            f"nothing was stored since the last verdict (transactions {watermark_from} to {watermark_to})"
        )
    columns = ", ".join(_selected(name, kind) for name, kind in snapshot.LOG_COLUMNS.items())
    query = f"SELECT {columns} FROM {VIEW} WHERE {window} ORDER BY inference_id"  # noqa: S608
    rows = feedback_rows = 0
    on_progress(0, total)
    with (
        log.cursor(name="freeze") as cursor,
        pq.ParquetWriter(target, snapshot.SCHEMA, compression="zstd") as writer,
    ):
        cursor.itersize = _BATCH_ROWS
        cursor.execute(query, bounds)
        while batch := cursor.fetchmany(_BATCH_ROWS):
            for row in batch:
                row.update(_counts(row))
                feedback_rows += max(row["feedback_count"], 0)
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=snapshot.SCHEMA))
            rows += len(batch)
            on_progress(rows, total)
    sync(target)
    return {
        **asdict(this),
        "timeline": timeline,
        "watermark_from": str(watermark_from),
        "watermark_to": str(watermark_to),
        "rows": rows,
        "feedback_rows": feedback_rows,
        "frozen_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }


def _continues(last: Watermark, this: Log, reached: int) -> None:
    """Raise FreezeError unless `this` log, which has reached that transaction, is the one learned from."""
    other = last.log != this
    if not other and last.xid <= reached:
        return
    found = f"this is {this}" if other else f"it has only reached {reached}: it is an older copy"
    upgraded = (
        f". If it is the same log after an upgrade by pg_upgrade, write its new numbers into {last.record}"
    )
    raise FreezeError(
        f"the cycles in {last.record.parents[2]} were frozen from {last.log}, up to transaction {last.xid},"
        f" but {found}. A cycles folder belongs to one log: point AGENTLOOP_DATABASE_URL to that one (or"
        " AGENTLOOP_STATE_DIR, if the server keeps its Postgres there), or set AGENTLOOP_CYCLES_DIR to a new"
        f" folder, to learn this log from its beginning{upgraded if other else ''}"
    )


def _one(log: psycopg.Connection[dict[str, Any]], query: str, values: Mapping[str, str]) -> Any:
    row = log.execute(query, values).fetchone()
    return row["found"] if row else 0


def _selected(name: str, kind: pa.DataType) -> str:
    """One column of the view as the snapshot names it."""
    source = name.removesuffix("_json")
    if pa.types.is_string(kind):
        return f"{source}::text AS {name}"
    return f"{source}::float8 AS {name}" if pa.types.is_floating(kind) else f"{source} AS {name}"


def _counts(row: Mapping[str, Any]) -> dict[str, int]:
    """The seven counts of one row; -1 for all where its JSON has another form than the contract's."""
    try:
        request, feedback = json.loads(row["request_json"]), json.loads(row["feedback_json"] or "[]")
        answer = json.loads(row["answer_json"] or "{}")  # an aborted inference has none
        return {
            "prompt_chars": len(request.get("prompt") or "")
            + sum(len(message["content"]) for message in request["messages"]),
            "answer_chars": len(answer.get("content", "")),
            "messages": len(request["messages"]),
            "tools": len(request["tools"]),
            "tool_calls": len(answer.get("tool_calls", ())),
            "feedback_count": len(feedback),
            "demonstrations": sum(each["demonstration"] is not None for each in feedback),
        }
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return dict.fromkeys(snapshot.COUNT_COLUMNS, -1)


def _first_line(error: psycopg.Error) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _without_password(database_url: str) -> str:
    """Host, port and database of a DSN: what may be shown."""
    try:
        parts = psycopg.conninfo.conninfo_to_dict(database_url)
    except psycopg.Error:
        return "the DSN given"
    return " ".join(f"{key}={parts[key]}" for key in ("host", "port", "dbname") if parts.get(key))
