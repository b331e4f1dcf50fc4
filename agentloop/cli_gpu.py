"""`agent-loop gpu`: who has the server's GPU, and serving's way to take it back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from agentloop.cli_session import JsonOption, print_json, printable, session

app = typer.Typer(no_args_is_help=True, help="Show who has the GPU, and take it back for serving.")


@app.command()
def show(context: typer.Context, as_json: JsonOption = False) -> None:
    """Show whether serving has the GPU, or a training, and until when at most."""
    with session(context).client(as_json=as_json) as client:
        handover = client.gpu_handover()
    if as_json:
        print_json(asdict(handover))
        return
    said = f"{handover.state} (AGENTLOOP_GPU_HANDOVER is {handover.mode})"
    if (lease := handover.lease) is not None:
        said += (
            f"\nheld by {printable(lease.holder, to_terminal=True)}, for {lease.remaining_s:.0f} s more at"
            f" most; taken back after {lease.expires_in_s:.0f} s unless it is renewed\nlease {lease.id}"
        )
    typer.echo(said)


@app.command()
def reclaim(
    context: typer.Context,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the models.", min=1)] = 600,
    as_json: JsonOption = False,
) -> None:
    """Take the GPU back now, whoever has it, and wait until the models are loaded."""
    with session(context).client(as_json=as_json) as client:
        lease = client.gpu_handover().lease
        changed = lease is not None and client.release_gpu_lease(lease.id, timeout_s=timeout)
    if as_json:
        print_json({"changed": changed})
    else:
        typer.echo("serving has the GPU again" if changed else "serving had the GPU already")
