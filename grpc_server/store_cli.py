"""What commands that work straight in the database share."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
from collections.abc import Awaitable, Callable, Iterator
from typing import NoReturn, TypeVar

import typer
from pydantic import ValidationError

from grpc_server import migrations
from grpc_server.adapters.local_postgres import LocalPostgres, LocalPostgresError
from grpc_server.adapters.postgres import PostgresStore
from grpc_server.domain.errors import AgentLoopError
from grpc_server.settings import Settings, explain

T = TypeVar("T")

FAILED = 1
USAGE = 2


def with_store(work: Callable[[PostgresStore], Awaitable[T]]) -> T:
    """What `work` gives, on the database that is set or else the local one; exits with 1 if it cannot."""
    with told(), database() as (_, dsn):
        return asyncio.run(on_store(dsn, work))


async def on_store(dsn: str, work: Callable[[PostgresStore], Awaitable[T]]) -> T:
    """What `work` gives, on a store of its own."""
    store = PostgresStore(dsn, connections=1)
    await store.open()
    try:
        return await work(store)
    finally:
        await store.close()


@contextlib.contextmanager
def database() -> Iterator[tuple[Settings, str]]:
    """The settings, and the DSN of the database that they name, or of the local one."""
    settings = Settings()
    dsn = settings.database_url.get_secret_value()
    if dsn:
        yield settings, dsn
        return
    with LocalPostgres(settings.state_dir / "postgres") as local:
        dsn = local.dsn("agentloop")
        migrations.migrate(dsn)
        yield settings, dsn


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Failures in a sentence, with an exit code."""
    try:
        yield
    except ValidationError as error:
        fail(explain(error), USAGE)
    except (AgentLoopError, LocalPostgresError, OSError, ValueError) as error:
        fail(str(error), FAILED)


def operator() -> str:
    """Who runs this command, for the events: the name of the user."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in containers
        return "unknown"


def fail(text: str, code: int) -> NoReturn:
    """Say why, and end with `code`."""
    typer.echo(f"error: {text}", err=True)
    raise typer.Exit(code)
