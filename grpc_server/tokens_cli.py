"""`python -m grpc_server tokens`: make, list, limit and revoke API tokens, straight in the database."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from grpc_server.adapters.credentials import new_token
from grpc_server.domain.limits import MAX_AMOUNT, limits_to_plain
from grpc_server.domain.ports import TokenRecord, TokenStore
from grpc_server.domain.types import NO_LIMITS, Limits, Scope
from grpc_server.settings import alias_names
from grpc_server.store_cli import FAILED, USAGE, fail, operator, with_store

_DURATION = re.compile(r"([1-9][0-9]{0,5})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Requests = Annotated[
    int | None, typer.Option(min=0, max=MAX_AMOUNT, help="Requests in a minute, on each server; 0: no limit.")
]
Tokens = Annotated[
    int | None, typer.Option(min=0, max=MAX_AMOUNT, help="Tokens in a minute, read and written; 0: no limit.")
]
Streams = Annotated[int | None, typer.Option(min=0, max=MAX_AMOUNT, help="Streams at once; 0: no limit.")]
Aliases = Annotated[str | None, typer.Option(help="The aliases that it may name, by commas; `*`: every one.")]


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
    requests_per_minute: Requests = None,
    tokens_per_minute: Tokens = None,
    concurrent_streams: Streams = None,
    aliases: Aliases = None,
    no_learning: Annotated[
        bool, typer.Option("--no-learning", help="The nights learn nothing from its caller.")
    ] = False,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="The log keeps counts of what its caller says, and no word.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a token, and print it: now, and never again. Only a hash of it is kept."""
    now = datetime.now(UTC)
    try:
        allowed = scopes(scope_names)
        limits = changed(NO_LIMITS, requests_per_minute, tokens_per_minute, concurrent_streams, aliases)
        expires_at = now + duration(expires_in) if expires_in else None
    except ValueError as error:
        fail(str(error), USAGE)
    except OverflowError:
        fail(f"{expires_in!r} ends after the year 9999; without --expires-in a token has no end", USAGE)
    if not 1 <= len(name) <= 100 or not name.isprintable():
        fail(f"{name!r} is not a name; write 1 to 100 printable characters", USAGE)
    token, record = new_token(
        name, allowed, now, expires_at, limits, learning=not no_learning, text=not no_text
    )
    with_store(lambda store: store.create(record, operator()))
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
    tokens = with_store(lambda store: store.all_tokens())
    if as_json:
        typer.echo(json.dumps([_plain(token) for token in tokens], indent=2, sort_keys=True))
        return
    table = Table()
    for title in ("key id", "name", "scopes", "limits", "log", "created (UTC)", "expires (UTC)", "state"):
        table.add_column(title)
    for token in tokens:
        expires = "never" if token.expires_at is None else f"{token.expires_at:%Y-%m-%d %H:%M}"
        created = f"{token.created_at:%Y-%m-%d %H:%M}"
        table.add_row(
            token.key_id,
            token.name,
            " ".join(sorted(token.scopes)),
            _limits_text(token.limits),
            _log_text(token),
            created,
            expires,
            _state(token),
        )
    Console().print(table)


@app.command("limit")
def limit_token(
    key_id: Annotated[str, typer.Argument(help="The token's key id: the twelve characters after `al_`.")],
    requests_per_minute: Requests = None,
    tokens_per_minute: Tokens = None,
    concurrent_streams: Streams = None,
    aliases: Aliases = None,
    as_json: Json = False,
) -> None:
    """Change what a token's caller may use; what is not named stays. Acts within five seconds."""
    given = (requests_per_minute, tokens_per_minute, concurrent_streams, aliases)
    if given == (None,) * 4:
        fail("nothing to change is given; `--help` shows the limits", USAGE)
    try:
        changed(NO_LIMITS, *given)
    except ValueError as error:
        fail(str(error), USAGE)

    async def change(store: TokenStore) -> Limits | None:
        for token in await store.all_tokens():
            if token.key_id == key_id:
                limits = changed(token.limits, *given)
                return limits if await store.limit(key_id, limits, operator()) else None
        return None

    limits = with_store(change)
    if limits is None:
        fail(f"there is no token {key_id} in force; `tokens list` shows all", FAILED)
    if as_json:
        found = {"key_id": key_id, "limits": limits_to_plain(limits)}
        typer.echo(json.dumps(found, indent=2, sort_keys=True))
    else:
        typer.echo(f"{key_id}: {_limits_text(limits)}")


def changed(
    limits: Limits, requests: int | None, tokens: int | None, streams: int | None, aliases: str | None
) -> Limits:
    """`limits`, with those that are given: 0 and `*` lift one. Raises ValueError for what is no alias."""
    names = limits.aliases
    if aliases is not None:
        names = None if aliases.strip() == "*" else alias_names(aliases)
    return Limits(
        limits.requests_per_minute if requests is None else requests or None,
        limits.tokens_per_minute if tokens is None else tokens or None,
        limits.concurrent_streams if streams is None else streams or None,
        names,
    )


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The token's key id: the twelve characters after `al_`.")],
    as_json: Json = False,
) -> None:
    """End a token. Servers refuse it within five seconds."""
    revoked = with_store(lambda store: store.revoke(key_id, datetime.now(UTC), operator()))
    if as_json:
        typer.echo(json.dumps({"key_id": key_id, "revoked": revoked}, indent=2, sort_keys=True))
    if not revoked:
        fail(f"there is no token {key_id} in force; `tokens list` shows all", FAILED)
    if not as_json:
        typer.echo(f"{key_id} is revoked")


def _state(token: TokenRecord) -> str:
    if token.revoked_at is not None:
        return "revoked"
    if token.expires_at is not None and token.expires_at <= datetime.now(UTC):
        return "expired"
    return "in force"


def _log_text(token: TokenRecord) -> str:
    """What becomes of what its caller says."""
    if not token.text:
        return "no text"
    return "learned" if token.learning else "not learned"


def _limits_text(limits: Limits) -> str:
    amounts = (
        (limits.requests_per_minute, "requests/min"),
        (limits.tokens_per_minute, "tokens/min"),
        (limits.concurrent_streams, "streams"),
    )
    parts = [f"{amount} {unit}" for amount, unit in amounts if amount is not None]
    if limits.aliases is not None:
        parts.append("only " + " ".join(sorted(limits.aliases)))
    return ", ".join(parts) or "none"


def _plain(token: TokenRecord) -> dict[str, object]:
    return {
        "key_id": token.key_id,
        "name": token.name,
        "scopes": sorted(token.scopes),
        "created_at": token.created_at.isoformat(),
        "expires_at": None if token.expires_at is None else token.expires_at.isoformat(),
        "revoked_at": None if token.revoked_at is None else token.revoked_at.isoformat(),
        "limits": limits_to_plain(token.limits),
        "learning": token.learning and token.text,
        "text": token.text,
        "state": _state(token),
    }
