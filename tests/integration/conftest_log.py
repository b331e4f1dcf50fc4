"""A real Postgres for the tests of the log: the session's own, a fresh migrated database a test.

Import the fixtures by name.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from uuid import uuid4

import psycopg
import pytest

from grpc_server.adapters.local_postgres import LocalPostgres
from grpc_server.adapters.postgres import PostgresStore


@pytest.fixture(scope="session")
def postgres(local_postgres: LocalPostgres) -> LocalPostgres:
    return local_postgres


@pytest.fixture
def empty_dsn(postgres: LocalPostgres) -> Iterator[str]:
    """A database without tables."""
    name = f"empty_{uuid4().hex}"
    yield postgres.dsn(name)
    _drop(postgres, name)


@pytest.fixture
def dsn(postgres: LocalPostgres) -> Iterator[str]:
    """A migrated database of the test's own, copied file by file: half the work of the default."""
    name = f"test_{uuid4().hex}"
    _run(postgres, f'CREATE DATABASE "{name}" TEMPLATE agentloop STRATEGY FILE_COPY')
    yield postgres.dsn(name)
    _drop(postgres, name)


@pytest.fixture
async def store(dsn: str) -> AsyncIterator[PostgresStore]:
    made = PostgresStore(dsn)
    await made.open()
    yield made
    await made.close()


def _drop(postgres: LocalPostgres, name: str) -> None:
    _run(postgres, f'DROP DATABASE "{name}" WITH (FORCE)')


def _run(postgres: LocalPostgres, sql: str) -> None:
    with psycopg.connect(postgres.dsn("postgres"), autocommit=True) as connection:
        connection.execute(sql)
