"""Migrations: safe to repeat, safe at once, and partitions that are there before their rows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from grpc_server import migrations
from grpc_server.adapters.partitions import LOCK, ensure_partitions
from grpc_server.adapters.postgres import PostgresStore
from grpc_server.domain.errors import StoreUnavailable
from grpc_server.migrations import migrate
from tests import records as make
from tests.integration.conftest_log import dsn, empty_dsn, postgres, store

__all__ = ["dsn", "empty_dsn", "postgres", "store"]

HEAD = max(path.name[:4] for path in (migrations.HERE / "versions").glob("0*.py"))


def query(dsn: str, sql: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn) as connection:
        return connection.execute(sql).fetchall()


def test_migrating_twice_changes_nothing(empty_dsn: str) -> None:
    migrate(empty_dsn)
    tables = query(empty_dsn, "SELECT relname, oid FROM pg_class ORDER BY oid")
    migrate(empty_dsn)
    assert query(empty_dsn, "SELECT relname, oid FROM pg_class ORDER BY oid") == tables
    assert query(empty_dsn, "SELECT version_num FROM alembic_version") == [(HEAD,)]


def test_servers_that_start_at_once_migrate_once(empty_dsn: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(migrate, [empty_dsn] * 4))
    assert query(empty_dsn, "SELECT version_num FROM alembic_version") == [(HEAD,)]


def test_a_database_that_is_down_is_told_in_words() -> None:
    with pytest.raises(StoreUnavailable, match="could not be brought up to date"):
        migrate("postgresql://postgres@127.0.0.1:9/agentloop")


def test_a_migration_that_waits_too_long_for_another_gives_up(empty_dsn: str) -> None:
    with psycopg.connect(empty_dsn) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK,))
        with pytest.raises(StoreUnavailable, match="lock timeout"):
            migrate(empty_dsn, wait_seconds=1)
    assert query(empty_dsn, "SELECT to_regclass('inference')") == [(None,)]


def test_a_user_who_may_not_make_the_role_is_told_what_to_run(empty_dsn: str) -> None:
    with psycopg.connect(empty_dsn, autocommit=True) as connection:
        connection.execute("CREATE ROLE modest LOGIN; CREATE SCHEMA AUTHORIZATION modest")
        connection.execute(_RENAME.format(old="agentloop_freeze", new="elsewhere"))
    try:
        with pytest.raises(StoreUnavailable, match="agentloop_freeze is missing"):
            migrate(empty_dsn.replace("postgres@", "modest@"))
    finally:
        with psycopg.connect(empty_dsn, autocommit=True) as connection:
            connection.execute("DROP OWNED BY modest CASCADE; DROP ROLE modest")
            connection.execute(_RENAME.format(old="elsewhere", new="agentloop_freeze"))


_RENAME = "DO $$ BEGIN ALTER ROLE {old} RENAME TO {new}; EXCEPTION WHEN undefined_object THEN NULL; END $$"


def test_the_partitions_of_this_month_and_the_next_three_are_there(dsn: str) -> None:
    now = datetime.now(UTC)
    assert ensure_partitions(dsn, now=now) == []
    names = {row[0] for row in query(dsn, "SELECT relid::text FROM pg_partition_tree('inference')")}
    assert f"inference_{now:%Y_%m}" in names
    assert len(names) == 1 + 1 + 4  # the table, the default, four months


def test_a_year_ends_between_two_partitions(dsn: str) -> None:
    assert ensure_partitions(dsn, now=datetime(2030, 11, 30, tzinfo=UTC), months=2) == [
        "inference_2030_11",
        "inference_2030_12",
        "inference_2031_01",
    ]


async def test_rows_of_a_month_without_a_partition_move_into_it(store: PostgresStore, dsn: str) -> None:
    milliseconds = int(datetime(2031, 5, 17, tzinfo=UTC).timestamp() * 1000)
    identity = type(make.new_id())(int=(milliseconds << 80) | (7 << 76) | (2 << 62) | 12345)
    start = make.started(id=identity)
    await store.store([start, make.ended(identity)])
    where = "SELECT tableoid::regclass::text, changed_xid::text FROM inference"
    ((partition, xid),) = query(dsn, where)
    assert partition == "inference_default"
    assert ensure_partitions(dsn, now=datetime(2031, 5, 1, tzinfo=UTC), months=0) == ["inference_2031_05"]
    assert query(dsn, where) == [("inference_2031_05", xid)]  # moved, not changed


async def test_what_is_stored_now_is_in_this_months_partition(store: PostgresStore, dsn: str) -> None:
    await store.store([make.started()])
    ((partition,),) = query(dsn, "SELECT tableoid::regclass::text FROM inference")
    assert partition == f"inference_{datetime.now(UTC):%Y_%m}"


def test_migrations_run_from_any_folder_with_an_awkward_name(empty_dsn: str, tmp_path: Path) -> None:
    place = tmp_path / "a folder & 100% é"
    source = Path(migrations.__file__).parent.parent
    shutil.copytree(source, place / "grpc_server", ignore=shutil.ignore_patterns("__pycache__"))
    program = "import sys; from grpc_server.migrations import migrate; migrate(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", program, empty_dsn],
        cwd=place,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(place)},
        check=True,
        timeout=60,
    )
    assert query(empty_dsn, "SELECT version_num FROM alembic_version") == [(HEAD,)]
