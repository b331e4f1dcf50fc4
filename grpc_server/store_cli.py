"""What commands that work straight in the database share."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
from collections.abc import AsyncIterator, Awaitable, Callable
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

    async def run() -> T:
        async with _store() as store:
            return await work(store)

    try:
        return asyncio.run(run())
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


@contextlib.asynccontextmanager
async def _store() -> AsyncIterator[PostgresStore]:
    settings = Settings()
    with contextlib.ExitStack() as stack:
        dsn = settings.database_url.get_secret_value()
        if not dsn:
            dsn = stack.enter_context(LocalPostgres(settings.state_dir / "postgres")).dsn("agentloop")
            migrations.migrate(dsn)
        store = PostgresStore(dsn, connections=1)
        await store.open()
        try:
            yield store
        finally:
            await store.close()
