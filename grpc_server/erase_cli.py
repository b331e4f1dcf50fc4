"""`python -m grpc_server erase`: what a caller, a session or one inference said, out of log and cycles.

Straight on the database and the files, not a call of the server: it must work while the server is down, it
takes minutes, and it needs rights (to delete, to write cycles) that a server which callers reach should lack.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer

from grpc_server.adapters import erasure as rows
from grpc_server.adapters.postgres import PostgresStore
from grpc_server.adapters.spool import FileSpool
from grpc_server.domain.errors import Precondition
from grpc_server.drain import Drain
from grpc_server.log_cli import DryRun, Json
from grpc_server.settings import Settings
from grpc_server.store_cli import USAGE, database, fail, operator, told

DRAIN_SECONDS = 60.0

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def erase(
    caller: Annotated[str, typer.Option(help="Whose words go: the name that the log shows.")] = "",
    session: Annotated[str, typer.Option(help="The session whose words go.")] = "",
    inference: Annotated[
        UUID | None, typer.Option(help="The inference that goes, with all feedback on it.")
    ] = None,
    by: Annotated[str, typer.Option(help="Who asks for it; default: the user who runs this.")] = "",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Erase what a caller, a session or one inference said: rows, spool, snapshots, datasets.

    Safe to run again. What others said stays, in the same words too.
    """
    given: dict[rows.Kind, str] = {
        "caller": caller,
        "session": session,
        "inference": str(inference) if inference else "",
    }
    named = [(kind, name) for kind, name in given.items() if name]
    if len(named) != 1:
        fail("name one of --caller, --session and --inference", USAGE)
    ((kind, name),) = named
    by = by or operator()
    with told(), database() as (settings, dsn):
        record = (_would if dry_run else _erased)(settings, dsn, kind, name, by)
    typer.echo(json.dumps(record, indent=2, sort_keys=True) if as_json else _words(record))


def _would(settings: Settings, dsn: str, kind: rows.Kind, name: str, by: str) -> dict[str, Any]:
    with rows.erasing(dsn) as connection:
        counts = rows.count(connection, kind, name)
        nobody = rows.Erasure(UUID(int=0), kind, name, rows.now(connection))
        cycles = _cycles(settings, nobody, by, rows.taught(connection, None, kind, name), dry_run=True)
        letters = rows.erase_dead_files(connection, nobody, settings.spool_dir, dry_run=True)
    return {"dry_run": True, "rows": counts, "spooled_dead_letters": letters, **cycles}


def _erased(settings: Settings, dsn: str, kind: rows.Kind, name: str, by: str) -> dict[str, Any]:
    """What a killed attempt has not done, and all of it where there was none."""
    with rows.erasing(dsn) as connection:
        erasure = rows.begin(connection, kind, name, by)
        spool = asyncio.run(_drained(settings, dsn))
        counts = rows.erase_rows(connection, erasure)
        letters = rows.erase_dead_files(connection, erasure, settings.spool_dir)
        cycles = _cycles(settings, erasure, by, rows.taught(connection, erasure, kind, name), dry_run=False)
        record = {"rows": counts, "spooled_dead_letters": letters, **cycles}
        rows.finish(connection, erasure, by, record)
    return {"dry_run": False, "erasure": str(erasure.id), "spool": spool, **record}


async def _drained(settings: Settings, dsn: str) -> str:
    """Store what a spool holds that no server uses: what is erased is dropped on the way."""
    if not settings.spool_dir.is_dir():
        return "there is none here"
    spool = FileSpool(settings.spool_dir, settings.server_id, int(settings.spool_max_bytes))
    try:
        await spool.open()
    except Precondition:
        return "a running server's: it drops what is left of it as it stores it"
    store = PostgresStore(dsn, connections=2)
    try:
        await store.open()
        if not await Drain(spool, store, dead_letters=store).flush(DRAIN_SECONDS):
            raise Precondition("the spool could not be stored; start the server, or run this again")
    finally:
        await store.close()
        await spool.close()
    return "stored"


def _cycles(
    settings: Settings, erasure: rows.Erasure, by: str, ids: Iterable[UUID], *, dry_run: bool
) -> dict[str, Any]:
    """What `python -m training erase` says; steps share files, not imports."""
    if not settings.cycles_dir.is_dir():
        return {"cycles": [], "learned_by": []}
    if importlib.util.find_spec("training") is None or importlib.util.find_spec("pyarrow") is None:
        raise Precondition(
            f"there are cycles in {settings.cycles_dir}, and the extra `training` is not installed here: run"
            " this where the nights run"
        )
    with tempfile.TemporaryDirectory() as folder:
        known = Path(folder) / "ids"
        with known.open("w", encoding="ascii") as file:
            file.writelines(f"{one}\n" for one in ids)
        command = [
            *(sys.executable, "-m", "training", "erase", "--json"),
            *("--cycles", str(settings.cycles_dir), "--state-dir", str(settings.state_dir)),
            *("--erasure-id", str(erasure.id), "--by", by, f"--{erasure.kind}", erasure.name),
            *("--ids", str(known), *(["--dry-run"] if dry_run else [])),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Precondition(f"the cycles were not erased, run it again: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _words(record: dict[str, Any]) -> str:
    verb = "would go" if record["dry_run"] else "went"
    counts = ", ".join(f"{count} {name}" for name, count in record["rows"].items())
    lines = [f"the log: {verb}: {counts}, {record['spooled_dead_letters']} dead letters of the spool"]
    for one in record["cycles"]:
        files = ", ".join(f"{count} {name}" for name, count in one["counts"].items())
        lines.append(f"cycle {one['cycle_id']}: {verb}: {files}")
    learned = ", ".join(record["learned_by"])
    lines.append(f"these learned from it: {learned}" if learned else "no model version has learned from it")
    if "spool" in record:
        lines.append(f"the spool: {record['spool']}")
    return "\n".join(lines)
