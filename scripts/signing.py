"""Signs files with the deployer's key, and tells whether one who may has signed a file: `ssh-keygen -Y`.

`sign FILE...` writes FILE.sig beside each; the key is a private key's file, or the public half of one
that ssh-agent or a security key holds. `verify FILE --signers LIST` takes a list of who may sign, in the
form of ALLOWED SIGNERS in ssh-keygen(1): `release@example.com namespaces="agentloop-release" ssh-ed25519
AAAA…`.

Exit: 0 done, 1 not signed, or not by one of them, 2 usage.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Annotated

import typer

NAMESPACE = "agentloop-release"
"""A signature that was made for something else (a commit, a mail) is none here."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class SignatureError(Exception):
    """It was not signed, or not by one who may; the text says which file, and what to do."""


def sign(file: Path, key: Path) -> Path:
    """The signature's file, FILE.sig, whole or not at all.

    Raises:
        SignatureError: the key cannot be used.
    """
    done = _keygen("sign", "-q", "-f", str(key), of=file)
    if done.returncode != 0:
        raise SignatureError(f"{key} cannot sign: {done.stderr.decode(errors='replace').strip()}")
    signature = signature_of(file)
    partial = signature.with_name(f".{signature.name}.partial")
    partial.write_bytes(done.stdout)
    partial.replace(signature)
    return signature


def verify(file: Path, signers: Path) -> str:
    """Who signed it, as `signers` names them.

    Raises:
        SignatureError: nobody of them did, or there is no signature.
    """
    signature = signature_of(file)
    if not signature.is_file():
        raise SignatureError(
            f"{file} is not signed: there is no {signature}; sign it with its deployer's key"
        )
    found = _keygen("find-principals", "-f", str(signers), "-s", str(signature))
    who = found.stdout.decode(errors="replace").strip().splitlines()
    if found.returncode != 0 or not who:
        raise SignatureError(f"{signature} is by nobody whom {signers} names: {_why(found)}")
    done = _keygen("verify", "-f", str(signers), "-I", who[0], "-s", str(signature), of=file)
    if done.returncode != 0:
        raise SignatureError(f"{file} is not what {who[0]} signed in {signature}: {_why(done)}")
    return who[0]


def signature_of(file: Path) -> Path:
    """Where its signature lies."""
    return file.with_name(f"{file.name}.sig")


def _keygen(action: str, *options: str, of: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    namespace = ("-n", NAMESPACE) if of else ()
    with (of or Path(os.devnull)).open("rb") as content:
        return subprocess.run(
            ["ssh-keygen", "-Y", action, *namespace, *options],
            stdin=content,
            capture_output=True,
            check=False,
        )


def _why(done: subprocess.CompletedProcess[bytes]) -> str:
    said = (done.stderr or done.stdout).decode(errors="replace").strip()
    return said.splitlines()[-1] if said else f"ssh-keygen's exit code is {done.returncode}"


@app.command("sign")
def sign_command(
    files: Annotated[list[Path], typer.Argument(help="What is signed.", exists=True, dir_okay=False)],
    key: Annotated[
        Path,
        typer.Option(envvar="AGENTLOOP_SIGNING_KEY", help="The deployer's key.", exists=True, dir_okay=False),
    ],
) -> None:
    """Write a signature beside each file."""
    for file in files:
        try:
            typer.echo(sign(file, key))
        except (SignatureError, OSError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error


@app.command("verify")
def verify_command(
    file: Annotated[Path, typer.Argument(help="What was signed.", exists=True, dir_okay=False)],
    signers: Annotated[Path, typer.Option(help="Who may sign.", exists=True, dir_okay=False)],
) -> None:
    """Print who signed a file; fail if it is nobody who may."""
    try:
        typer.echo(verify(file, signers))
    except (SignatureError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app(prog_name="python -m scripts.signing")
