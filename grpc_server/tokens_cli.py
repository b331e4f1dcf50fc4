"""`python -m grpc_server tokens`: make, list and revoke API tokens, straight in the database."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, NoReturn, TypeVar

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from grpc_server import migrations
from grpc_server.adapters.credentials import new_token
from grpc_server.adapters.local_postgres import LocalPostgres, LocalPostgresError
from grpc_server.adapters.postgres import PostgresStore
from grpc_server.domain.errors import AgentLoopError
from grpc_server.domain.ports import TokenRecord, TokenStore
from grpc_server.domain.types import Scope
from grpc_server.settings import Settings, explain

T = TypeVar("T")

FAILED = 1
USAGE = 2
_DURATION = re.compile(r"([1-9][0-9]{0,5})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def duration(text: str) -> timedelta:
    """`30d`, `12h`, `45m`, `90s`, `2w`. Raises ValueError."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is not a duration; write a number and s, m, h, d or w, as in 30d")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def scopes(text: str) -> frozenset[Scope]:
    """`infer,feedback`. Raises ValueError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in set(Scope)]
    if unknown or not names:
        wrong = f"{unknown[0]!r} is no scope" if unknown else "no scope is given"
        raise ValueError(f"{wrong}; there are: {', '.join(Scope)}")
    return frozenset(Scope(name) for name in names)


@app.command()
def create(
    name: Annotated[str, typer.Option(help="Who will hold it; the log shows this name.")],
    scope_names: Annotated[
        str, typer.Option("--scopes", help="What it allows, by commas: " + ", ".join(Scope) + ".")
    ],
    expires_in: Annotated[
        str, typer.Option(help="30d, 12h, 45m, 90s, 2w. Without it, the token lasts until it is revoked.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Make a token, and print it: now, and never again. Only a hash of it is kept."""
    now = datetime.now(UTC)
    try:
        allowed = scopes(scope_names)
        expires_at = now + duration(expires_in) if expires_in else None
    except ValueError as error:
        _fail(str(error), USAGE)
    except OverflowError:
        _fail(f"{expires_in!r} ends after the year 9999; without --expires-in a token has no end", USAGE)
    if not 1 <= len(name) <= 100 or not name.isprintable():
        _fail(f"{name!r} is not a name; write 1 to 100 printable characters", USAGE)
    token, record = new_token(name, allowed, now, expires_at)
    _with_store(lambda store: store.create(record))
    if as_json:
        typer.echo(json.dumps({"token": token, **_plain(record)}, indent=2, sort_keys=True))
        return
    typer.echo(token)
    until = "until it is revoked" if expires_at is None else f"until {expires_at:%Y-%m-%d %H:%M} UTC"
    typer.echo(
        f"This is the only time it is shown. Its key id is {record.key_id}; it lasts {until}.", err=True
    )


@app.command("list")
def list_tokens(as_json: Json = False) -> None:
    """Show every token: its key id, whom it is for, what it allows, and whether it is in force."""
    tokens = _with_store(lambda store: store.all_tokens())
    if as_json:
        typer.echo(json.dumps([_plain(token) for token in tokens], indent=2, sort_keys=True))
        return
    table = Table()
    for title in ("key id", "name", "scopes", "created (UTC)", "expires (UTC)", "state"):
        table.add_column(title)
    for token in tokens:
        expires = "never" if token.expires_at is None else f"{token.expires_at:%Y-%m-%d %H:%M}"
        created = f"{token.created_at:%Y-%m-%d %H:%M}"
        table.add_row(
            token.key_id, token.name, " ".join(sorted(token.scopes)), created, expires, _state(token)
        )
    Console().print(table)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The token's key id: the twelve characters after `al_`.")],
    as_json: Json = False,
) -> None:
    """End a token. Servers refuse it within five seconds."""
    revoked = _with_store(lambda store: store.revoke(key_id, datetime.now(UTC)))
    if as_json:
        typer.echo(json.dumps({"key_id": key_id, "revoked": revoked}, indent=2, sort_keys=True))
    if not revoked:
        _fail(f"there is no token {key_id} in force; `tokens list` shows all", FAILED)
    if not as_json:
        typer.echo(f"{key_id} is revoked")


def _with_store(work: Callable[[TokenStore], Awaitable[T]]) -> T:
    """What `work` gives, on the database that is set or else the local one; exits with 1 if it cannot."""

    async def run() -> T:
        async with _store() as store:
            return await work(store)

    try:
        return asyncio.run(run())
    except ValidationError as error:
        _fail(explain(error), USAGE)
    except (AgentLoopError, LocalPostgresError, OSError, ValueError) as error:
        _fail(str(error), FAILED)


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


def _state(token: TokenRecord) -> str:
    if token.revoked_at is not None:
        return "revoked"
    if token.expires_at is not None and token.expires_at <= datetime.now(UTC):
        return "expired"
    return "in force"


def _plain(token: TokenRecord) -> dict[str, object]:
    return {
        "key_id": token.key_id,
        "name": token.name,
        "scopes": sorted(token.scopes),
        "created_at": token.created_at.isoformat(),
        "expires_at": None if token.expires_at is None else token.expires_at.isoformat(),
        "revoked_at": None if token.revoked_at is None else token.revoked_at.isoformat(),
        "state": _state(token),
    }


def _fail(text: str, code: int) -> NoReturn:
    typer.echo(f"error: {text}", err=True)
    raise typer.Exit(code)
