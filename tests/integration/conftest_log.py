"""A real Postgres for the tests of the log: one server for the session, a fresh migrated database a test.

Import the fixtures by name. Several modules may: all of them join one server.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from grpc_server.adapters.local_postgres import LocalPostgres
from grpc_server.adapters.postgres import PostgresStore
from grpc_server.migrations import migrate

FOLDER = Path(tempfile.gettempdir()) / f"agentloop-test-postgres-{os.getpid()}"
_template_made: list[str] = []


@pytest.fixture(scope="session")
def postgres() -> Iterator[LocalPostgres]:
    with LocalPostgres(FOLDER) as server:
        atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
        yield server


@pytest.fixture
def empty_dsn(postgres: LocalPostgres) -> Iterator[str]:
    """A database without tables."""
    name = f"empty_{uuid4().hex}"
    yield postgres.dsn(name)
    _drop(postgres, name)


@pytest.fixture
def dsn(postgres: LocalPostgres) -> Iterator[str]:
    """A migrated database of the test's own, copied from one that was migrated once."""
    if not _template_made:
        migrate(postgres.dsn("migrated"))
        _template_made.append("migrated")
    name = f"test_{uuid4().hex}"
    with psycopg.connect(postgres.dsn("postgres"), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE migrated')
    yield postgres.dsn(name)
    _drop(postgres, name)


@pytest.fixture
async def store(dsn: str) -> AsyncIterator[PostgresStore]:
    made = PostgresStore(dsn)
    await made.open()
    yield made
    await made.close()


def _drop(postgres: LocalPostgres, name: str) -> None:
    with psycopg.connect(postgres.dsn("postgres"), autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
