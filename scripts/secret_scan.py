"""Looks for secrets in what is tracked in git, with detect-secrets: `make security`.

What a person has looked at and found to be none (a test's made-up key, a hash) stands in
infra/pipeline/not_secrets.json, by file and by the hash of the text, without its line: moving it changes
nothing. `--accept` writes that file anew; look at its diff before you commit it. No text that was found
is ever printed.

Exit: 0 nothing new, 1 something is, or the list names what is not there any more, 2 usage.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer
from detect_secrets.core.secrets_collection import SecretsCollection
from detect_secrets.settings import default_settings, get_settings

from scripts.release import tracked

HOME = Path(__file__).resolve().parents[1]
LOOKED_AT = Path("infra/pipeline/not_secrets.json")
# Made by programs, and full of hashes.
LEFT_OUT = ("uv.lock", "agentloop/v1/", "benchmarks/results/", str(LOOKED_AT))
# Any word of many different letters would be one: paths, model names, sentences in tests.
TOO_EAGER = ("Base64HighEntropyString", "HexHighEntropyString")

Found = dict[str, dict[str, str]]
"""By file, then by the text's hash: what kind of secret it looks like."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def scan(
    root: Annotated[Path, typer.Option(help="The checkout.")] = HOME,
    accept: Annotated[
        bool, typer.Option("--accept", help="Write down that all that is found is no secret.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is new as JSON.")] = False,
) -> None:
    """Print what looks like a secret and was not looked at."""
    looked_at = [file for file in tracked(root) if not file.startswith(LEFT_OUT)]
    found, places = secrets_in(root, looked_at)
    listed = root / LOOKED_AT
    if accept:
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        typer.echo(f"{listed}: {sum(map(len, found.values()))} texts in {len(found)} files", err=True)
        return
    try:
        known: Found = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else {}
    except ValueError as error:
        typer.echo(f"error: {listed} is no JSON: {error}", err=True)
        raise typer.Exit(2) from error
    new = sorted(places[file, text] for file, text in _keys(found) - _keys(known))
    gone = sorted({file for file, _ in _keys(known) - _keys(found)})
    if as_json:
        typer.echo(json.dumps({"new": new, "gone": gone}))
    else:
        for each in new:
            typer.echo(each)
        for each in gone:
            typer.echo(f"{each}: {LOOKED_AT} names a text that is not there any more; run with --accept")
    raise typer.Exit(1 if new or gone else 0)


def secrets_in(root: Path, files: Iterable[str]) -> tuple[Found, dict[tuple[str, str], str]]:
    """What looks like a secret, and for people where each is, `file:line: kind`."""
    found: Found = {}
    places: dict[tuple[str, str], str] = {}
    with default_settings():
        get_settings().disable_plugins(*TOO_EAGER)
        collection = SecretsCollection(root=os.fspath(root))
        for file in files:
            collection.scan_file(file)
        for file, secret in collection:
            found.setdefault(file, {})[secret.secret_hash] = secret.type
            places[file, secret.secret_hash] = f"{file}:{secret.line_number}: {secret.type}"
    return found, places


def _keys(found: Mapping[str, Mapping[str, str]]) -> set[tuple[str, str]]:
    return {(file, text) for file, texts in found.items() for text in texts}


if __name__ == "__main__":
    app(prog_name="python -m scripts.secret_scan")
